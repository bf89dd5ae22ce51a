"""Every measurement ever made, as an Optuna study: a SQLite file by default, or any Optuna storage URL.

One trial a measurement: parameters = slot name -> choice label, values = objectives, state FAIL where the measurement
is invalid, from when it was claimed to when it was recorded. optuna-dashboard opens the file as it is. A search resumes
by replaying `measurements()`; any number of processes may search together (`Archive.claim`). What is learnt later
(fine-tuned results, hybrids that cannot be exported) and the baseline are attributes of the study.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
import sqlalchemy
from sqlalchemy import Connection

from ens.pareto.baseline import REPORT_KEYS, Baseline, Tuned
from ens.pareto.claims import Claims
from ens.pareto.records import (
    check_manifest,
    from_baseline,
    from_stored,
    read_genotype,
    read_space,
    read_tuned,
    space_manifest,
    to_baseline,
    to_json,
    to_trial,
)
from ens.pareto.storage import ArchiveDamaged, ArchiveMismatch, Storage, is_crowded, reason_of
from ens.pareto.trials import SERVER_WAITS_S, Trials
from ens.space import Genotype, Measurement, SearchSpace, format_genotype

# Optuna logs every new study at INFO to stderr, where progress bars live.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Keys of study attributes: what must match when a run is resumed, and what need not.
_MANIFEST, _BASELINE = "ens", "ens:baseline"
# One attribute a genotype (and recipe), so that two processes never overwrite each other's.
_UNUSABLE, _TUNED = "ens:unusable:", "ens:tuned:"


class Archive:
    """Measurements of one run in the order of recording; made by open_archive (writing) or read_archive.

    It shows what was there when it was opened; `look`, `claim` and `record` bring what others have recorded since.
    `marked` are the genotypes that `mark_invalid` took off the front, with the reason. As of the last of those calls,
    `pending` is what other workers have claimed, `lost` what dead ones had, `workers` how many are at work, with this.
    """

    def __init__(self, attributes: Mapping[str, Any], trials: Trials, *, writable: bool) -> None:
        self.manifest: dict[str, Any] = attributes[_MANIFEST]
        self.baseline = from_baseline(attributes[_BASELINE]) if _BASELINE in attributes else None
        self._trials = trials
        self._claims = Claims(trials)
        self._writable = writable
        self._last_id = -1
        self._new: list[Measurement] = []
        self.pending: list[Genotype] = []
        self.lost: list[Genotype] = []
        self.workers = 1
        self._tuned = read_tuned({key.removeprefix(_TUNED): stored for key, stored in attributes.items()
                                   if key.startswith(_TUNED)})
        self._space = read_space(self.manifest)
        self._known: dict[Genotype, Measurement] = {}
        trials.look(self._read_new)
        for genotype, results in self._tuned.items():
            if genotype in self._known:
                self._known[genotype] = dataclasses.replace(self._known[genotype], psnr_db_tuned=results[0].psnr_db)
        self.marked = {read_genotype(key.removeprefix(_UNUSABLE)): str(reason) for key, reason in attributes.items()
                       if key.startswith(_UNUSABLE) and reason}
        for genotype in self.marked.keys() & self._known.keys():
            self._known[genotype] = dataclasses.replace(self._known[genotype], valid=False, note=self.marked[genotype])
        self._new = list(self._known.values())

    def _read_new(self, connection: Connection) -> None:
        for trial_id, state, stored in self._trials.read(connection, after=self._last_id):
            self._last_id = trial_id
            if "genotype" in stored:
                self._add(from_stored(state, stored, space=self._space, objectives=self.objectives))

    def _add(self, measurement: Measurement) -> None:
        # Archives of version 0.1 on a server may hold a genotype twice: the first trial counts.
        if measurement.genotype not in self._known:
            self._known[measurement.genotype] = measurement
            self._new.append(measurement)

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self.manifest["objectives"])

    @property
    def slots(self) -> dict[str, list[str]]:
        """Choice labels of every slot, in slot order."""
        return {name: self.manifest["slots"][name] for name in self.manifest["slot_order"]}

    @property
    def space(self) -> SearchSpace:
        """The space that was searched, with its prices; no network is needed."""
        return self._space

    @property
    def tuned(self) -> dict[Genotype, Tuned]:
        """The fine-tuned result of highest mean validation PSNR of every genotype that has one."""
        return {genotype: results[0] for genotype, results in self._tuned.items()}

    @property
    def tuned_by_recipe(self) -> dict[Genotype, tuple[Tuned, ...]]:
        """Every fine-tuned result, one a recipe, the best first."""
        return dict(self._tuned)

    def measurements(self) -> list[Measurement]:
        """All measurements, invalid ones included, in the order of recording."""
        return list(self._known.values())

    def known(self) -> dict[Genotype, Measurement]:
        """The same by genotype, in the order of recording."""
        return dict(self._known)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that is known: measurements, invalid ones, fine-tuned results."""
        known = [(one.genotype, sorted(one.values.items()), one.psnr_db, one.valid, one.note)
                 for one in self._known.values()]
        return hashlib.sha256(repr((known, sorted(self._tuned.items()))).encode()).hexdigest()

    def check(self, expected: Mapping[str, Any]) -> None:
        """Compare those keys of a manifest that are at hand, `space_manifest` among them, with what is stored.

        Raises ArchiveMismatch with every difference.
        """
        expected = json.loads(json.dumps(expected))
        if found := _differences({key: self.manifest.get(key) for key in expected}, expected):
            raise ArchiveMismatch(f"the archive was recorded with another configuration: {'; '.join(found)}")

    def look(self) -> list[Measurement]:
        """Bring up to date; returns what became known since the last `look` or `record`, all there is at first."""
        self._trials.look(self._read_new)
        self._trials.look(self._read_claims)
        return self._list_new()

    def claim(self, wanted: Sequence[Genotype], *, budget: int) -> list[Genotype]:
        """Those of `wanted` that this worker is to measure now, and nobody else: what is recorded or claimed by others
        is left out, and what would bring both beyond `budget`. Claims end when they are recorded, or with this worker.
        """
        self._check_writable()

        def claim(connection: Connection) -> list[Genotype]:
            self._read_new(connection)
            own = self._read_claims(connection) - set(wanted)
            taken = {*self._known, *self.pending}
            free = [genotype for genotype in wanted if genotype not in taken]
            free = free[:max(0, budget - len(self._known) - len(self.pending) - len(own))]
            self._claims.add(connection, free)
            return free

        return self._trials.change(claim)

    def record(self, measurement: Measurement) -> list[Measurement]:
        """Store a measurement; it is on disk when this returns. Returns what `look` would.

        A worker that was taken for dead may find the genotype recorded by another: then that counts. Raises ValueError
        for a genotype that was known before or a valid measurement without finite objectives, RuntimeError on an
        archive opened for reading, OSError when the disk is full or read-only.
        """
        self._check_writable()
        name = format_genotype(measurement.genotype)
        if measurement.genotype in self._known:
            raise ValueError(f"genotype {name} was recorded before")
        trial = to_trial(measurement, slots=self.slots, objectives=self.objectives,
                         engine=str(self.manifest.get("engine", "")), worker=self._claims.name)

        def record(connection: Connection) -> int | None:
            self._read_new(connection)
            started_s = self._claims.remove(connection, name)
            if measurement.genotype in self._known:
                return None
            return self._trials.insert(connection, trial, started_s=started_s)

        try:
            trial_id = self._trials.change(record)
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise OSError(f"measurement {name} could not be stored: {reason_of(error)}") from error
        if trial_id is not None:
            self._last_id = trial_id
            self._add(measurement)
        return self._list_new()

    def close(self) -> None:
        """Give claims and connections back; also done by leaving a `with` block."""
        self._writable = False
        with suppress(sqlalchemy.exc.SQLAlchemyError):  # then the lease ends by itself
            self._claims.end()
        self._trials.close()

    def _check_writable(self) -> None:
        if not self._writable:
            raise RuntimeError("the archive was opened for reading; open it with open_archive to record")

    def _read_claims(self, connection: Connection) -> set[Genotype]:
        """What this worker has claimed; `pending` and `workers` are brought up to date."""
        own, others, dead, self.workers = self._claims.read(connection)
        self.pending, self.lost = list(map(read_genotype, others)), list(map(read_genotype, dead))
        return set(map(read_genotype, own))

    def _list_new(self) -> list[Measurement]:
        new, self._new = self._new, []
        return new

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def open_archive(storage: str | Path, *, space: SearchSpace, objectives: Sequence[str], manifest: Mapping[str, Any],
                 baseline: Baseline | None = None, name: str = "ens") -> Archive:
    """Create an archive, or open it to go on recording.

    `storage` is a file path or an Optuna storage URL, `name` the study in it. `manifest` holds, as JSON values, what
    else must be the same when a run is resumed (seed, engine, protocol, hashes); objectives and space are added here.
    `baseline` is kept as it is given first and not compared: its floats differ between numbers of threads. Any number
    of processes may have it open. Raises ArchiveMismatch naming the differences, ArchiveDamaged for a file that is no
    archive, ArchiveLocked where another process does not stop writing to it.
    """
    stored = json.loads(json.dumps({**manifest, "objectives": list(objectives), **space_manifest(space)}))
    waits_s = iter(SERVER_WAITS_S)
    while True:
        try:
            return _open(storage, stored, baseline, name)
        except ArchiveDamaged as error:
            wait_s = next(waits_s, None)
            if wait_s is None or not is_crowded(error):
                raise
        time.sleep(wait_s * random.uniform(0.5, 1.5))


