"""Latency table of one device, runtime and size: milliseconds of every choice in every slot, and how they were taken.

A hybrid is predicted as the network without its slots plus one entry a slot. How far that holds is part of the table:
hybrids that were timed whole, beside their prediction.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ens.atomic import write_atomic
from ens.objectives import LATENCY, table_of
from ens.space import Genotype, SearchSpace

LARGEST_ERROR = 0.10
"""Median relative error beyond which a front says that its milliseconds are rough."""


class LatencyError(ValueError):
    """A latency table that is absent, damaged, or of another space."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Protocol(_Record):
    """How times were taken. `load` is that of the machine before and after, over a minute."""

    device: str
    runtime: str
    version: str
    threads: int
    dtype: str
    height: int
    width: int
    repeats: int
    load: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}" if self.threads else "default threads"
        return (f"{self.runtime} {self.version}, {self.dtype}, {threads}, {self.height}x{self.width}, {self.device}, "
                f"load {self.load}")


class Entry(_Record):
    """Milliseconds of one choice in one slot: the median, and the two quartiles."""

    ms: float
    quartiles_ms: tuple[float, float]

    def scaled(self, factor: float) -> Entry:
        """The same times a factor."""
        return Entry(ms=self.ms * factor, quartiles_ms=(self.quartiles_ms[0] * factor, self.quartiles_ms[1] * factor))


class Check(_Record):
    """One hybrid timed whole, beside its prediction."""

    predicted_ms: float
    measured_ms: float


class LatencyTable(_Record):
    """`slots` holds the entries by slot and choice label, `rest` what no slot touches, `checks` hybrids by genotype.

    `factor` is what the times of slots alone were multiplied by: their share between neighbours.
    """

    protocol: Protocol
    rest: Entry
    slots: dict[str, dict[str, Entry]]
    factor: float = 1.0
    checks: dict[str, Check] = {}

    def predict_ms(self, space: SearchSpace, genotype: Genotype) -> float:
        """Milliseconds of one pass of a hybrid; raises LatencyError for a choice the table lacks."""
        return self.rest.ms + sum(self._entry(slot.name, choice.label).ms for slot, choice in
                                  zip(space.slots, space.choices(genotype), strict=True))

    def scale_slots(self, factor: float) -> LatencyTable:
        """The same table with the entries of all slots times a factor above 0; raises LatencyError for another one."""
        if not factor > 0:
            raise LatencyError(f"whole hybrids take {factor:.2f} times as long as their slots: the device was busy, "
                               "profile again")
        slots = {slot: {label: entry.scaled(factor) for label, entry in entries.items()}
                 for slot, entries in self.slots.items()}
        return self.model_copy(update={"slots": slots, "factor": self.factor * factor})

    def _entry(self, slot: str, label: str) -> Entry:
        try:
            return self.slots[slot][label]
        except KeyError:
            raise LatencyError(f"the latency table has no {label} in slot {slot}; `ens profile` makes one that has"
                               ) from None

    def check_space(self, space: SearchSpace) -> None:
        """Raises LatencyError where some choice of the space has no entry."""
        for slot in space.slots:
            for choice in slot.choices:
                self._entry(slot.name, choice.label)

    @property
    def median_error(self) -> float:
        """Median relative error |predicted − measured| / measured over the checked hybrids; NaN without any."""
        errors = [abs(one.predicted_ms - one.measured_ms) / one.measured_ms for one in self.checks.values()]
        return statistics.median(errors) if errors else math.nan

    @property
    def kendall_tau(self) -> float:
        """Rank correlation of predicted and measured over the checked hybrids; NaN with fewer than two."""
        return kendall_tau([one.predicted_ms for one in self.checks.values()],
                           [one.measured_ms for one in self.checks.values()])

    @property
    def quality(self) -> str:
        """A sentence on how far predictions hold."""
        if not self.checks:
            return "predictions of this table were not checked on whole hybrids"
        text = (f"predicted and measured differ by {100 * self.median_error:.1f} % in the median of {len(self.checks)} "
                f"hybrids, Kendall tau {self.kendall_tau:.2f}")
        return text + (": rough" if self.is_rough else "")

    @property
    def is_rough(self) -> bool:
        """Whether the median error exceeds `LARGEST_ERROR`."""
        return bool(self.median_error > LARGEST_ERROR)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def identity(self) -> str:
        """What a value was timed on: an archive keeps it, so that no two tables are mixed."""
        return f"{self.protocol}; {self.quality}; table {self.sha256[:16]}"


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Pairs in the same order minus pairs in the opposite one, over all pairs; NaN with fewer than two values."""
    if len(one) < 2:
        return math.nan
    above = np.triu_indices(len(one), 1)
    signs = [np.sign(np.subtract.outer(np.asarray(values), np.asarray(values)))[above] for values in (one, other)]
    return float((signs[0] * signs[1]).mean())


def table_path(folder: Path, objective: str) -> Path:
    """Where a run keeps the table of `latency_ms` (`local.json`) or `latency_ms@NAME`."""
    return folder / "latency" / f"{table_of(objective) or 'local'}.json"


def read_table(path: Path) -> LatencyTable:
    """Open a table; raises LatencyError for a file that is absent or none."""
    try:
        return LatencyTable.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LatencyError(f"there is no latency table {path}; `ens profile` makes one") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise LatencyError(f"{path} is no latency table ({' '.join(str(error).split())[:200]})") from None


def write_table(path: Path, table: LatencyTable) -> None:
    """Write a table whole."""
    write_atomic(path, (table.model_dump_json(indent=1) + "\n").encode())


def format_table(table: LatencyTable) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of texts: slot, choice, milliseconds, quartiles."""
    rows = [["", "everything else", f"{table.rest.ms:.2f}", _spread(table.rest)]]
    rows += [[slot, label, f"{entry.ms:.2f}", _spread(entry)]
             for slot, entries in table.slots.items() for label, entry in entries.items()]
    return ["slot", "choice", "ms", "quartiles"], rows


def _spread(entry: Entry) -> str:
    return "{:.2f}-{:.2f}".format(*entry.quartiles_ms)


def check_name(objective: str) -> None:
    """Raises LatencyError for a table's name that is no plain word: it becomes a file's."""
    if objective.startswith(f"{LATENCY}@") and not re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", table_of(objective)):
        raise LatencyError(f"{objective!r}: a table's name is letters, digits, dots and dashes, for instance "
                           f"{LATENCY}@phone")


def checked_genotypes(space: SearchSpace, count: int, seed: int) -> list[Genotype]:
    """Different random genotypes that a table is checked on, fewer where the space has fewer."""
    rng = np.random.default_rng(seed)
    found: dict[Genotype, None] = {}
    while len(found) < min(count, space.num_genotypes):
        found[space.sample(rng)] = None
    return list(found)

