"""The search of the ENS paper: a Gaussian process per objective and expected hypervolume improvement."""

from __future__ import annotations

import warnings

import numpy as np
import optuna

from ens.search.ledger import Ledger
from ens.search.samplers import sample_unseen
from ens.space import Genotype, SearchSpace


class EhviEngine:
    """2·slots + 1 uniform points, then Optuna's GPSampler (log EHVI over the Gaussian processes).

    Telling is free; the processes are fitted when asked, so replaying an archive costs nothing.
    """

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self._ledger = Ledger(space, seed)

    def ask(self, n: int) -> list[Genotype]:
        rng = self._ledger.rng()
        initial = 2 * len(self._ledger.space.slots) + 1
        if len(self._ledger) < initial or len(self._ledger.valid()[0]) < 2:
            return self._ledger.uniform(n, beside=(), rng=rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.GPSampler(seed=int(rng.integers(2**31)), n_startup_trials=0,
                                                deterministic_objective=True)
        return sample_unseen(self._ledger, n, sampler=sampler, draws=1, rng=rng)

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)
