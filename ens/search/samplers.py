"""Asking an Optuna sampler for genotypes that nobody measured yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from ens.search.ledger import Ledger
from ens.space import Genotype

# Optuna logs every new study at INFO to stderr, where progress bars live.
optuna.logging.set_verbosity(optuna.logging.WARNING)


def sample_unseen(ledger: Ledger, n: int, *, pending: Sequence[Genotype], sampler: optuna.samplers.BaseSampler,
                  draws: int, rng: np.random.Generator) -> list[Genotype]:
    """Up to `n` unseen genotypes by `sampler`, which sees what was told and treats what is pending and the batch
    so far as running.

    A sampler that repeats itself is asked `draws` times; then the unseen genotype nearest to its last wish is taken.
    Fewer than `n` come back only when the space is exhausted.
    """
    # Optuna sorts parameters by name and drops those with one choice; numbered names keep the rest in slot order.
    distributions: dict[str, BaseDistribution] = {
        f"{slot:04d}": CategoricalDistribution(tuple(range(size)))
        for slot, size in enumerate(ledger.space.sizes) if size > 1}
    genotypes, values = ledger.valid()
    study = optuna.create_study(directions=["minimize"] * values.shape[1], sampler=sampler)
    study.add_trials([optuna.create_trial(params=_params(genotype, distributions), distributions=distributions,
                                          values=row.tolist())
                      for genotype, row in zip(genotypes, values, strict=True)])

    def keep_running(genotype: Genotype) -> None:
        study.add_trial(optuna.create_trial(state=TrialState.RUNNING, distributions=distributions,
                                            params=_params(genotype, distributions)))

    for genotype in pending:
        keep_running(genotype)
    found: list[Genotype] = []
    while len(found) < n:
        for _ in range(draws):
            trial = study.ask(distributions)
            wish = tuple(int(trial.params.get(f"{slot:04d}", 0)) for slot in range(len(ledger.space.sizes)))
            new = next(ledger.unseen([wish], beside=[*pending, *found]), None)
            if new is not None:
                break
            study.tell(trial, state=TrialState.FAIL)
        else:
            new = ledger.nearest_unseen(wish, beside=[*pending, *found], rng=rng)
            if new is None:
                break
            keep_running(new)
        found.append(new)
    return found


def _params(genotype: Genotype, distributions: Iterable[str]) -> dict[str, int]:
    return {name: genotype[int(name)] for name in distributions}
