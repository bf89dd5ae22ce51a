"""Times files in turn, in one run: what one takes beside another is then the same machine at the same moments."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ens.runtime.runner import time_in_turn
from ens.runtime.session import Session, open_session


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one file: the median, the two quartiles, and what the first file took over what this one took,
    round by round, as median and quartiles.
    """

    median_ms: float
    quartiles_ms: tuple[float, float]
    times_as_fast: float
    times_as_fast_quartiles: tuple[float, float]


def bench_files(files: Sequence[str | Path], *, height: int, width: int, threads: int | None = None,
                runtime: str = "", repeats: int = 15, on_round: Callable[[int], None] | None = None) -> list[Timing]:
    """Time one pass of every file (any that `open_session` takes, in the same runtime) over an image of noise.

    Raises ValueError for sides that some network does not take, and what `open_session` raises.
    """
    sessions = [open_session(file, threads=threads, runtime=runtime) for file in files]
    for file, session in zip(files, sessions, strict=True):
        if height % session.size_multiple or width % session.size_multiple:
            raise ValueError(f"{file} takes sides that are multiples of {session.size_multiple}, not {height}x{width}")
    spent = time_in_turn([_runner(session, height, width) for session in sessions], repeats=repeats, on_round=on_round)
    return [_summarise(times, spent[0]) for times in spent]


def _runner(session: Session, height: int, width: int) -> Callable[[], object]:
    image = torch.rand(1, session.channels, height, width, generator=torch.Generator().manual_seed(0))
    return lambda: session.run(image)


def _summarise(times: Sequence[float], first: Sequence[float]) -> Timing:
    ratios = [one / own for one, own in zip(first, times, strict=False)]
    return Timing(statistics.median(times), quartiles(times), statistics.median(ratios), quartiles(ratios))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single value, itself."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
