"""The one search loop: it owns the budget, the duplicates, the resume, and what several workers share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from ens.objectives import find_objectives, objective_values
from ens.search import Engine
from ens.space import Genotype, Measurement

_LONGEST_WAIT_S = 2.0
"""Between two looks at what the other workers have measured."""


class Board(Protocol):
    """What the workers of one search share; `pareto.archive.Archive` is one."""

    @property
    def pending(self) -> Sequence[Genotype]:
        """What other workers measure now."""
        ...

    @property
    def lost(self) -> Sequence[Genotype]:
        """What workers measured when they died, and nobody has taken over."""
        ...

    @property
    def workers(self) -> int:
        """How many are at work, this one included."""
        ...

    def look(self) -> list[Measurement]:
        """What became known since the last `look` or `record`, in the order of recording; all there is at first."""
        ...

    def claim(self, wanted: Sequence[Genotype], *, budget: int) -> list[Genotype]:
        """Those of `wanted` that this worker is to measure; no other will, and together they keep to `budget`."""
        ...

    def record(self, measurement: Measurement) -> list[Measurement]:
        """Make a measurement durable; returns what `look` would."""
        ...


def run_search(*, engine: Engine, objectives: Sequence[str], known: Mapping[Genotype, Measurement],
               evaluate: Callable[[list[Genotype]], Iterable[Measurement]], record: Callable[[Measurement], object],
               budget: int, batch_size: int = 1, patience: int = 0,
               progress: Callable[[int, int], None] | None = None) -> list[Measurement]:
    """`share_search` of one worker alone: `known` is the archive in the order of recording, `record` makes each
    measurement durable as it comes.
    """
    return share_search(engine=engine, objectives=objectives, board=_Alone(known, record), evaluate=evaluate,
                        budget=budget, batch_size=batch_size, patience=patience, progress=progress)


def share_search(*, engine: Engine, objectives: Sequence[str], board: Board,
                 evaluate: Callable[[list[Genotype]], Iterable[Measurement]], budget: int, batch_size: int = 1,
                 patience: int = 0, deterministic: bool = False, workers: int = 1,
                 allows: Callable[[Genotype], bool] = lambda genotype: True,
                 progress: Callable[[int, int], None] | None = None) -> list[Measurement]:
    """Measure until `budget` genotypes are known, those on the board included; return all in the order of recording.

    `engine` is fresh. `evaluate` gets genotypes in lexicographic order (neighbours share prefixes) and returns or
    yields one measurement for each; `progress(done, budget)` follows. No genotype is evaluated twice. Ends early when
    the space is exhausted, or when the front has not grown for `patience` evaluations (0: never mind).

    A worker that is alone tells the engine whole batches: what a kill interrupted is asked for again and only its
    missing part evaluated, so that it ends as if it had run through. Beside others it tells whatever is known and asks
    for what is not pending: nobody waits, and what is asked for depends on who is faster; what a dead worker was at is
    measured first, unless the space no longer `allows` it. With `deterministic` all
    share one batch and wait for its end: any number of workers measures the same. `workers` are there at least, some
    of them not on the board yet. Raises ValueError for a budget or
    batch below one, RuntimeError when `evaluate` returns other genotypes than it was given.
    """
    find_objectives(objectives)
    if budget < 1 or batch_size < 1:
        raise ValueError(f"budget and batch size must be at least 1, got {budget} and {batch_size}")
    told = _Told(engine, objectives, batch_size)
    told.add(board.look())
    waited = 0
    while True:
        together = deterministic or not board.pending
        told.tell(all_known=not together)
        if len(told.order) >= budget or (patience and told.idle >= patience):
            return told.order
        sharing, batch = max(workers, board.workers), told.next_batch(budget) if together else []
        lost = [] if deterministic else [one for one in board.lost if allows(one) and not told.is_asked(one)]
        n = min(batch_size, _share(budget - len(told.order) - len(board.pending), sharing))
        wanted = lost or (batch if together else engine.ask(n, board.pending) if n > 0 else [])
        free = sorted(set(wanted).difference(board.pending))
        mine = board.claim(free[:_share(len(wanted), sharing) if together else n], budget=budget) if free else []
        for measurement in _measure(evaluate, mine):
            told.add(board.record(measurement) if measurement.genotype not in told.known else ())
            if progress is not None:
                progress(len(told.order), budget)
        if mine:
            waited = 0
        elif not wanted and not board.pending:
            return told.order
        else:
            waited = _wait(waited)
            if progress is not None:
                progress(len(told.order), budget)
        told.add(board.look())


def _share(missing: int, workers: int) -> int:
    """How many of `missing` genotypes a worker takes at once: few towards the end, so that all end together."""
    return missing if workers == 1 else math.ceil(missing / (2 * workers))


def _wait(turn: int) -> int:
    """Sleep, longer from turn to turn; returns the next one."""
    time.sleep(min(0.02 * 1.5 ** turn, _LONGEST_WAIT_S))
    return turn + 1


class _Alone:
    """The board of a worker that shares with nobody."""

    def __init__(self, known: Mapping[Genotype, Measurement], record: Callable[[Measurement], object]) -> None:
        self.pending: Sequence[Genotype] = ()
        self.lost: Sequence[Genotype] = ()
        self.workers = 1
        self._new = list(known.values())
        self._record = record

    def look(self) -> list[Measurement]:
        new, self._new = self._new, []
        return new

    def claim(self, wanted: Sequence[Genotype], *, budget: int) -> list[Genotype]:
        return list(wanted)

    def record(self, measurement: Measurement) -> list[Measurement]:
        self._record(measurement)
        return [measurement]


class _Told:
    """All that is known, in the order of recording, and what the engine was told of it."""

    def __init__(self, engine: Engine, objectives: Sequence[str], batch_size: int) -> None:
        self._engine = engine
        self._objectives = objectives
        self._batch_size = batch_size
        self.order: list[Measurement] = []
        self.known: set[Genotype] = set()
        self._told = 0
        self._asked: tuple[int, list[Genotype]] = (-1, [])
        self._front = np.empty((0, len(objectives)))
        self.idle = 0
        """Evaluations told since the front grew, and with it the hypervolume for any reference beyond all of them."""

    def add(self, measurements: Iterable[Measurement]) -> None:
        """Append what became known."""
        for measurement in measurements:
            self.order.append(measurement)
            self.known.add(measurement.genotype)

    def tell(self, *, all_known: bool) -> None:
        """Tell the engine whole batches, or all that is known."""
        while self._told + self._batch_size <= len(self.order):
            self._tell(self._batch_size)
        if all_known and self._told < len(self.order):
            self._tell(len(self.order) - self._told)

    def next_batch(self, budget: int) -> list[Genotype]:
        """What is missing of the batch that the engine asks for after what it was told."""
        if self._asked[0] != self._told:
            self._asked = (self._told, self._engine.ask(self._batch_size))
        # Never past a multiple of batch_size: what an engine was told when it asked then follows from the length of
        # the archive alone, whatever was interrupted or put there by hand.
        missing = min(budget, self._told + self._batch_size) - len(self.order)
        return [genotype for genotype in self._asked[1] if genotype not in self.known][:missing]

    def is_asked(self, genotype: Genotype) -> bool:
        """Whether it is known, or part of the batch that was asked for after what was told."""
        return genotype in self.known or (self._asked[0] == self._told and genotype in self._asked[1])

    def _tell(self, count: int) -> None:
        """Tell in lexicographic order, so that the order in which a batch was finished changes nothing."""
        batch = sorted(self.order[self._told:self._told + count], key=lambda measurement: measurement.genotype)
        values = objective_values(batch, self._objectives)
        self._engine.tell([measurement.genotype for measurement in batch], values)
        self._told += count
        for row in values:
            self.idle += 1
            if not np.isnan(row).any() and not (self._front <= row).all(axis=1).any():
                self._front = np.vstack([self._front[~(row <= self._front).all(axis=1)], row])
                self.idle = 0


def _measure(evaluate: Callable[[list[Genotype]], Iterable[Measurement]],
             batch: list[Genotype]) -> Iterator[Measurement]:
    """One measurement for each genotype of the batch, as it comes; RuntimeError for others, repeats and missing."""
    if not batch:
        return
    waiting = set(batch)
    for measurement in evaluate(batch):
        if measurement.genotype not in waiting:
            raise RuntimeError(f"the evaluator returned {measurement.genotype}, which it was not asked for")
        waiting.remove(measurement.genotype)
        yield measurement
    if waiting:
        raise RuntimeError(f"the evaluator returned no measurement of {sorted(waiting)[0]}")
