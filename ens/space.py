"""The vocabulary of a search: slots, choices, genotypes, spaces, measurements. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

Genotype = tuple[int, ...]
"""One choice index per slot, in slot order; index 0 of every slot is the teacher's own stage or block."""

BUILTIN = "builtin:"
"""What starts the name of something that ships with the package, where a file may be named, too."""

_LABEL = re.compile(r"^\s*(?P<family>[a-z][a-z0-9_]*)\s*[×x*]\s*(?P<depth>\d{1,99})\s*(?:\((?P<options>[^()]+)\))?\s*$")


@dataclass(frozen=True)
class Choice:
    """One way to fill a slot: `depth` blocks of `family` in a row; `teacher` marks the frozen original."""

    family: str
    depth: int
    options: tuple[tuple[str, int | float | str | bool], ...] = ()
    teacher: bool = False

    @property
    def label(self) -> str:
        """Printed name, for instance `mambair×2` or `vssd×1(state=16)`; unique within a slot."""
        text = f"{self.family}×{self.depth}"
        if self.options:
            text += "(" + ",".join(f"{key}={value}" for key, value in self.options) + ")"
        return text

    @property
    def file_stem(self) -> str:
        """The label in characters every file system takes: `mambair-2`, `vssd-1-state16`."""
        return "-".join([self.family, str(self.depth), *(f"{key}{value}" for key, value in self.options)])


def suggest(name: object, known: Iterable[str]) -> str:
    """` (did you mean …?)` for a name that is not among the known ones but near to one, else ""."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {near[0]}?)" if near and near[0] != name else ""


def parse_choice(text: str) -> Choice:
    """Read a label: `family×depth` (also `family x depth`), options in brackets: `vssd×1(state=16)`.

    Raises ValueError with the form that is allowed.
    """
    match = _LABEL.match(text)
    if match is None:
        raise ValueError(f"choice {text!r} is not understood; write family×depth, for instance mambair×2 or "
                         "vssd×1(state=16)")
    pairs = [pair.partition("=") for pair in (match["options"] or "").split(",") if pair.strip()]
    return Choice(match["family"], int(match["depth"]),
                  tuple(sorted((key.strip(), _read_option(value.strip())) for key, _, value in pairs)))


def _read_option(text: str) -> int | float | str | bool:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


@dataclass(frozen=True)
class Slot:
    """A position of the network that may be filled; `choices[0]` is the teacher's.

    Where the slot is `closed` to the teacher no genotype keeps its own blocks; they stay what drops are measured from.
    `shut` are further choices that a search leaves out, as indices.
    """

    name: str
    choices: tuple[Choice, ...]
    closed: bool = False
    shut: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        labels = [choice.label for choice in self.choices]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"slot {self.name!r} needs one or more different choices, got {labels}")
        if self.closed and len(labels) == 1:
            raise ValueError(f"slot {self.name!r} is closed to the teacher and has no other choice")
        if not self.choices[0].teacher or any(choice.teacher for choice in self.choices[1:]):
            raise ValueError(f"slot {self.name!r}: the first choice, and only the first, must be the teacher's")

    @property
    def open(self) -> tuple[int, ...]:
        """Indices of the choices that a search may take."""
        return tuple(index for index in range(int(self.closed), len(self.choices)) if index not in self.shut)


@dataclass(frozen=True)
class SearchSpace:
    """Slots with their choices, and the prices of the usage penalty (ENS, section 6.3 of its figures: a transformer
    stage costs 2.0, a surrogate 0.1 a block).

    A choice of one of the `transformers` families costs its share of the teacher's stage: `restormer×2` in a stage of
    four blocks half of `penalty_teacher`. `identity` costs nothing, any other block `penalty_per_block`.
    """

    name: str
    slots: tuple[Slot, ...]
    penalty_teacher: float = 2.0
    penalty_per_block: float = 0.1
    transformers: tuple[str, ...] = ("restormer", "uformer")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of each slot."""
        return tuple(len(slot.choices) for slot in self.slots)

    @property
    def num_genotypes(self) -> int:
        """Genotypes that a search may find."""
        return math.prod(len(slot.open) for slot in self.slots)

    @property
    def num_surrogates(self) -> int:
        """Pairs of slot and choice that need distilled weights (every choice but the teacher's)."""
        return sum(self.sizes) - len(self.slots)

    @property
    def teacher(self) -> Genotype:
        return (0,) * len(self.slots)

    def check(self, genotype: Genotype) -> Genotype:
        """Return the genotype, or raise ValueError saying which slot is off and what it allows."""
        if len(genotype) != len(self.slots):
            raise ValueError(f"a genotype of {self.name} has {len(self.slots)} entries, got {len(genotype)}")
        for index, slot in zip(genotype, self.slots, strict=True):
            if not 0 <= index < len(slot.choices):
                raise ValueError(f"slot {slot.name} allows 0 to {len(slot.choices) - 1}, got {index}")
        return genotype

    def choices(self, genotype: Genotype) -> tuple[Choice, ...]:
        return tuple(slot.choices[index] for slot, index in zip(self.slots, self.check(genotype), strict=True))

    def replaced(self, genotype: Genotype) -> dict[str, Choice]:
        """Slot name -> choice, for the slots that are not the teacher's own."""
        return {slot.name: choice for slot, choice in zip(self.slots, self.choices(genotype), strict=True)
                if not choice.teacher}

    def penalty(self, genotype: Genotype) -> float:
        """Transformer usage of a genotype: sum over slots, unitless, smaller is cheaper."""
        self.check(genotype)
        return round(sum(self.price(slot, index) for slot, index in zip(self.slots, genotype, strict=True)), 9)

    def price(self, slot: Slot, index: int) -> float:
        """Usage penalty of one choice of a slot."""
        choice, teacher = slot.choices[index], slot.choices[0]
        if choice.teacher:
            return self.penalty_teacher
        if choice.family in self.transformers:
            return self.penalty_teacher * choice.depth / teacher.depth
        return 0.0 if choice.family == "identity" else self.penalty_per_block * choice.depth

    def sample(self, rng: np.random.Generator) -> Genotype:
        return tuple(slot.open[rng.integers(len(slot.open))] for slot in self.slots)

    def allows(self, genotype: Genotype) -> bool:
        """Whether a search may measure this genotype; `search.bounds` narrows that."""
        return self._is_unrestricted or not any((slot.closed and index == 0) or index in slot.shut
                                        for index, slot in zip(genotype, self.slots, strict=True))

    @cached_property
    def _is_unrestricted(self) -> bool:
        return not any(slot.closed or slot.shut for slot in self.slots)

    def repair(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """A genotype that is allowed, like the given one in as many slots as possible."""
        return genotype

    def enumerate(self) -> Iterator[Genotype]:
        """Every genotype once, in lexicographic order: neighbours share the longest prefixes."""
        return itertools.product(*(slot.open for slot in self.slots))

    def check_open(self, genotype: Genotype) -> Genotype:
        """Return the genotype, or raise ValueError for one that keeps the teacher in a slot that is closed to it."""
        for index, slot in zip(self.check(genotype), self.slots, strict=True):
            if slot.closed and index == 0:
                raise ValueError(f"slot {slot.name} is closed to the teacher's own {slot.choices[0].label}: genotypes "
                                 "there begin at 1")
        return genotype

    def without_closed(self) -> SearchSpace:
        """The choices that a search may find, numbered from 0 in every slot: `slot.open` holds their indices here."""
        slots = []
        for slot in self.slots:
            first, *others = (slot.choices[index] for index in slot.open)
            slots.append(Slot(slot.name, (replace(first, teacher=True), *others)))
        return replace(self, slots=tuple(slots))

    def restrict(self, *, fix: Mapping[str, str], forbid: Sequence[str]) -> SearchSpace:
        """The same where slots keep the choice that `fix` names, and no slot takes a family of `forbid`, the teacher's
        own blocks included. Raises ValueError for a slot, choice or family that is not there, or where none is left.
        """
        wanted = {name: parse_choice(label).label for name, label in fix.items()}
        families = {choice.family for slot in self.slots for choice in slot.choices}
        for kind, given, known in (("slot", wanted, {slot.name for slot in self.slots}), ("family", forbid, families)):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"this space searches no {kind} {unknown[0]!r}{suggest(unknown[0], known)}; it has "
                                 f"{', '.join(sorted(known))}")
        slots = []
        for slot in self.slots:
            shut = {index for index, choice in enumerate(slot.choices)
                    if choice.label != wanted.get(slot.name, choice.label) or choice.family in forbid}
            slots.append(replace(slot, shut=slot.shut | shut))
            if not slots[-1].open:
                labels, fixed = [choice.label for choice in slot.choices], wanted.get(slot.name, "")
                raise ValueError(f"slot {slot.name} has no choice left of {', '.join(labels)}"
                                 + (f": it is fixed to {fixed}{suggest(fixed, labels)}" if fixed else "")
                                 + (f"; forbidden: {', '.join(forbid)}" if forbid else ""))
        return replace(self, slots=tuple(slots))


