"""Every genotype once, in lexicographic order, where neighbours share the longest prefixes."""

from __future__ import annotations

from collections.abc import Sequence

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

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        self._ahead = list(self._ledger.unseen(self._ahead))
        skip = set(pending)
        free = [genotype for genotype in self._ahead if genotype not in skip]
        while len(free) < n and (new := next(self._ledger.unseen(self._rest), None)):
            self._ahead.append(new)  # a pending one too: its worker may die
            free += [] if new in skip else [new]
        return free[:n]

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, values)
