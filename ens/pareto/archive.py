"""Every measurement ever made, as an Optuna study: a SQLite file by default, or any Optuna storage URL.

One trial a measurement: parameters = slot name -> choice label, values = objectives, state FAIL where the measurement
is invalid. optuna-dashboard opens the file as it is. A search resumes by replaying `measurements()`. What is learnt
later (fine-tuned results, hybrids that cannot be exported) and the baseline are attributes of the study.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock

from ens.pareto.baseline import REPORT_KEYS, Baseline, Tuned
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
from ens.pareto.storage import ArchiveMismatch, Storage, reason_of
from ens.pareto.trials import Trials
from ens.space import Genotype, Measurement, SearchSpace, format_genotype

# Optuna logs every new study at INFO to stderr, where progress bars live.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Keys of study attributes: what must match when a run is resumed, and what need not.
_MANIFEST, _BASELINE = "ens", "ens:baseline"
# One attribute a genotype (and recipe), so that two processes never overwrite each other's.
_UNUSABLE, _TUNED = "ens:unusable:", "ens:tuned:"


class Archive:
    """Measurements of one run in the order of recording; made by open_archive (writing) or read_archive.

    It shows what was there when it was opened and what it recorded itself. `marked` are the genotypes that
    `mark_invalid` took off the front, with the reason.
    """

    def __init__(self, attributes: Mapping[str, Any], trials: Trials, *, lock: FileLock | None,
                 writable: bool) -> None:
        self.manifest: dict[str, Any] = attributes[_MANIFEST]
        self.baseline = from_baseline(attributes[_BASELINE]) if _BASELINE in attributes else None
        self._trials = trials
        self._lock = lock
        self._writable = writable
        self._tuned = read_tuned({key.removeprefix(_TUNED): stored for key, stored in attributes.items()
                                   if key.startswith(_TUNED)})
        self._known: dict[Genotype, Measurement] = {}
        space = self.space
        for state, stored in trials.read():
            # Two machines that share a database may both have measured a genotype: the first trial counts.
            if "genotype" in stored:
                measurement = from_stored(state, stored, space=space, objectives=self.objectives)
                self._known.setdefault(measurement.genotype, measurement)
        for genotype, results in self._tuned.items():
            if genotype in self._known:
                self._known[genotype] = dataclasses.replace(self._known[genotype], psnr_db_tuned=results[0].psnr_db)
        self.marked = {read_genotype(key.removeprefix(_UNUSABLE)): str(reason) for key, reason in attributes.items()
                       if key.startswith(_UNUSABLE) and reason}
        for genotype in self.marked.keys() & self._known.keys():
            self._known[genotype] = dataclasses.replace(self._known[genotype], valid=False, note=self.marked[genotype])

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
        return read_space(self.manifest)

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

    def record(self, measurement: Measurement) -> None:
        """Store a measurement; it is on disk when this returns.

        Raises ValueError for a genotype that was recorded before or a valid measurement without finite objectives,
        RuntimeError on an archive opened for reading, OSError when the disk is full or read-only.
        """
        if not self._writable:
            raise RuntimeError("the archive was opened for reading; open it with open_archive to record")
        if measurement.genotype in self._known:
            raise ValueError(f"genotype {format_genotype(measurement.genotype)} was recorded before")
        trial = to_trial(measurement, slots=self.slots, objectives=self.objectives,
                          engine=str(self.manifest.get("engine", "")))
        try:
            self._trials.insert(trial)
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise OSError(f"measurement {format_genotype(measurement.genotype)} could not be stored: "
                          f"{reason_of(error)}") from error
        self._known[measurement.genotype] = measurement

    def close(self) -> None:
        """Let the next writer in; also done by leaving a `with` block."""
        self._writable = False
        self._trials.close()
        if self._lock is not None:
            self._lock.release()

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
    `baseline` is kept as it is given first and not compared: its floats differ between numbers of threads. A database
    server takes any number of writers. Raises ArchiveMismatch naming the differences, ArchiveLocked naming the process
    that writes to the same SQLite file, ArchiveDamaged for a file that is no archive.
    """
    stored = json.loads(json.dumps({**manifest, "objectives": list(objectives), **space_manifest(space)}))
    place = Storage(storage)
    lock = place.lock()
    try:
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
        with place.opening():
            return Archive(study.user_attrs, trials, lock=lock, writable=True)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def read_archive(storage: str | Path, *, name: str = "ens") -> Archive:
    """Open an archive for reading, also while a search writes to it.

    Raises FileNotFoundError where there is no file or study, ArchiveDamaged for a file that is no archive of ens.
    Nothing is written, whatever the file holds.
    """
    place = Storage(storage)
    with place.opening():
        study, trials = _load_recorded(place, name)
        try:
            return Archive(study.user_attrs, trials, lock=None, writable=False)
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
