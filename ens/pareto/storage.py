"""Where an archive is: a SQLite file or the URL of a database server, its lock, and its name as it may be printed."""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout

from ens.pareto.trials import Trials
from ens.shortage import is_shortage

# SQLite's MAX_PATHNAME on Unix is 512 with the closing zero; its journal's name is 8 longer than the file's.
_LONGEST_PATH = 503

# What a study is read from; Optuna makes more.
_TABLES = {"studies", "study_user_attributes", "study_directions", "trials", "trial_user_attributes", "trial_params",
           "trial_values"}


class ArchiveLocked(RuntimeError):
    """Another process is writing to the archive."""


class ArchiveMismatch(ValueError):
    """The archive was recorded with another configuration than the one it is opened with."""


class ArchiveDamaged(ValueError):
    """A file that is no archive, or no longer; the message names it, the reason and what to do."""


class Storage:
    """The place of an archive: a file path, of which every character means itself, or an Optuna storage URL.

    `path` is the file, None for a database server; `url` is SQLAlchemy's; as text it is what may be printed, a URL
    without its password. Raises ValueError for what is no storage, or a path longer than SQLite takes.
    """

    def __init__(self, place: str | Path) -> None:
        self.path, self.url = _locate(place)
        self._printed = str(self.path or sqlalchemy.make_url(self.url).render_as_string(hide_password=True))

    def __str__(self) -> str:
        return self._printed

    def check(self) -> None:
        """Raises ValueError for a database that nothing here can write to; no connection is made."""
        try:
            sqlalchemy.create_engine(self.url).dispose()
        except sqlalchemy.exc.ArgumentError as error:
            raise ValueError(f"storage {self}: {reason_of(error)}") from None
        except ModuleNotFoundError as error:
            raise ValueError(f"storage {self} needs the Python package {error.name}, which is not installed") from None

    def lock(self) -> FileLock | None:
        """Keep other processes from writing to the file; None for a server, which takes any number of writers."""
        return None if self.path is None else acquire_lock(self.path)

    def has_tables(self) -> bool:
        """Whether it has the tables of an Optuna study; nothing is written. False for a file that is absent or empty,
        or where a process was killed while it made them; a server is not asked.

        Raises sqlite3.DatabaseError for another file, ValueError for a database of something else.
        """
        if self.path is None:
            return True
        if not self.path.is_file():
            return False
        with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=rw", uri=True)) as connection:
            names = {name for name, in connection.execute("select name from sqlite_master where type = 'table'")}
        if names and "studies" not in names:
            raise ValueError(f"it is a database of something else, with tables {', '.join(sorted(names)[:5])}")
        return names >= _TABLES

    def create_study(self, name: str, num_objectives: int) -> tuple[optuna.Study, Trials]:
        """The study of that name, a new one where there is none."""
        with self.opening():
            self.has_tables()  # raises for a database of something else, before Optuna adds its tables to it
            study = optuna.create_study(study_name=name, storage=self.url, load_if_exists=True,
                                        directions=["minimize"] * num_objectives)
            return study, Trials(self.url, name=name)

    def load_study(self, name: str) -> tuple[optuna.Study, Trials]:
        """The study of that name; raises FileNotFoundError where there is no file or study."""
        if self.path is not None and not self.path.is_file():
            raise FileNotFoundError(f"there is no archive at {self}")
        if not self.has_tables():  # Optuna would make them
            raise FileNotFoundError(f"{self} is empty: nothing was recorded in it yet; `ens search` goes on with it")
        try:
            # Optuna's check of its schema brings alembic, a quarter of a second; whoever opens to write has it.
            reading = optuna.storages.RDBStorage(self.url, skip_compatibility_check=True)
            return optuna.load_study(study_name=name, storage=reading), Trials(self.url, name=name)
        except KeyError:
            raise FileNotFoundError(f"{self} holds no study named {name!r}") from None

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Whatever a damaged or foreign database makes of Optuna, SQLAlchemy and the schemas, said in one way."""
        try:
            yield
        except (FileNotFoundError, ArchiveMismatch, ArchiveLocked, ArchiveDamaged):
            raise
        except Exception as error:
            if is_shortage(error):
                raise
            if "database is locked" in str(error):
                raise ArchiveLocked(f"{self} is being written by another process; wait") from None
            advice = "" if self.path is None else ". Put a copy of it back, or search again in another run folder"
            raise ArchiveDamaged(f"{self} cannot be opened as an archive: {reason_of(error)}{advice}") from error


def _locate(place: str | Path) -> tuple[Path | None, str]:
    """The file, None for a database server, and the URL."""
    if not isinstance(place, Path) and "://" in place:
        try:
            url = sqlalchemy.make_url(place)
        except sqlalchemy.exc.ArgumentError:
            raise ValueError(f"{place} is no storage; write for instance sqlite:///runs/archive.db or a database "
                             "server's URL, postgresql://user@host/name") from None
        if url.get_backend_name() != "sqlite":
            return None, place
        if not url.database:
            raise ValueError(f"{place} names no file; write for instance sqlite:///runs/archive.db")
        place = url.database
    path = Path(place).absolute()
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"SQLite takes paths of {_LONGEST_PATH} bytes at most; {path} has {len(os.fsencode(path))}")
    return path, sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


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


def reason_of(error: BaseException) -> str:
    """First line of what the database itself said."""
    cause = error.__cause__ or error
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