def _open(storage: str | Path, stored: Mapping[str, Any], baseline: Baseline | None, name: str) -> Archive:
    objectives, place = stored["objectives"], Storage(storage)
    with place.opening(), place.alone():
        study, trials = place.create_study(name, len(objectives))
        found = study.user_attrs.get(_MANIFEST)
        if found is None:
            if len(trials):
                raise ArchiveMismatch(f"study {name!r} in {place} was not recorded by ens")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(objectives))
            study.set_user_attr(_MANIFEST, stored)
        elif found != stored:
            raise ArchiveMismatch(f"{place} was recorded with another configuration: "
                                  f"{'; '.join(_differences(found, stored))}")
        if baseline is not None and _BASELINE not in study.user_attrs:
            study.set_user_attr(_BASELINE, to_baseline(baseline))
        return Archive(study.user_attrs, trials, writable=True)


def read_archive(storage: str | Path, *, name: str = "ens") -> Archive:
    """Open an archive for reading, also while a search writes to it.

    Raises FileNotFoundError where there is no file or study, ArchiveDamaged for a file that is no archive of ens.
    Nothing is written, whatever the file holds.
    """
    place = Storage(storage)
    with place.opening():
        study, trials = _load_recorded(place, name)
        try:
            return Archive(study.user_attrs, trials, writable=False)
        finally:
            trials.close()


