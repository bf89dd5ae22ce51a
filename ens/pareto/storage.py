"""Where an archive is: a SQLite file or the URL of a database server, its lock, and its name as it may be printed."""

from __future__ import annotations

import os
import random
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout

from ens.pareto.claims import create_tables
from ens.pareto.trials import Trials, connect_engine
from ens.shortage import is_shortage

# SQLite's MAX_PATHNAME on Unix is 512 with the closing zero; its journal's name is 8 longer than the file's.
_LONGEST_PATH = 503
# Making the tables takes a second; hundreds of workers that start together wait for one another.
_OPENING_S = 120
# What PostgreSQL says where all connections are taken.
_CROWDED = ("too many clients", "remaining connection slots")

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
        """Raises ValueError for a database that nothing here can write to, or a server that does not answer."""
        try:
            engine = connect_engine(self.url)
            if self.path is None:
                engine.connect().close()
        except sqlalchemy.exc.ArgumentError as error:
            raise ValueError(f"storage {self}: {reason_of(error)}") from None
        except ModuleNotFoundError as error:
            raise ValueError(f"storage {self} needs the Python package {error.name}, which is not installed") from None
        except sqlalchemy.exc.OperationalError as error:
            if not is_crowded(error):
                raise ValueError(f"storage {self} cannot be reached: {reason_of(error)}") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time: workers that start together make the tables and the study once. Of servers only
        PostgreSQL sees to that; in another, start the first worker before the others.
        """
        if self.path is not None:
            with acquire_lock(self.path, wait_s=_OPENING_S):
                yield
        elif sqlalchemy.make_url(self.url).get_backend_name() == "postgresql":
            with self._lock_server():
                yield
        else:
            yield

    def _lock_server(self) -> sqlalchemy.Connection:
        """A connection that holds the lock while it is open; who waits for it holds none."""
        engine, lock = connect_engine(self.url), sqlalchemy.text("select pg_try_advisory_lock(hashtext('ens'))")
        last = time.monotonic() + _OPENING_S
        while time.monotonic() < last:
            connection = engine.connect()
            if connection.execute(lock).scalar_one():
                return connection
            connection.close()
            time.sleep(random.uniform(0.02, 0.2))
        raise ArchiveLocked(f"{self} has been opened by others for {_OPENING_S} seconds; start again, fewer at a time")

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
        self.has_tables()  # raises for a database of something else, before Optuna adds its tables to it
        storage = self._connect_optuna()
        study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True,
                                    directions=["minimize"] * num_objectives)
        create_tables(storage.engine)
        return study, Trials(self.url, name=name)

    def _connect_optuna(self, *, check: bool = True) -> optuna.storages.RDBStorage:
        """Optuna's storage, whose connections are closed after use."""
        return optuna.storages.RDBStorage(self.url, engine_kwargs={"poolclass": sqlalchemy.NullPool},
                                          skip_compatibility_check=not check)

    def load_study(self, name: str) -> tuple[optuna.Study, Trials]:
        """The study of that name; raises FileNotFoundError where there is no file or study."""
        if self.path is not None and not self.path.is_file():
            raise FileNotFoundError(f"there is no archive at {self}: nothing was searched yet, `ens search` begins one")
        if not self.has_tables():  # Optuna would make them
            raise FileNotFoundError(f"{self} is empty: nothing was recorded in it yet; `ens search` goes on with it")
        try:
            # Optuna's check of its schema brings alembic, a quarter of a second; whoever opens to write has it.
            study = optuna.load_study(study_name=name, storage=self._connect_optuna(check=False))
            return study, Trials(self.url, name=name)
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


def acquire_lock(path: Path, *, wait_s: float = 0, on_wait: Callable[[str], None] = lambda holder: None) -> FileLock:
    """Lock beside a file or folder, held until released or death of the process; its text says who holds it.

    `on_wait` hears who that is where it is waited for. Raises ArchiveLocked, naming the holder, after `wait_s`.
    """
    lock_path = path.with_name(path.name + ".lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path, timeout=0)

    def read_holder() -> str:
        return lock_path.read_text(encoding="utf-8").strip() or "another process"

    try:
        try:
            lock.acquire()
        except Timeout:
            on_wait(read_holder())
            lock.acquire(timeout=wait_s)
    except Timeout:
        holder = read_holder()
        raise ArchiveLocked(f"{path} is being written by {holder}; wait for it or stop it") from None
    lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock


def is_crowded(error: BaseException | None) -> bool:
    """Whether a server refused a connection because others have all there are."""
    return error is not None and (any(words in str(error) for words in _CROWDED) or is_crowded(error.__cause__))


def reason_of(error: BaseException) -> str:
    """First line of what the database itself said."""
    cause = error.__cause__ or error
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
