"""Asking an Optuna sampler for genotypes that nobody measured yet."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from ens.search.ledger import Ledger
from ens.space import Genotype


def sample_unseen(ledger: Ledger, n: int, *, sampler: optuna.samplers.BaseSampler, draws: int,
                  rng: np.random.Generator) -> list[Genotype]:
    """Up to `n` unseen genotypes by `sampler`, which sees what was told and treats the batch so far as running.

    A sampler that repeats itself is asked `draws` times; then the unseen genotype nearest to its last wish is taken.
    Fewer than `n` come back only when the space is exhausted.
    """
    distributions: dict[str, BaseDistribution] = {
        slot.name: CategoricalDistribution(tuple(range(len(slot.choices)))) for slot in ledger.space.slots}
    genotypes, values = ledger.valid()
    study = optuna.create_study(directions=["minimize"] * values.shape[1], sampler=sampler)
    study.add_trials([optuna.create_trial(params=dict(zip(distributions, genotype, strict=True)),
                                          distributions=distributions, values=row.tolist())
                      for genotype, row in zip(genotypes, values, strict=True)])
    found: list[Genotype] = []
    while len(found) < n:
        for _ in range(draws):
            trial = study.ask(distributions)
            wish = tuple(int(trial.params[name]) for name in distributions)
            new = next(ledger.unseen([wish], beside=found), None)
            if new is not None:
                break
            study.tell(trial, state=TrialState.FAIL)
        else:
            new = ledger.nearest_unseen(wish, beside=found, rng=rng)
            if new is None:
                break
            study.add_trial(optuna.create_trial(state=TrialState.RUNNING, distributions=distributions,
                                                params=dict(zip(distributions, new, strict=True))))
        found.append(new)
    return found
