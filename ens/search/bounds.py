"""A space that holds only what keeps within bounds: engines see it as any other, so none has to know of them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ens.objectives import format_value
from ens.space import Genotype, SearchSpace, Slot, Tally

_MOST_COUNTED = 4096
_SLACK = 1 + 1e-9
"""Sums of the same numbers in another order differ in their last digits."""


@dataclass(frozen=True)
class Bound:
    """The largest value of a cost that is known without measuring, and how that comes about."""

    name: str
    value: float
    measure: Callable[[Genotype], float]
    tally: Tally

    def close(self, slots: Sequence[Slot]) -> Bound:
        """The same where slots leave choices out: these cost more than any bound allows."""
        entries = tuple(tuple(value if index in slot.open else math.inf for index, value in enumerate(row))
                        for slot, row in zip(slots, self.tally.entries, strict=True))
        return replace(self, tally=replace(self.tally, entries=entries))

    def renumber(self, kept: Sequence[Sequence[int]]) -> Bound:
        """The same for genotypes that count the `kept` choices of every slot."""
        return replace(self, tally=self.tally.keep(kept), measure=lambda genotype: self.measure(
            tuple(own[index] for index, own in zip(genotype, kept, strict=True))))


@dataclass(frozen=True)
class BoundedSpace(SearchSpace):
    """The genotypes of a space that keep within every one of `bounds`."""

    bounds: tuple[Bound, ...] = ()

    def allows(self, genotype: Genotype) -> bool:
        return super().allows(genotype) and all(bound.measure(genotype) <= bound.value for bound in self.bounds)

    def without_closed(self) -> SearchSpace:
        bounds = tuple(bound.renumber([slot.open for slot in self.slots]) for bound in self.bounds)
        return replace(self, slots=super().without_closed().slots, bounds=bounds)

    @functools.cached_property
    def num_genotypes(self) -> int:  # engines ask every time, and counting takes seconds
        """How many there are, counted up to 4,096; of a larger space, all without bounds."""
        counted = sum(1 for _ in itertools.islice(self.enumerate(), _MOST_COUNTED + 1))
        return counted if counted <= _MOST_COUNTED else super().num_genotypes

    def sample(self, rng: np.random.Generator) -> Genotype:
        return self.repair(super().sample(rng), rng)

    def repair(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """Slot after slot in random order, another choice where the wanted one leaves no way to keep a bound.

        Bounds are looked at one by one; where together they lead into a dead end, the first genotype that keeps all.
        """
        chosen: dict[int, int] = {}
        for slot in rng.permutation(len(self.slots)).tolist():
            others = [index for index in rng.permutation(self.sizes[slot]).tolist() if index != genotype[slot]]
            fitting = (index for index in (genotype[slot], *others) if self._is_open({**chosen, slot: index}))
            chosen[slot] = next(fitting, genotype[slot])
        found = tuple(chosen[slot] for slot in range(len(self.slots)))
        return found if self.allows(found) else next(self.enumerate(), found)

    def enumerate(self) -> Iterator[Genotype]:
        """Every allowed genotype once, in lexicographic order; what no choice of later slots can mend is cut off."""
        return self._extend(())

    def _extend(self, start: Genotype) -> Iterator[Genotype]:
        if len(start) == len(self.slots):
            if self.allows(start):
                yield start
            return
        for index in range(self.sizes[len(start)]):
            if self._is_open(dict(enumerate((*start, index)))):
                yield from self._extend((*start, index))

    def _is_open(self, chosen: Mapping[int, int]) -> bool:
        """Whether each bound alone can still be kept when these slots are chosen and the others take their least."""
        return all(bound.tally.join(bound.tally.rest, *(
            row[chosen[slot]] if slot in chosen else min(row) for slot, row in enumerate(bound.tally.entries)))
            <= bound.value * _SLACK for bound in self.bounds)


def narrow_space(space: SearchSpace, bounds: Sequence[Bound]) -> SearchSpace:
    """The space within bounds, itself without any; raises ValueError, with what can be reached, where nothing is left.
    """
    if not bounds:
        return space
    bounds = [bound.close(space.slots) for bound in bounds]
    for bound in bounds:
        if bound.tally.least > bound.value * _SLACK:
            raise ValueError(f"no genotype has {bound.name} of at most {format_value(bound.name, bound.value)}; the "
                             f"least there is, is {format_value(bound.name, bound.tally.least)}")
    narrow = BoundedSpace(**{field.name: getattr(space, field.name) for field in fields(space)}, bounds=tuple(bounds))
    if next(narrow.enumerate(), None) is None:
        raise ValueError("no genotype keeps within all bounds at once: " + ", ".join(
            f"{bound.name} {format_value(bound.name, bound.value)} (the least alone is "
            f"{format_value(bound.name, bound.tally.least)})" for bound in bounds))
    return narrow
