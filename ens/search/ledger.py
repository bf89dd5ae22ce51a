"""What an engine was told, and the randomness that follows from it alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ens.space import Genotype, SearchSpace

_MOST_NEAR = 4096
"""Genotypes looked at in the neighbourhood of one that is wanted."""


class Ledger:
    """Genotypes told so far with their values (a NaN row: measured, invalid), and which are still unseen.

    Random numbers depend on the seed and on how much was told or is pending, never on how often an engine was asked:
    a search that is killed and replayed asks for the same genotypes as one that ran through.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self.seed = seed
        self.genotypes: list[Genotype] = []
        self._rows: list[np.ndarray] = []
        self._valid: tuple[list[Genotype], np.ndarray] | None = None
        self._seen: set[Genotype] = set()

    def __len__(self) -> int:
        return len(self.genotypes)

    def add(self, genotypes: Sequence[Genotype], values: np.ndarray) -> None:
        """Append genotypes with their values (len(genotypes), objectives); raises ValueError on a repeated one."""
        self._valid = None
        for genotype, row in zip(genotypes, np.asarray(values, dtype=np.float64), strict=True):
            if self.space.check(genotype) in self._seen:
                raise ValueError(f"genotype {genotype} was told before")
            self._seen.add(genotype)
            self.genotypes.append(genotype)
            self._rows.append(row)

    def valid(self) -> tuple[list[Genotype], np.ndarray]:
        """Genotypes whose values are known and finite, with those values (n, objectives); not to be changed."""
        if self._valid is None:
            rows = np.array(self._rows)
            kept = np.flatnonzero(~np.isnan(rows).any(axis=1)) if len(rows) else np.arange(0)
            self._valid = [self.genotypes[index] for index in kept], rows[kept]
        return self._valid

    def rng(self, pending: Sequence[Genotype] = ()) -> np.random.Generator:
        return np.random.default_rng((self.seed, len(self) + len(pending)))

    def unseen(self, candidates: Iterable[Genotype], *, beside: Sequence[Genotype] = ()) -> Iterator[Genotype]:
        """The candidates that the space allows and that were neither told nor are in `beside`, each once.

        Every engine asks for what comes out here, so none has to know of bounds.
        """
        skip = set(beside)
        for candidate in candidates:
            if candidate not in skip and candidate not in self._seen and self.space.allows(candidate):
                skip.add(candidate)
                yield candidate

    def nearest_unseen(self, genotype: Genotype, *, beside: Sequence[Genotype],
                       rng: np.random.Generator) -> Genotype | None:
        """An unseen genotype that differs from `genotype` in as few slots as possible; None when all are seen.

        Samplers repeat themselves on small tables; a repeat is replaced by this, so that a search always advances.
        Where bounds leave little, what is near may all be seen or forbidden: then it is any.
        """
        near = itertools.islice(_by_distance(self.space.repair(genotype, rng), self.space.sizes, rng), _MOST_NEAR)
        return next(self.unseen(itertools.chain(near, self.space.enumerate()), beside=beside), None)

    def uniform(self, n: int, *, beside: Sequence[Genotype], rng: np.random.Generator) -> list[Genotype]:
        """Up to `n` unseen genotypes drawn uniformly; fewer only when the space holds no more."""
        found: list[Genotype] = []
        while len(found) < n:
            sample = self.space.sample(rng)
            new = self.nearest_unseen(sample, beside=[*beside, *found], rng=rng)
            if new is None:
                break
            found.append(new)
        return found

    def opening(self, n: int, *, beside: Sequence[Genotype] = (), rng: np.random.Generator) -> list[Genotype]:
        """Up to `n` unseen genotypes to start from: one choice index in all slots at once (the teacher, then the
        all-surrogate ends), then uniform points. An engine that starts at both ends need not find them.
        """
        rows = (tuple(min(index, size - 1) for size in self.space.sizes) for index in range(max(self.space.sizes)))
        found = list(self.unseen(rows, beside=beside))[:n]
        return found + self.uniform(n - len(found), beside=[*beside, *found], rng=rng)

    def neighbours(self, genotypes: Iterable[Genotype], *, beside: Sequence[Genotype] = ()) -> Iterator[Genotype]:
        """Unseen genotypes that differ from one of `genotypes` in one slot."""
        return self.unseen(((*genotype[:slot], index, *genotype[slot + 1:])
                            for genotype in genotypes for slot, size in enumerate(self.space.sizes)
                            for index in range(size)), beside=beside)


def _by_distance(start: Genotype, sizes: Sequence[int], rng: np.random.Generator) -> Iterator[Genotype]:
    """Every genotype once, `start` first, then in order of the number of slots that differ, shuffled within."""
    slots = rng.permutation(len(sizes)).tolist()
    others = [[index for index in rng.permutation(size).tolist() if index != start[slot]]
              for slot, size in enumerate(sizes)]
    for distance in range(len(sizes) + 1):
        for changed in itertools.combinations(slots, distance):
            for indices in itertools.product(*(others[slot] for slot in changed)):
                genotype = list(start)
                for slot, index in zip(changed, indices, strict=True):
                    genotype[slot] = index
                yield tuple(genotype)
