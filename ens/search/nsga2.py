"""NSGA-II (Deb et al. 2002) by pymoo, with everything ever told as the pool its parents survive from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.core.variable import Choice as PymooChoice
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.mutation.rm import ChoiceRandomMutation
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from ens.search.ledger import Ledger
from ens.space import Genotype, SearchSpace

_MAX_MATINGS = 50
"""Matings tried in one ask before the rest of the batch falls back to the nearest unseen genotypes."""


class Nsga2Engine:
    """Uniform crossover and random-choice mutation of the whole front so far, by rank and crowding.

    The first `startup` genotypes are each choice index in all slots at once (the teacher, then all-surrogate rows) and
    uniform points. Parents are the non-dominated genotypes, `min_parents` at least: measured on tables of 256 to 6561
    genotypes, a front that is cut to a fixed population costs hypervolume. A child that was measured before is
    replaced by another mating, in the end by the nearest unseen genotype.
    """

    def __init__(self, space: SearchSpace, *, seed: int, startup: int = 8, min_parents: int = 4) -> None:
        self._ledger = Ledger(space, seed)
        self._startup = startup
        self._min_parents = min_parents
        choices = {slot.name: PymooChoice(options=np.arange(len(slot.choices))) for slot in space.slots}
        self._problem = Problem(vars=choices)

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        rng = self._ledger.rng(pending)
        if len(self._ledger) + len(pending) < self._startup or len(self._ledger.valid()[0]) < 2:
            return self._ledger.opening(n, beside=pending, rng=rng)
        algorithm = self._algorithm(n, seed=int(rng.integers(2**31)))
        found: list[Genotype] = []
        children: list[Genotype] = []
        for _ in range(_MAX_MATINGS):
            children = [tuple(map(int, row)) for row in algorithm.ask().get("X")] or children
            found += list(self._ledger.unseen(children, beside=[*pending, *found]))[: n - len(found)]
            if len(found) == n:
                return found
        for child in itertools.islice(itertools.cycle(children), n - len(found)):
            nearest = self._ledger.nearest_unseen(child, beside=[*pending, *found], rng=rng)
            found += [] if nearest is None else [nearest]
        return found

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)

    def _algorithm(self, n: int, *, seed: int) -> NSGA2:
        """pymoo's NSGA-II right before it mates the survivors of everything told for `n` children."""
        genotypes, values = self._ledger.valid()
        front = NonDominatedSorting().do(values, only_non_dominated_front=True)
        kept = np.sort(front) if len(front) >= self._min_parents else np.arange(len(values))  # the rest cannot survive
        pool = Population.new("X", np.array(genotypes)[kept], "F", values[kept])
        parents = RankAndCrowding().do(self._problem, pool, n_survive=max(len(front), self._min_parents),
                                       random_state=np.random.default_rng(seed))
        algorithm = NSGA2(pop_size=len(parents), n_offsprings=n, sampling=parents,
                          crossover=UniformCrossover(),
                          mutation=ChoiceRandomMutation(prob_var=1 / len(self._ledger.space.slots)),
                          eliminate_duplicates=False)
        algorithm.setup(self._problem, seed=seed, termination=NoTermination())
        algorithm.tell(infills=algorithm.ask())
        return algorithm
