"""Where an archive is: a SQLite file or the URL of a database server, its lock, and its name as it may be printed."""

from __future__ import annotations

import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy
from filelock import FileLock, Timeout


class ArchiveLocked(RuntimeError):
    """Another process is writing to the archive."""


class ArchiveDamaged(ValueError):
    """A file that is no archive, or no longer; the message names it, the reason and what to do."""

    def __init__(self, storage: str | Path, reason: str) -> None:
        advice = ("" if sqlite_path(storage) is None else
                  ". Put a copy of it back, or search again in another run folder")
        super().__init__(f"{printed_storage(storage)} cannot be opened as an archive: {reason}{advice}")


def check_storage(storage: str | Path) -> None:
    """Raises ValueError for a storage that nothing here can write to; no connection is made."""
    try:
        if sqlite_path(storage) is None:
            sqlalchemy.create_engine(storage_url(storage)).dispose()
        else:
            storage_url(storage)
    except sqlalchemy.exc.ArgumentError as error:
        raise ValueError(f"storage {printed_storage(storage)}: {reason_of(error)}") from None
    except ModuleNotFoundError as error:
        raise ValueError(f"storage {printed_storage(storage)} needs the Python package {error.name}, which is not "
                         "installed") from None


def holds_study_tables(path: Path) -> bool:
    """Whether a SQLite file has tables of an Optuna study; nothing is written. False where it is empty, or where a
    process was killed while it made them.

    Raises sqlite3.DatabaseError for another file, ValueError for a database of something else.
    """
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
        names = {name for name, in connection.execute("select name from sqlite_master where type = 'table'")}
    if names and "studies" not in names:
        raise ValueError(f"it is a database of something else, with tables {', '.join(sorted(names)[:5])}")
    return names >= _TABLES


# What a study is read from; Optuna makes more.
_TABLES = {"studies", "study_user_attributes", "study_directions", "trials", "trial_user_attributes", "trial_params",
           "trial_values"}


def storage_url(storage: str | Path) -> str:
    """SQLAlchemy URL of a storage: every character of a file path means itself, a URL stays what it is.

    Raises ValueError for a path longer than SQLite takes.
    """
    path = sqlite_path(storage)
    if path is None:
        return str(storage)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"SQLite takes paths of {_LONGEST_PATH} bytes at most; {path} has {len(os.fsencode(path))}")
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


# SQLite's MAX_PATHNAME on Unix is 512 with the closing zero; its journal's name is 8 longer than the file's.
_LONGEST_PATH = 503


def sqlite_path(storage: str | Path) -> Path | None:
    """File behind a path or a SQLite URL; None for a database server. Raises ValueError for a SQLite URL of no file."""
    if isinstance(storage, Path) or "://" not in storage:
        return Path(storage).absolute()
    try:
        url = sqlalchemy.make_url(storage)
    except sqlalchemy.exc.ArgumentError:
        raise ValueError(f"{storage} is no storage; write for instance sqlite:///runs/archive.db or a database "
                         "server's URL, postgresql://user@host/name") from None
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database:
        raise ValueError(f"{storage} names no file; write for instance sqlite:///runs/archive.db")
    return Path(url.database).absolute()


def acquire_lock(path: Path) -> FileLock:
    """Lock beside a file or folder, held until released or death of the process; its text says who holds it.

    Raises ArchiveLocked, naming the holder, where another process has it.
    """
    lock_path = path.with_name(path.name + ".lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = lock_path.read_text(encoding="utf-8").strip() or "another process"
        raise ArchiveLocked(f"{path} is being written by {holder}; wait for it or stop it") from None
    lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock


def printed_storage(storage: str | Path) -> str:
    """The storage as it may be printed: a database URL without its password."""
    path = sqlite_path(storage)
    return sqlalchemy.make_url(str(storage)).render_as_string(hide_password=True) if path is None else str(path)


def reason_of(error: BaseException) -> str:
    """First line of what the database itself said."""
    cause = error.__cause__ or error
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
