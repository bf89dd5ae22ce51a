"""Trials of an Optuna study as rows of its database, in constant time each, and who measures the next ones.

`study.add_trial` and `study.trials` send a query for every parameter and attribute of every trial, and count all
trials to number one. The tables are Optuna's file format; Optuna checks their version when it opens the study.
"""

from __future__ import annotations

import datetime
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Column, Connection, DateTime, Enum, Float, Integer, String, Table

from ens.shortage import is_disk_error

_META = sqlalchemy.MetaData()
_STUDIES = Table("studies", _META, Column("study_id", Integer, primary_key=True), Column("study_name", String))
_TRIALS = Table("trials", _META, Column("trial_id", Integer, primary_key=True), Column("number", Integer),
                Column("study_id", Integer), Column("state", Enum(TrialState)), Column("datetime_start", DateTime),
                Column("datetime_complete", DateTime))
_PARAMS = Table("trial_params", _META, Column("param_id", Integer, primary_key=True), Column("trial_id", Integer),
                Column("param_name", String), Column("param_value", Float), Column("distribution_json", String))
_VALUES = Table("trial_values", _META, Column("trial_value_id", Integer, primary_key=True),
                Column("trial_id", Integer), Column("objective", Integer), Column("value", Float),
                Column("value_type", Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")))
_ATTRS = Table("trial_user_attributes", _META, Column("trial_user_attribute_id", Integer, primary_key=True),
               Column("trial_id", Integer), Column("key", String), Column("value_json", String))

# A file that others write to is waited for so long; a server that does not answer is asked again after these seconds.
_FILE_WAIT_S = 60
SERVER_WAITS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_T = TypeVar("_T")


def connect_engine(url: str) -> sqlalchemy.Engine:
    """SQLAlchemy's engine of a database: connections to a server are closed after use, so that hundreds of workers
    stay within what it allows.
    """
    if sqlalchemy.make_url(url).get_backend_name() == "sqlite":
        return sqlalchemy.create_engine(url, pool_size=1, max_overflow=0, connect_args={"timeout": _FILE_WAIT_S})
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)


class Trials:
    """The trials of one study in the database at `url`; errors are SQLAlchemy's. Threads may share it."""

    def __init__(self, url: str, *, name: str) -> None:
        self._engine = connect_engine(url)
        self._one_by_one = threading.Lock()
        with self._engine.connect() as connection:
            self.study_id: int = connection.execute(
                sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)).scalar_one()

    @property
    def is_file(self) -> bool:
        """Whether the database is a file, and every worker on this machine."""
        return self._engine.dialect.name == "sqlite"

    def look(self, work: Callable[[Connection], _T]) -> _T:
        """`work`, which only reads, in a transaction. It is done again, from its beginning, where a server is gone for
        a moment or has no connection free.
        """
        for wait_s in SERVER_WAITS_S:
            try:
                return self._run(work)
            except sqlalchemy.exc.OperationalError as error:
                if self.is_file or is_disk_error(error):
                    raise
            time.sleep(wait_s)
        return self._run(work)

    def _run(self, work: Callable[[Connection], _T]) -> _T:
        with self._one_by_one, self._engine.begin() as connection:
            return work(connection)

    def change(self, work: Callable[[Connection], _T]) -> _T:
        """`look` for what writes: no other worker's transaction overlaps, and all is on disk when this returns."""
        def locked(connection: Connection) -> _T:
            # Changes nothing, and locks: the row of the study on a server, the file in SQLite, where a transaction
            # that begins with reading could not go on to write.
            connection.execute(_STUDIES.update().values(study_name=_STUDIES.c.study_name)
                               .where(_STUDIES.c.study_id == self.study_id))
            return work(connection)
        return self.look(locked)

    def __len__(self) -> int:
        count = sqlalchemy.select(sqlalchemy.func.count()).where(_TRIALS.c.study_id == self.study_id)
        return self.look(lambda connection: int(connection.execute(count).scalar_one()))

    def read(self, connection: Connection, *, after: int = -1) -> Iterator[tuple[int, TrialState, dict[str, Any]]]:
        """Id, state and user attributes of every trial with a larger id than `after`, in the order of recording."""
        query = (sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.state, _ATTRS.c.key, _ATTRS.c.value_json)
                 .outerjoin(_ATTRS, _ATTRS.c.trial_id == _TRIALS.c.trial_id)
                 .where(_TRIALS.c.study_id == self.study_id, _TRIALS.c.trial_id > after).order_by(_TRIALS.c.trial_id))
        found: dict[int, tuple[int, TrialState, dict[str, Any]]] = {}
        for trial_id, state, key, value in connection.execute(query):
            attributes = found.setdefault(trial_id, (trial_id, state, {}))[2]
            if key is not None:
                attributes[key] = json.loads(value)
        yield from found.values()

    def insert(self, connection: Connection, trial: FrozenTrial, *, started_s: float | None = None) -> int:
        """Append a finished trial with finite values that began at `started_s` of `read_clock`, now unless given;
        returns its id.
        """
        assert trial.state.is_finished() and all(map(math.isfinite, trial.values or ()))
        ended_s = read_clock(connection)
        start, end = (datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None)
                      for seconds in (ended_s if started_s is None else started_s, ended_s))
        last = connection.execute(sqlalchemy.select(_TRIALS.c.number).where(_TRIALS.c.study_id == self.study_id)
                                  .order_by(_TRIALS.c.trial_id.desc()).limit(1)).scalar()
        key = connection.execute(_TRIALS.insert().values(
            number=0 if last is None else last + 1, study_id=self.study_id, state=trial.state,
            datetime_start=start, datetime_complete=end)).inserted_primary_key
        assert key is not None
        for table, rows in _rows(trial):
            if rows:
                connection.execute(table.insert(), [{"trial_id": key[0], **row} for row in rows])
        return int(key[0])

    def close(self) -> None:
        """Give all connections back."""
        self._engine.dispose()


def read_clock(connection: Connection) -> float:
    """Seconds since 1970 by the clock that all workers share: the server's, or this machine's for a file."""
    if connection.dialect.name == "sqlite":
        return time.time()
    now: datetime.datetime = connection.execute(sqlalchemy.select(sqlalchemy.func.current_timestamp())).scalar_one()
    return (now if now.tzinfo else now.replace(tzinfo=datetime.UTC)).timestamp()


def _rows(trial: FrozenTrial) -> list[tuple[Table, list[dict[str, Any]]]]:
    """What a trial is beside its row in `trials`, without its id."""
    return [
        (_VALUES, [{"objective": index, "value": value, "value_type": "FINITE"}
                   for index, value in enumerate(trial.values or ())]),
        (_PARAMS, [{"param_name": name, "param_value": trial.distributions[name].to_internal_repr(value),
                    "distribution_json": distribution_to_json(trial.distributions[name])}
                   for name, value in trial.params.items()]),
        (_ATTRS, [{"key": key, "value_json": json.dumps(value)} for key, value in trial.user_attrs.items()])]
