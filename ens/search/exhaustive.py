"""Every genotype once, in lexicographic order, where neighbours share the longest prefixes."""

from __future__ import annotations

import itertools

import numpy as np

from ens.search.ledger import Ledger
from ens.space import Genotype, SearchSpace


class ExhaustiveEngine:
    """Asks for the whole space in order; the seed changes nothing."""

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self._ledger = Ledger(space, seed)

    def ask(self, n: int) -> list[Genotype]:
        return list(itertools.islice(self._ledger.unseen(self._ledger.space.enumerate()), n))

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)
