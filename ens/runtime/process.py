"""How a process behaves: what a verb reports to, the signals that stop it, its memory, the exit code of an error."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from ens.shortage import is_disk_error, is_memory_error

if TYPE_CHECKING:
    from ens.distill.fit import Progress

EXIT_FAILED, EXIT_DISK = 1, 74


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free instead of returning every page to the kernel and faulting it in again.

    Large activations are otherwise mapped afresh for each operator: Restormer's forward on a 480×320 photo took 2.5
    times as long. Other C libraries have no mallopt and need none. Under a limit (`ulimit -v`, `-d`) nothing is kept:
    large arrays would find only pieces of what is free.
    """
    if sys.platform == "linux" and _is_memory_limited():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def _is_memory_limited() -> bool:
    import resource  # Unix only

    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
               for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))


class Interrupted(RuntimeError):
    """The user stopped the work; all state is on disk and the same command continues it."""


@dataclass(frozen=True)
class Control:
    """What every verb reports to and asks: `progress(verb, done, total, note)`, `say(line)`, `should_stop()`."""

    progress: Callable[[str, int, int, str], None] = lambda verb, done, total, note: None
    say: Callable[[str], None] = lambda line: None
    should_stop: Callable[[], bool] = lambda: False

    def step(self, verb: str, done: int, total: int, note: str = "genotypes") -> None:
        """Report a genotype that was measured; raises Interrupted where the user asked to stop."""
        self.progress(verb, done, total, note)
        if self.should_stop() and done < total:
            raise Interrupted(verb)

    def require(self, complete: bool, verb: str) -> None:
        """Raises Interrupted where a training was stopped before its end."""
        if not complete:
            raise Interrupted(verb)

    def follow(self, verb: str) -> Callable[[Progress], None]:
        """What a training reports its steps to."""
        return lambda now: self.progress(verb, now.step, now.steps, f"loss {now.loss:.4f}" + (
            f", {now.skipped} skipped" if now.skipped else ""))


QUIET = Control()


class StopNow(BaseException):
    """A second signal, or a first one where nothing can be finished; no `except Exception` holds it up."""


class Stop:
    """What SIGINT and SIGTERM set: the first asks the verb to finish its step, the second ends it.

    `code` is the exit code of the signal that came, 0 before one.
    """

    def __init__(self) -> None:
        self.code = 0
        self._polled = False

    def listen(self) -> None:
        """Take both signals from now on."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def is_set(self) -> bool:
        """Whether to finish; whoever asks promises to ask again after every step."""
        self._polled = True
        return self.code != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.code = self.code != 0, 128 + number
        if again or not self._polled:
            raise StopNow
        sys.stderr.write("Stopping after this step; once more stops at once.\n")


def format_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `26 hours` or `11 days`."""
    for unit, name, most in ((1.0, "s", 90), (60.0, "min", 90), (3600.0, "hours", 48)):
        if seconds < most * unit:
            return f"{max(1, round(seconds / unit))} {name}"
    return f"{round(seconds / 86400):,} days"


def describe_error(error: Exception, command: str) -> tuple[str, int]:
    """One sentence for whatever went wrong, and the exit code; `command` is what continues the work."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if is_disk_error(error):
        return (f"the disk is full, read-only or closed to you ({text}); what is done is kept. Make room or give way, "
                f"then: {command}", EXIT_DISK)
    if is_memory_error(error):
        text = text or type(error).__name__
        return f"memory ran out ({text}); what is done is kept. To continue: {command}", EXIT_FAILED
    if not isinstance(error, ValueError | KeyError | RuntimeError | OSError | ImportError):
        text = f"unexpected {type(error).__name__}: {text}; ENS_TRACEBACK=1 shows where, please report it"
    return text, EXIT_FAILED
