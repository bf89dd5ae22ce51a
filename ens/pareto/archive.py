"""Every measurement ever made, as an Optuna study: a SQLite file by default, or any Optuna storage URL.

One trial a measurement: parameters = slot name -> choice label, values = objectives, state FAIL where the measurement
is invalid. optuna-dashboard opens the file as it is. A search resumes by replaying `measurements()`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from ens.space import Genotype, Measurement, SearchSpace, format_genotype

# Optuna logs every new study at INFO to stderr, where progress bars live.
optuna.logging.set_verbosity(optuna.logging.WARNING)

_MANIFEST = "ens"
_UNUSABLE = "ens:unusable"
"""Key of the study attribute that holds what must match when a run is resumed."""


class ArchiveMismatch(ValueError):
    """The archive was recorded with another configuration than the one it is opened with."""


class ArchiveLocked(RuntimeError):
    """Another process is writing to the archive."""


class Archive:
    """Measurements of one run in the order of recording; made by open_archive (writing) or read_archive."""

    def __init__(self, study: optuna.Study, *, manifest: Mapping[str, Any], lock: FileLock | None,
                 writable: bool) -> None:
        self.manifest = dict(manifest)
        self._study = study
        self._lock = lock
        self._writable = writable
        self._known: dict[Genotype, Measurement] = {}
        for trial in study.get_trials(deepcopy=False):
            # Two machines that share a database may both have measured a genotype: the first trial counts.
            if "genotype" in trial.user_attrs:
                measurement = _from_trial(trial)
                self._known.setdefault(measurement.genotype, measurement)
        for genotype, measurement in self._known.items():
            if reason := study.user_attrs.get(_UNUSABLE, {}).get(format_genotype(genotype)):
                self._known[genotype] = dataclasses.replace(measurement, valid=False, note=reason)

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.manifest["objectives"])

    @property
    def slots(self) -> dict[str, list[str]]:
        """Choice labels of every slot, in slot order."""
        return dict(self.manifest["slots"])

    def measurements(self) -> list[Measurement]:
        """All measurements, invalid ones included, in the order of recording."""
        return list(self._known.values())

    def known(self) -> dict[Genotype, Measurement]:
        """The same by genotype, in the order of recording."""
        return dict(self._known)

    def record(self, measurement: Measurement) -> None:
        """Store a measurement; it is on disk when this returns.

        Raises ValueError for a genotype that was recorded before or a valid measurement without finite objectives,
        RuntimeError on an archive opened for reading, OSError when the disk is full or read-only.
        """
        if not self._writable:
            raise RuntimeError("the archive was opened for reading; open it with open_archive to record")
        if measurement.genotype in self._known:
            raise ValueError(f"genotype {format_genotype(measurement.genotype)} was recorded before")
        trial = _to_trial(measurement, slots=self.slots, objectives=self.objectives,
                          engine=str(self.manifest.get("engine", "")))
        try:
            self._study.add_trial(trial)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise OSError(f"measurement {format_genotype(measurement.genotype)} could not be stored: "
                          f"{_reason(error)}") from error
        self._known[measurement.genotype] = measurement

    def close(self) -> None:
        """Let the next writer in; also done by leaving a `with` block."""
        self._writable = False
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def open_archive(storage: str | Path, *, space: SearchSpace, objectives: Sequence[str],
                 manifest: Mapping[str, Any], name: str = "ens") -> Archive:
    """Create an archive, or open it to go on recording.

    `storage` is a file path or an Optuna storage URL, `name` the study in it. `manifest` holds, as JSON values, what
    else must be the same when a run is resumed (seed, engine, protocol, hashes); objectives, slots and penalties are
    added here. A database server takes any number of writers. Raises ArchiveMismatch naming the differences,
    ArchiveLocked naming the process that writes to the same SQLite file, ValueError for a file that is no archive.
    """
    stored = json.loads(json.dumps({
        **manifest, "objectives": list(objectives), "slot_order": [slot.name for slot in space.slots],
        "slots": {slot.name: [choice.label for choice in slot.choices] for slot in space.slots},
        "penalty": {"teacher": space.penalty_teacher, "per_block": space.penalty_per_block}}))
    path = _sqlite_path(storage)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = None if path is None else acquire_lock(path)
    try:
        study = _load(storage, name=name, num_objectives=len(objectives))
        found = study.user_attrs.get(_MANIFEST)
        if found is None:
            if study.get_trials(deepcopy=False):
                raise ArchiveMismatch(f"study {name!r} in {_printed(storage)} was not recorded by ens")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(objectives))
            study.set_user_attr(_MANIFEST, stored)
        elif found != stored:
            raise ArchiveMismatch(f"{_printed(storage)} was recorded with another configuration: "
                                  f"{'; '.join(_differences(found, stored))}")
        return Archive(study, manifest=stored, lock=lock, writable=True)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def read_archive(storage: str | Path, *, name: str = "ens") -> Archive:
    """Open an archive for reading, also while a search writes to it.

    Raises FileNotFoundError where there is no file, ValueError for a file that is no archive of ens.
    """
    path = _sqlite_path(storage)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"there is no archive at {path}")
    study = _load(storage, name=name, num_objectives=None)
    if _MANIFEST not in study.user_attrs:
        raise ValueError(f"study {name!r} in {_printed(storage)} was not recorded by ens")
    return Archive(study, manifest=study.user_attrs[_MANIFEST], lock=None, writable=False)


def mark_invalid(storage: str | Path, genotype: Genotype, reason: str, *, name: str = "ens") -> None:
    """Take a genotype off the front for good, for instance because its hybrid cannot be exported; it stays visible."""
    study = _load(storage, name=name, num_objectives=None)
    study.set_user_attr(_UNUSABLE, {**study.user_attrs.get(_UNUSABLE, {}), format_genotype(genotype): reason})


def _load(storage: str | Path, *, name: str, num_objectives: int | None) -> optuna.Study:
    """The study of that name; created when `num_objectives` is given and it does not exist."""
    path = _sqlite_path(storage)
    url = str(storage) if path is None else f"sqlite:///{path}"
    try:
        if num_objectives is None:
            return optuna.load_study(study_name=name, storage=url)
        return optuna.create_study(study_name=name, storage=url, load_if_exists=True,
                                   directions=["minimize"] * num_objectives)
    except KeyError:
        raise ValueError(f"{_printed(storage)} holds no study named {name!r}") from None
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        raise ValueError(f"{_printed(storage)} cannot be opened as an archive: {_reason(error)}") from error


def _to_trial(measurement: Measurement, *, slots: Mapping[str, Sequence[str]], objectives: Sequence[str],
              engine: str) -> FrozenTrial:
    if len(measurement.genotype) != len(slots):
        raise ValueError(f"a genotype of this archive has {len(slots)} entries, got {len(measurement.genotype)}")
    labels = {slot: choices[index]
              for (slot, choices), index in zip(slots.items(), measurement.genotype, strict=True)}
    values = [measurement.values.get(name, math.nan) for name in objectives]
    if measurement.valid and not all(map(math.isfinite, values)):
        raise ValueError(f"a valid measurement needs finite {', '.join(objectives)}, got {values}")
    distributions: dict[str, BaseDistribution] = {slot: CategoricalDistribution(tuple(choices))
                                                  for slot, choices in slots.items()}
    return optuna.create_trial(
        state=TrialState.COMPLETE if measurement.valid else TrialState.FAIL,
        values=values if measurement.valid else None, params=labels, distributions=distributions,
        user_attrs={"genotype": format_genotype(measurement.genotype), "engine": engine, "note": measurement.note,
                    "psnr_db": _to_json(measurement.psnr_db),
                    "values": dict(zip(measurement.values, _to_json(measurement.values.values()), strict=True))})


def _from_trial(trial: FrozenTrial) -> Measurement:
    stored = trial.user_attrs
    return Measurement(genotype=tuple(int(index) for index in stored["genotype"].split("-")),
                       values={name: float(value) for name, value in stored["values"].items()},
                       psnr_db=tuple(float(value) for value in stored["psnr_db"]),
                       valid=trial.state == TrialState.COMPLETE, note=stored["note"])


def _to_json(numbers: Iterable[float]) -> list[float | str]:
    """NaN and infinities as text: they are not JSON, and the dashboard's parser would reject the whole study."""
    return [float(number) if math.isfinite(number) else str(float(number)) for number in numbers]


def _sqlite_path(storage: str | Path) -> Path | None:
    """File behind a path or a sqlite URL; None for a database server."""
    text = str(storage)
    if text.startswith("sqlite:///"):
        return Path(text.removeprefix("sqlite:///")).absolute()
    return None if "://" in text else Path(text).absolute()


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
        raise ArchiveLocked(f"{path} is being written by {lock_path.read_text().strip() or 'another process'}; "
                            "wait for it or stop it") from None
    lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    return lock


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One clause for every key whose value differs, nested keys with dots."""
    clauses = []
    for key in [*was, *(key for key in now if key not in was)]:
        old, new = was.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            clauses += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            clauses.append(f"{prefix}{key} was {json.dumps(old, ensure_ascii=False)}, "
                           f"is now {json.dumps(new, ensure_ascii=False)}")
    return clauses


def _printed(storage: str | Path) -> str:
    """The storage as it may be printed: a database URL without its password."""
    path = _sqlite_path(storage)
    return sqlalchemy.make_url(str(storage)).render_as_string(hide_password=True) if path is None else str(path)


def _reason(error: BaseException) -> str:
    """Last line that the database itself said."""
    cause = error.__cause__ or error
    return str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
