"""The one place where the errors of runtimes become Python's: PyTorch's, ONNX Runtime's, those of formats to come.

Runtimes raise classes of their own, and their lack of memory in words only; nobody else need know either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ens.shortage import is_disk_error, is_memory_error


class RuntimeFailure(RuntimeError):
    """A runtime could not open or run a file; the message is its own class and first line."""


@contextmanager
def translating() -> Iterator[None]:
    """Around every call into a runtime: lack of memory or disk is raised as MemoryError or OSError, what only that
    runtime knows as RuntimeFailure. Python's own errors pass as they are.
    """
    try:
        yield
    except Exception as error:  # runtimes' errors share no public class
        raise_shortage(error)
        if type(error).__module__ == "builtins" or isinstance(error, ValueError | RuntimeError | OSError):
            raise
        raise RuntimeFailure(f"{type(error).__name__}: {first_line(error)}") from error


def raise_shortage(error: Exception) -> None:
    """Raise MemoryError or OSError where lack of memory or disk is behind an error, whatever was made of it."""
    if is_memory_error(error):
        raise MemoryError(first_line(error)) from error
    if is_disk_error(error) and not isinstance(error, OSError):
        raise OSError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
