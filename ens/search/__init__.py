"""Search engines by name: `ask(n, pending)` returns genotypes nobody has measured, `tell(genotypes, values)` values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ens.search.ehvi import EhviEngine
from ens.search.exact import ExactEngine
from ens.search.exhaustive import ExhaustiveEngine
from ens.search.nsga2 import Nsga2Engine
from ens.search.random import RandomEngine
from ens.search.tpe import TpeEngine
from ens.space import Genotype, SearchSpace, Tally, suggest


class Engine(Protocol):
    """What the loop needs of a search engine: `ENGINES[name](space, seed=seed)`, and two calls.

    Both calls together are a pure function of space, seed, what was told, in that order, and what is pending: that is
    what makes a killed search end with the same archive as one that ran through.
    """

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        """`n` different genotypes that were never told and that nobody measures now (`pending`); fewer only when the
        space holds no more.
        """
        ...

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        """Values (genotypes, objectives), minimised; a NaN row means measured and invalid: never asked for again."""
        ...


ENGINES: dict[str, Callable[..., Engine]] = {
    "exact": ExactEngine,
    "ehvi": EhviEngine,
    "nsga2": Nsga2Engine,
    "tpe": TpeEngine,
    "random": RandomEngine,
    "exhaustive": ExhaustiveEngine,
}


def create_engine(name: str, space: SearchSpace, *, seed: int, costs: Sequence[Tally | None] = (),
                  reference: Sequence[float] | None = None) -> Engine:
    """Build an engine by name; raises ValueError with the names that exist.

    `costs` has an entry for every objective: the numbers a choice where it is known in advance, None where it is
    measured. `reference` is the corner of the hypervolume. Engines that model what they measure do without both.
    """
    if name not in ENGINES:
        raise ValueError(f"search engine {name!r} does not exist{suggest(name, ENGINES)}; choose from "
                         f"{', '.join(ENGINES)}")
    if any(len(slot.open) < len(slot.choices) for slot in space.slots):
        kept = [slot.open for slot in space.slots]
        known = [tally and tally.keep(kept) for tally in costs]
        inner = create_engine(name, space.without_closed(), seed=seed, costs=known, reference=reference)
        return _NarrowEngine(inner, space)
    if name == "exact":
        return ExactEngine(space, seed=seed, costs=costs, reference=reference)
    return ENGINES[name](space, seed=seed)


class _NarrowEngine:
    """Any engine where slots leave choices out: it searches `space.without_closed()`, which numbers the others."""

    def __init__(self, engine: Engine, space: SearchSpace) -> None:
        self._engine = engine
        self._open = [slot.open for slot in space.slots]
        self._numbers = [{index: number for number, index in enumerate(own)} for own in self._open]

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        return [tuple(own[number] for number, own in zip(genotype, self._open, strict=True))
                for genotype in self._engine.ask(n, [self._number(one) for one in pending if self._is_open(one)])]

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        """What was measured before a choice was left out is no part of the space that is searched."""
        kept = [index for index, genotype in enumerate(genotypes) if self._is_open(genotype)]
        if kept:
            self._engine.tell([self._number(genotypes[index]) for index in kept], np.asarray(values)[kept])

    def _is_open(self, genotype: Genotype) -> bool:
        return all(index in numbers for index, numbers in zip(genotype, self._numbers, strict=True))

    def _number(self, genotype: Genotype) -> Genotype:
        return tuple(numbers[index] for index, numbers in zip(genotype, self._numbers, strict=True))
