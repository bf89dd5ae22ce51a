"""Times files in turn, in one run: what one takes beside another is then the same machine at the same moments."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ens.runtime.session import Session, open_session

SLOW_MS = 2000.0
"""A run beyond this is no warm-up lost on allocation: it is timed at once, and only twice."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one file: the median, the two quartiles, and what the first file took over what this one took,
    round by round, as median and quartiles.
    """

    median_ms: float
    quartiles_ms: tuple[float, float]
    times_as_fast: float
    times_as_fast_quartiles: tuple[float, float]


def time_in_turn(runs: Sequence[Callable[[], object]], *, repeats: int,
                 on_round: Callable[[int], None] | None = None) -> list[list[float]]:
    """Milliseconds of every run, `repeats` each, all in turn; one more before them, which allocates, is not counted."""
    spent: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for run, times in zip(runs, spent, strict=True):
            if len(times) > 1 and times[0] > SLOW_MS:
                continue
            began = time.perf_counter()
            run()
            taken = 1000 * (time.perf_counter() - began)
            if number or taken > SLOW_MS:
                times.append(taken)
        if on_round is not None:
            on_round(number)
    return spent


def bench_files(files: Sequence[str | Path], *, height: int, width: int, threads: int | None = None,
                repeats: int = 15, on_round: Callable[[int], None] | None = None) -> list[Timing]:
    """Time one pass of every file (any that `open_session` takes) over an image of noise.

    Raises ValueError for sides that some network does not take, and what `open_session` raises.
    """
    sessions = [open_session(file, threads=threads) for file in files]
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


def describe_machine() -> dict[str, str]:
    """Device, processors and their load over the last minute: what stands beside a time."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {"device": _processor(), "processors": str(os.cpu_count()), "load": load}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, '') or platform.processor() or 'unknown'} ({platform.machine()})"