def mark_invalid(storage: str | Path, genotype: Genotype, reason: str, *, name: str = "ens") -> None:
    """Take a genotype off the front, for instance because its hybrid cannot be exported; it stays visible.

    An empty reason puts it back.
    """
    study = _open_recorded(storage, name)
    read_space(study.user_attrs[_MANIFEST]).check(genotype)
    study.set_user_attr(_UNUSABLE + format_genotype(genotype), reason)


def record_tuned(storage: str | Path, genotype: Genotype, *, recipe: str, psnr_db: Sequence[float],
                 report: Mapping[str, float], name: str = "ens") -> None:
    """Keep what fine-tuning with `recipe` made of a genotype, also while another process writes to the archive.

    `psnr_db` is the PSNR of every validation image, `report` the mean PSNR on images that chose nothing, in dB, by
    `input`, `before`, `after` and `teacher` (or empty). The same recipe again replaces its earlier result. Raises
    ValueError for PSNRs that are NaN or −infinite, other keys, or a genotype that the space does not have.
    """
    if not psnr_db or any(math.isnan(value) or value == -math.inf for value in (*psnr_db, *report.values())):
        raise ValueError(f"a fine-tuned result needs finite PSNRs, got {list(psnr_db)} and {dict(report)}")
    if unknown := [key for key in report if key not in REPORT_KEYS]:
        raise ValueError(f"the report images have no {unknown[0]!r}; they have {', '.join(REPORT_KEYS)}")
    study = _open_recorded(storage, name)
    read_space(study.user_attrs[_MANIFEST]).check(genotype)
    study.set_user_attr(f"{_TUNED}{format_genotype(genotype)}:{recipe}",
                        {"psnr_db": to_json(psnr_db),
                         "report": dict(zip(report, to_json(report.values()), strict=True))})


def _open_recorded(storage: str | Path, name: str) -> optuna.Study:
    """A study that open_archive made, to add an attribute to."""
    place = Storage(storage)
    with place.opening():
        study, trials = _load_recorded(place, name)
        trials.close()
    return study


def _load_recorded(place: Storage, name: str) -> tuple[optuna.Study, Trials]:
    """A study that open_archive made; raises FileNotFoundError where nothing was recorded, ValueError for another."""
    study, trials = place.load_study(name)
    manifest = study.user_attrs.get(_MANIFEST)
    if manifest is None and not len(trials):
        raise FileNotFoundError(f"{place} holds nothing yet; `ens search` goes on with it")
    if manifest is None:
        raise ArchiveMismatch(f"study {name!r} in {place} was not recorded by ens")
    if isinstance(manifest, dict) and "space" not in manifest:
        raise ArchiveMismatch(f"{place} was recorded by an older version of ens, which priced transformers otherwise; "
                              "search again in another run folder")
    check_manifest(manifest)
    return study, trials


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