@dataclass(frozen=True)
class Tally:
    """A cost of every genotype from one number a choice: their sum with `rest`, or the largest of all."""

    rest: float
    entries: tuple[tuple[float, ...], ...]
    is_maximum: bool = False

    def join(self, *values: float) -> float:
        """The sum of values, or the largest."""
        return max(values, default=0.0) if self.is_maximum else math.fsum(values)

    def value(self, genotype: Genotype) -> float:
        """The cost of a genotype."""
        return self.join(self.rest, *(row[index] for row, index in zip(self.entries, genotype, strict=True)))

    def keep(self, kept: Sequence[Sequence[int]]) -> Tally:
        """The same for genotypes that count the `kept` choices of every slot."""
        return replace(self, entries=tuple(tuple(row[index] for index in own)
                                           for own, row in zip(kept, self.entries, strict=True)))

    @property
    def least(self) -> float:
        """The smallest cost of any genotype."""
        return self.join(self.rest, *map(min, self.entries))


def format_genotype(genotype: Genotype) -> str:
    """`0-2-1`: what the command line, the archive and the report print."""
    return "-".join(map(str, genotype))


def parse_genotype(text: str, space: SearchSpace) -> Genotype:
    """Inverse of format_genotype, checked against the space; raises ValueError."""
    try:
        genotype = tuple(int(part) for part in text.split("-"))
    except ValueError:
        raise ValueError(f"genotype {text!r} is not understood; write one number a slot, for instance "
                         f"{format_genotype(space.teacher)}") from None
    return space.check_open(genotype)


@dataclass(frozen=True)
class Measurement:
    """Values of one genotype: `values` by objective name, PSNR of every validation image in dB.

    `psnr_db_tuned` is the PSNR of every validation image after the best fine-tuning so far, empty before one;
    `psnr_db` and `values` stay training-free. `valid` is False when a PSNR is not finite or the hybrid could not be
    built; `note` then says why. An invalid measurement stays in the archive, visible, and is never on the front.
    """

    genotype: Genotype
    values: Mapping[str, float]
    psnr_db: tuple[float, ...] = ()
    valid: bool = True
    note: str = ""
    psnr_db_tuned: tuple[float, ...] = ()
