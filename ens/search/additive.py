"""The exact front where values add up over slots: merge and prune, slot after slot (dynamic programming)."""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

from ens.space import Genotype

Array = NDArray[np.float64]


def find_additive_front(entries: Sequence[Array], pairs: Sequence[Array] = ()) -> tuple[list[Genotype], Array]:
    """Genotypes that no other one dominates, and their values (F, objectives), sorted by the last objective.

    `entries` has (choices, objectives) for every slot. `pairs` adds (choices, choices of the next slot, objectives) for
    every two slots that are neighbours. All objectives are minimised; of equal values one genotype stays. A genotype of
    the front has beginnings that nothing with the same last choice dominates, so all others are dropped on the way.
    """
    if not entries:
        raise ValueError("a space without slots has no front")
    # By last choice where pairs join it to the next slot, else all in one.
    fronts = [(np.zeros((1, entries[0].shape[1])), np.zeros((1, 0), np.int64))]
    for slot, entry in enumerate(entries):
        grown = []
        for choice, own in enumerate(entry):
            parts = [(values + own + (pairs[slot - 1][last, choice] if pairs and slot else 0.0), genotypes)
                     for last, (values, genotypes) in enumerate(fronts)]
            values, genotypes = _prune(*(np.concatenate(part) for part in zip(*parts, strict=True)))
            grown.append((values, np.hstack([genotypes, np.full((len(genotypes), 1), choice)])))
        fronts = grown if pairs else [_prune(*(np.concatenate(part) for part in zip(*grown, strict=True)))]
    values, genotypes = _prune(*(np.concatenate(part) for part in zip(*fronts, strict=True)))
    return [tuple(row) for row in genotypes.tolist()], values


def _prune(values: Array, genotypes: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    order = np.lexsort(values.T)
    values, genotypes = values[order], genotypes[order]
    if values.shape[1] == 2:  # sorted by the second: what lowers the first stays
        least = np.minimum.accumulate(values[:, 0])
        keep = np.append(True, values[1:, 0] < least[:-1])
    else:
        keep = np.asarray(moocore.is_nondominated(values, keep_weakly=False), bool)
    return values[keep], genotypes[keep]
