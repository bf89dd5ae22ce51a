"""The search of the ENS paper: a Gaussian process per objective and expected hypervolume improvement."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import moocore
import numpy as np
import optuna

from ens.search.ledger import Ledger
from ens.search.samplers import sample_unseen
from ens.space import Genotype, SearchSpace

_HOOK = "_optimize_acqf"
"""What Optuna names for replacing the search of its acquisition; private, so a version without it is used as it is."""
_MAX_CANDIDATES = 512
"""Unseen genotypes whose improvement is computed in one ask; the time of an ask grows with it."""


class EhviEngine:
    """2·slots + 1 uniform points, then the unseen genotype of greatest expected hypervolume improvement.

    Processes (categorical Matérn kernel, refitted at every ask) and log-EHVI are Optuna's GPSampler. Candidates are
    all unseen genotypes of a small space; of a large one, half are neighbours of the front and half uniform. Telling
    is free, so replaying an archive costs nothing. Batches of one are fastest and best informed: a larger batch costs
    a joint improvement over the genotypes still out.
    """

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self._ledger = Ledger(space, seed)

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        rng = self._ledger.rng(pending)
        initial = 2 * len(self._ledger.space.slots) + 1
        if len(self._ledger) + len(pending) < initial or len(self._ledger.valid()[0]) < 2:
            return self._ledger.uniform(n, beside=pending, rng=rng)
        candidates = self._candidates(n, pending, rng)
        if not candidates:
            return []
        kind = _CandidateSampler if hasattr(optuna.samplers.GPSampler, _HOOK) else optuna.samplers.GPSampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = kind(seed=int(rng.integers(2**31)), n_startup_trials=0, deterministic_objective=True)
        if isinstance(sampler, _CandidateSampler):
            open_slots = [slot for slot, size in enumerate(self._ledger.space.sizes) if size > 1]
            sampler.candidates = np.array(candidates, dtype=np.float64)[:, open_slots]
        return sample_unseen(self._ledger, min(n, len(candidates)), pending=pending, sampler=sampler, draws=1,
                             rng=rng)

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)

    def _candidates(self, n: int, pending: Sequence[Genotype], rng: np.random.Generator) -> list[Genotype]:
        space, limit = self._ledger.space, max(n, _MAX_CANDIDATES)
        if space.num_genotypes - len(self._ledger) <= limit:
            return list(self._ledger.unseen(space.enumerate(), beside=pending))
        genotypes, values = self._ledger.valid()
        front = [genotype for genotype, keep in zip(genotypes, moocore.is_nondominated(values), strict=True) if keep]
        near = list(self._ledger.neighbours(front, beside=pending))
        chosen = [near[index] for index in rng.permutation(len(near))[: limit // 2]]
        return chosen + self._ledger.uniform(limit - len(chosen), beside=[*pending, *chosen], rng=rng)


class _CandidateSampler(optuna.samplers.GPSampler):
    """GPSampler that maximises its acquisition over `candidates` (N, slots with a choice), not the whole space.

    Optuna's own optimiser repeats genotypes that were measured and spends most of an ask on 2,048 random points. A
    categorical parameter's coordinate is its index.
    """

    candidates: np.ndarray

    def _optimize_acqf(self, acqf: Any, best_params: np.ndarray | None) -> np.ndarray:
        best = int(np.argmax(acqf.eval_acqf_no_grad(self.candidates)))
        chosen: np.ndarray = self.candidates[best]
        self.candidates = np.delete(self.candidates, best, axis=0)
        return chosen
