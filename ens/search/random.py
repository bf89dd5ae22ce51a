"""Uniform random search without repeats: the baseline every other engine has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ens.search.ledger import Ledger
from ens.space import Genotype, SearchSpace


class RandomEngine:
    """Draws unseen genotypes uniformly."""

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self._ledger = Ledger(space, seed)

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        return self._ledger.uniform(n, beside=pending, rng=self._ledger.rng(pending))

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)
