"""The one way a file comes into being: a temporary name beside it, fsync, rename; readers see the old or the new."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"(\..+\.)[0-9a-f]{8}\.tmp")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    The file exists, empty, with the mode of the umask, and the folder is made. It is flushed to disk before it is
    renamed, and removed where the block raises. What a killed process left of the same file is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{path.name[:40]}."
    _remove_orphans(found for found in path.parent.iterdir() if _stem(found) == stem)
    temporary = path.with_name(f"{stem}{secrets.token_hex(4)}.tmp")
    # The kernel applies the umask to 0o666; mkstemp would make the file private.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with _held(handle):
            yield temporary
            _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a whole file: `path` holds what it held before, or all of `data`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `atomic_path` is writing, or that a killed process left behind."""
    return _stem(path) != ""


def _stem(path: Path) -> str:
    """What the temporary files of one path share; "" for any other file."""
    match = _TEMPORARY.fullmatch(path.name)
    return match[1] if match else ""


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder and below it; a file that is being written stays."""
    _remove_orphans(path for path in folder.rglob(".*.tmp") if is_temporary(path))


def _remove_orphans(paths: Iterable[Path]) -> None:
    found: list[Path] = []
    with suppress(OSError):  # a folder that may not be listed
        found += paths
    for path in found:
        with suppress(OSError):  # being written, gone meanwhile, or in a folder that is read-only
            handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                _lock(handle)
                path.unlink()
            finally:
                os.close(handle)


@contextmanager
def _held(handle: int) -> Iterator[None]:
    """Lock an open file until it is closed at the end, or by the death of the process: how `sweep` knows an orphan."""
    try:
        with suppress(OSError):  # a file system that knows no locks
            _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Raises OSError where another process holds the file. Windows needs none: it removes no file that is open."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
