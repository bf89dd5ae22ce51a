"""Search spaces that are measured whole, from a CSV file: any engine replays a search on them in seconds."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ens.search import create_engine
from ens.search.predictor import Encoding
from ens.space import Choice, Genotype, SearchSpace, Slot, Tally, suggest

_ADDITIVE = 1e-6
"""Largest error, relative to the spread of a column, at which it counts as a sum over slots that is known."""


@dataclass(frozen=True)
class Table:
    """Values of every genotype of a space, all minimised; the first objective is what a search measures."""

    space: SearchSpace
    objectives: tuple[str, ...]
    rows: Mapping[Genotype, tuple[float, ...]]

    def values(self, genotypes: Sequence[Genotype]) -> NDArray[np.float64]:
        """(N, objectives); raises KeyError for a genotype that the table lacks."""
        return np.array([self.rows[genotype] for genotype in genotypes], np.float64).reshape(-1, len(self.objectives))

    @cached_property
    def costs(self) -> tuple[Tally | None, ...]:
        """By objective the numbers a choice that add up to it exactly; None where they do not, and for the first."""
        encoding = Encoding(self.space.sizes)
        genotypes = list(self.rows)
        x, values = encoding.encode(genotypes), self.values(genotypes)
        found: list[Tally | None] = [None]
        for column in values.T[1:]:
            weights = np.linalg.lstsq(x, column, rcond=None)[0]
            exact = np.abs(x @ weights - column).max() <= _ADDITIVE * (np.ptp(column) or 1.0)
            entries = tuple(tuple(weights[encoding.slots == slot].tolist()) for slot in range(len(encoding.sizes)))
            found.append(Tally(0.0, entries) if exact else None)
        return tuple(found)

    def replay(self, engine: str, *, budget: int, seed: int = 0, batch_size: int = 1,
               reference: Sequence[float] | None = None) -> list[Genotype]:
        """Genotypes in the order in which an engine measures them, `budget` at most; raises ValueError for its name."""
        subject = create_engine(engine, self.space, seed=seed, costs=self.costs, reference=reference)
        order: list[Genotype] = []
        while len(order) < budget:
            asked = subject.ask(min(batch_size, budget - len(order)))
            if not asked:
                break
            subject.tell(asked, self.values(asked))
            order += asked
        return order


def load_table(path: Path | str, objectives: Sequence[str]) -> Table:
    """Read a CSV file with a column `genotype` (`0-2-1`) and the columns named, of every genotype of its space.

    The first objective is what is measured, the others are costs. Raises ValueError saying what the file lacks.
    """
    if isinstance(objectives, str) or len(set(objectives)) < max(2, len(objectives)):
        raise ValueError(f"the objectives of a table are two columns or more, each once, not {objectives!r}")
    with Path(path).open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte order mark
        reader = csv.DictReader(file)
        lines, columns = list(reader), list(reader.fieldnames or ())
    if missing := [name for name in ("genotype", *objectives) if name not in columns]:
        raise ValueError(f"{path} has no column {missing[0]}{suggest(missing[0], columns)}; "
                         f"there are {', '.join(columns) or 'none'}")
    if not lines:
        raise ValueError(f"{path} holds no genotype")
    rows: dict[Genotype, tuple[float, ...]] = {}
    for number, line in enumerate(lines, 2):
        try:
            genotype = tuple(map(int, line["genotype"].split("-")))
            values = tuple(float(line[name] or "nothing") for name in objectives)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if rows.setdefault(genotype, values) != values:
            raise ValueError(f"{path}, line {number}: {line['genotype']} has other values than in a line before")
    sizes = [max(column) + 1 for column in zip(*rows, strict=False)]
    whole = len({len(genotype) for genotype in rows}) == 1 and len(rows) == math.prod(sizes)
    if not whole or not all(math.isfinite(value) for row in rows.values() for value in row):
        raise ValueError(f"{path} holds {len(rows)} genotypes, not every one of {math.prod(sizes)} with finite values")
    slots = tuple(Slot(f"slot{number}", (Choice("teacher", 1, teacher=True),
                                         *(Choice("surrogate", index) for index in range(1, size))))
                  for number, size in enumerate(sizes))
    return Table(SearchSpace(Path(path).stem, slots), tuple(objectives), rows)
