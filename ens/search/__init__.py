"""Search engines by name: `ask(n)` returns genotypes never told before, `tell(genotypes, values)` their values."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ens.search.ehvi import EhviEngine
from ens.search.exhaustive import ExhaustiveEngine
from ens.search.nsga2 import Nsga2Engine
from ens.search.random import RandomEngine
from ens.search.tpe import TpeEngine
from ens.space import Genotype, SearchSpace


class Engine(Protocol):
    """What the loop needs of a search engine.

    Both calls together are a pure function of space, seed and what was told, in that order: that is what makes a
    killed search end with the same archive as one that ran through.
    """

    def __init__(self, space: SearchSpace, *, seed: int) -> None: ...

    def ask(self, n: int) -> list[Genotype]:
        """`n` different genotypes that were never told; fewer only when the space holds no more."""
        ...

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        """Values (genotypes, objectives), minimised; a NaN row means measured and invalid: never asked for again."""
        ...


ENGINES: dict[str, type[Engine]] = {
    "ehvi": EhviEngine,
    "nsga2": Nsga2Engine,
    "tpe": TpeEngine,
    "random": RandomEngine,
    "exhaustive": ExhaustiveEngine,
}


def create_engine(name: str, space: SearchSpace, *, seed: int) -> Engine:
    """Build an engine by name; raises ValueError with the names that exist."""
    if name not in ENGINES:
        raise ValueError(f"search engine {name!r} does not exist; choose from {', '.join(ENGINES)}")
    return ENGINES[name](space, seed=seed)
