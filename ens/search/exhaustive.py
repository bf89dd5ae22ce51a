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
        self._rest = space.enumerate()
        self._ahead: list[Genotype] = []
        """Asked for and not told yet, so that the enumeration is walked once."""

    def ask(self, n: int) -> list[Genotype]:
        self._ahead = list(self._ledger.unseen(self._ahead))
        self._ahead += itertools.islice(self._ledger.unseen(self._rest), max(0, n - len(self._ahead)))
        return self._ahead[:n]

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)
