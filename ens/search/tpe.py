"""Multi-objective tree-structured Parzen estimator (Ozaki et al. 2022) by Optuna."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna

from ens.search.ledger import Ledger
from ens.search.samplers import sample_unseen
from ens.space import Genotype, SearchSpace


class TpeEngine:
    """Optuna's TPESampler, started from each choice index in all slots at once and `startup` points in all."""

    def __init__(self, space: SearchSpace, *, seed: int, startup: int = 10) -> None:
        self._ledger = Ledger(space, seed)
        self._startup = startup

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        rng = self._ledger.rng(pending)
        if len(self._ledger) + len(pending) < self._startup or not self._ledger.valid()[0]:
            return self._ledger.opening(n, beside=pending, rng=rng)
        sampler = optuna.samplers.TPESampler(seed=int(rng.integers(2**31)), n_startup_trials=0, multivariate=True)
        return sample_unseen(self._ledger, n, pending=pending, sampler=sampler, draws=20, rng=rng)

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)
