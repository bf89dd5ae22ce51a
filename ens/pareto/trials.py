"""Trials of an Optuna study as rows of its database, in constant time each.

`study.add_trial` and `study.trials` send a query for every parameter and attribute of every trial, and count all
trials to number one. The tables are Optuna's file format; Optuna checks their version when it opens the study.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from typing import Any

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Column, DateTime, Enum, Float, Integer, String, Table

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


class Trials:
    """The trials of one study in the database at `url`; errors are SQLAlchemy's."""

    def __init__(self, url: str, *, name: str) -> None:
        self._engine = sqlalchemy.create_engine(url)
        with self._engine.connect() as connection:
            self._study_id: int = connection.execute(
                sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)).scalar_one()

    def __len__(self) -> int:
        count = sqlalchemy.select(sqlalchemy.func.count()).where(_TRIALS.c.study_id == self._study_id)
        with self._engine.connect() as connection:
            return int(connection.execute(count).scalar_one())

    def read(self) -> Iterator[tuple[TrialState, dict[str, Any]]]:
        """State and user attributes of every trial, in the order of recording."""
        query = (sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.state, _ATTRS.c.key, _ATTRS.c.value_json)
                 .join(_ATTRS, _ATTRS.c.trial_id == _TRIALS.c.trial_id)
                 .where(_TRIALS.c.study_id == self._study_id).order_by(_TRIALS.c.trial_id))
        found: dict[int, tuple[TrialState, dict[str, Any]]] = {}
        with self._engine.connect() as connection:
            for trial_id, state, key, value in connection.execute(query):
                found.setdefault(trial_id, (state, {}))[1][key] = json.loads(value)
        yield from found.values()

    def insert(self, trial: FrozenTrial) -> None:
        """Append a finished trial with finite values; it is on disk when this returns."""
        assert trial.state.is_finished() and all(map(math.isfinite, trial.values or ()))
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        with self._engine.begin() as connection:
            # A server has several writers: the lock keeps two of them from taking the same number. SQLite ignores it.
            connection.execute(sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == self._study_id)
                               .with_for_update())
            last = connection.execute(sqlalchemy.select(_TRIALS.c.number).where(_TRIALS.c.study_id == self._study_id)
                                      .order_by(_TRIALS.c.trial_id.desc()).limit(1)).scalar()
            key = connection.execute(_TRIALS.insert().values(
                number=0 if last is None else last + 1, study_id=self._study_id, state=trial.state,
                datetime_start=now, datetime_complete=now)).inserted_primary_key
            assert key is not None
            for table, rows in _rows(trial):
                if rows:
                    connection.execute(table.insert(), [{"trial_id": key[0], **row} for row in rows])

    def close(self) -> None:
        """Give all connections back."""
        self._engine.dispose()


def _rows(trial: FrozenTrial) -> list[tuple[Table, list[dict[str, Any]]]]:
    """What a trial is beside its row in `trials`, without its id."""
    return [
        (_VALUES, [{"objective": index, "value": value, "value_type": "FINITE"}
                   for index, value in enumerate(trial.values or ())]),
        (_PARAMS, [{"param_name": name, "param_value": trial.distributions[name].to_internal_repr(value),
                    "distribution_json": distribution_to_json(trial.distributions[name])}
                   for name, value in trial.params.items()]),
        (_ATTRS, [{"key": key, "value_json": json.dumps(value)} for key, value in trial.user_attrs.items()])]
