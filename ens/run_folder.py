"""RunFolder: what a study names, opened once and only when it is asked for, and where the files of its run are.

    study.yaml  teacher/  library/  archive.db  front.csv …  report.html  finetune/  export/
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from filelock import FileLock
from torch import nn

from ens.atomic import write_atomic
from ens.config import ConfigError, StudyConfig, TrainConfig, check_same_run, dump_study, load_study, parse_choices
from ens.data.folders import load_pairs
from ens.data.pairs import Patches, ValidationSet, load_validation_set
from ens.data.tasks import Task, create_task
from ens.distill.fit import choose_device
from ens.distill.library import Library, LibraryError, create_library, open_library
from ens.distill.recipe import Phase, Recipe
from ens.evaluate.cost import CostTable, build_cost_table
from ens.evaluate.evaluator import Evaluator, Judge, list_input_psnr_db, list_psnr_db
from ens.evaluate.meters import Meter, build_meters
from ens.evaluate.protocols import Protocol, task_protocols
from ens.export.hybrid import HybridFiles, build_hybrid, open_network
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import Network, SlotSpec, create_filling
from ens.objectives import find_objectives
from ens.pareto.archive import Archive, mark_invalid, open_archive, read_archive, record_tuned
from ens.pareto.baseline import Baseline
from ens.pareto.selection import Front, nearest_members, pick_genotype, select_front
from ens.pareto.storage import acquire_lock
from ens.space import Choice, Genotype, SearchSpace, format_genotype

RUN_FILE = "study.yaml"
_MADE = ("teacher", "library", "archive.db")
_held: dict[Path, FileLock] = {}


class RunFolder:
    """One run on disk. Every property is opened at most once in a process, when it is first asked for.

    Made by `start` (a study and the folder it runs in) or `reopen` (a folder with a study). `storage` is where the
    archive is, `archive.db` unless given. A study's `threads` are set for the process.
    """

    def __init__(self, path: Path, study: StudyConfig, *, storage: str = "") -> None:
        self.path = path
        self.study = study
        self.storage: str | Path = storage or path / "archive.db"
        self.hybrids = HybridFiles(path)
        self.teacher_path = path / "teacher" / "teacher.safetensors"
        self.library_path = path / "library"
        self._archive: Archive | None = None
        self._surrogates: dict[tuple[str, Choice], nn.Module] = {}
        if study.threads:
            torch.set_num_threads(study.threads)

    @classmethod
    def start(cls, study: StudyConfig, path: Path, *, storage: str = "") -> Self:
        """Take a folder for a study, or go on where it ran before; everything the study names is checked first.

        Raises ConfigError, with the differences, where another study ran there: only the budget, the device, threads,
        report images and fine-tuning may change once something was made. Raises ArchiveLocked where another process
        writes to the folder.
        """
        run, file = cls(path, study, storage=storage), path / RUN_FILE
        made = file.exists() and any((path / name).exists() for name in _MADE)
        if not made or check_same_run(load_study(file), study, path):
            run.check()
        run.hold()
        write_atomic(file, dump_study(study).encode())
        return run

    @classmethod
    def reopen(cls, path: Path, changes: Mapping[str, Any] | None = None, *, storage: str = "") -> Self:
        """Open the run in a folder; `changes` replace keys of its study in this process. Raises ConfigError."""
        if not (path / RUN_FILE).exists():
            raise ConfigError(f"{path} is not a run folder: it has no {RUN_FILE}; "
                              f"`ens search SPACE.yaml --out {path}` makes one")
        study = load_study(path / RUN_FILE, changes)
        if changes:
            check_same_run(load_study(path / RUN_FILE), study, path)
        return cls(path, study, storage=storage)

    def check(self) -> None:
        """Raise now what would otherwise be found out after hours: names, choices, device, images, the teacher."""
        from ens.search import create_engine  # brings pymoo, half a second

        study = self.study
        for name in ("device", "task", "validation", "report_set"):
            getattr(self, name)  # opening is the check; what is opened is kept
        find_objectives(study.search.objectives)
        if self.skeleton.upscale != self.task.scale:
            raise ConfigError(f"{study.name}: the network enlarges {self.skeleton.upscale} times, the task "
                              f"{self.task.scale} times")
        create_engine(study.search.engine, self.space, seed=study.seed)
        with torch.device("meta"):
            for spec, choice in self.jobs:
                create_filling(spec, choice)
        for section in (study.train, study.finetune):
            self.recipe(section).check_processes()
            if section.taught_by:
                open_network(section.taught_by)
        if study.library and study.teacher not in ("", study.library) and not self.library.imitates(self.source):
            raise LibraryError(f"{study.library} imitates another teacher than the one of {study.name}")

    def hold(self) -> None:
        """Keep other processes from writing to this folder until this one ends; raises ArchiveLocked."""
        if os.environ.get("RANK", "0") == "0" and self.path.resolve() not in _held:
            _held[self.path.resolve()] = acquire_lock(self.path / "run")

    @cached_property
    def device(self) -> str:
        """The device of the study; raises ConfigError for a GPU that is not there."""
        try:
            return choose_device(self.study.device)
        except ValueError as error:
            raise ConfigError(f"{self.study.name}: {error}") from None

    @cached_property
    def task(self) -> Task:
        options = dict(self.study.task)
        return create_task(str(options.pop("name")), options)

    @cached_property
    def protocol(self) -> Protocol:
        return task_protocols(self.task)[0]

    def recipe(self, section: TrainConfig) -> Recipe:
        """How a network is trained: the study's `train` or `finetune`."""
        keys = section.model_dump(exclude={"phases", "candidates"})
        return Recipe(phases=tuple(Phase(*phase) for phase in section.phases), seed=self.study.seed, **keys)

    @cached_property
    def skeleton(self) -> Network:
        """The teacher's network for its slots and sizes alone; on the meta device unless only weights tell them."""
        if self.study.library or (self.library_path / "manifest.json").exists():
            return self.library.create_skeleton()
        return self.source if self.study.teacher else self.create_network("meta")

    def create_network(self, device: str = "cpu") -> Network:
        """The network to train as a teacher, randomly initialised; raises ConfigError where the study has none."""
        options = dict(self.study.network)
        with torch.device(device):
            return create_network(str(options.pop("name")), **options)

    @cached_property
    def source(self) -> Network:
        """The teacher as it was given or trained, before a library rounds its weights."""
        return open_network(self.study.teacher or str(self.teacher_path))

    @cached_property
    def teacher(self) -> Network:
        """The teacher with the library's weights, on the CPU in evaluation mode."""
        return self.library.load_teacher()

    @cached_property
    def library(self) -> Library:
        """The study's library, or the run's own, begun with the teacher where there is none yet."""
        if self.study.library:
            return open_library(self.study.library)
        if (self.library_path / "manifest.json").exists():
            return open_library(self.library_path)
        return create_library(self.library_path, self.source, task=str(self.task), dtype=self.study.distill.dtype,
                              recipe=self.study.distill.model_dump())

    @cached_property
    def space(self) -> SearchSpace:
        study, prices = self.study, self.study.penalty
        slots = {name: parse_choices(entries) for name, entries in study.slots.items()}
        return build_space(study.name, self.skeleton, granularity=study.granularity, slots=slots,
                           choices=parse_choices(study.choices), penalty_teacher=prices.teacher,
                           penalty_per_block=prices.per_block, transformers=prices.transformers)

    @property
    def jobs(self) -> list[tuple[SlotSpec, Choice]]:
        """Every surrogate the space needs: slot and choice."""
        return [(self.skeleton.slot(slot.name), choice) for slot in self.space.slots for choice in slot.choices[1:]]

    def surrogate(self, spec: SlotSpec, choice: Choice) -> nn.Module:
        """Distilled blocks of one slot; raises LibraryError where the library has none."""
        if (spec.name, choice) not in self._surrogates:
            self._surrogates[spec.name, choice] = self.library.load_surrogate(spec, choice)
        return self._surrogates[spec.name, choice]

    def build(self, genotype: Genotype) -> Network:
        """The hybrid of a genotype with the library's weights, on the CPU in evaluation mode."""
        return build_hybrid(self.teacher, {name: self.surrogate(self.skeleton.slot(name), choice)
                                           for name, choice in self.space.replaced(genotype).items()}).cpu()

    def count_costs(self) -> CostTable:
        """Parameters and multiply-adds of every choice."""
        return build_cost_table(self.skeleton, self.space)

    def patches(self, purpose: str) -> Patches:
        """Training patches of the study's folder; every purpose (teacher, library, hybrid) draws others."""
        if not self.study.data.train:
            raise ConfigError(f"{self.study.name}: `data.train` names no folder of training images")
        pairs = load_pairs(self.study.data.train, scale=self.task.scale, channels=self.skeleton.in_channels,
                           studio=self.task.studio)
        return Patches(pairs, self.task, seed=self.study.seed, purpose=purpose)

    @cached_property
    def validation(self) -> ValidationSet:
        """The images that choose: a genotype's PSNR, the knee, the best weights and candidates."""
        return self._load_images(self.study.data.validation)

    @cached_property
    def report_set(self) -> ValidationSet | None:
        """The images that choose nothing; None where the study names none."""
        return self._load_images(self.study.data.report) if self.study.data.report else None

    def _load_images(self, location: str) -> ValidationSet:
        data = self.study.data
        images = load_validation_set(location, self.task, channels=self.skeleton.in_channels, crop_px=data.crop_px,
                                     limit=data.limit, crops_per_image=data.crops_per_image)
        return images.sorted_by_content()

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.validation, self.report_set, self.protocol)

    @cached_property
    def meters(self) -> dict[str, Meter]:
        return build_meters(self.skeleton, self.space)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Measures genotypes with every surrogate that the library holds."""
        fillings: list[list[nn.Module | str | None]] = []
        for slot in self.space.slots:
            spec = self.skeleton.slot(slot.name)
            fillings.append([None, *(self.library.missing(slot.name, choice) or self.surrogate(spec, choice)
                                     for choice in slot.choices[1:])])
        return Evaluator(self.teacher, self.space, fillings, images=self.validation, protocol=self.protocol,
                         meters=self.meters, teacher_psnr_db=self.baseline.teacher_psnr_db, device=self.device)

    @property
    def has_archive(self) -> bool:
        with suppress(FileNotFoundError):
            return bool(self.archive)
        return False

    @property
    def archive(self) -> Archive:
        """Every measurement so far, read anew after this process has recorded some; raises FileNotFoundError."""
        if self._archive is None:
            self._archive = read_archive(self.storage)
        return self._archive

    @cached_property
    def baseline(self) -> Baseline:
        """What the teacher and doing nothing reach on the validation images; ConfigError where that is the same."""
        if self.has_archive and self.archive.baseline is not None:
            return self.archive.baseline
        teacher = list_psnr_db(copy.deepcopy(self.teacher).to(self.device), self.validation, self.protocol)
        before = list_input_psnr_db(self.validation, self.protocol)
        if before and fmean(teacher) <= fmean(before):
            raise ConfigError(f"the teacher restores the validation images to {fmean(teacher):.2f} dB, the degraded "
                              f"input has {fmean(before):.2f} dB: there is nothing to imitate. Train it longer "
                              "(train.steps), or give another")
        return Baseline(teacher, before, {name: meter.measure(self.space.teacher)
                                          for name, meter in self.meters.items()})

    @property
    def identity(self) -> dict[str, Any]:
        """What a measurement depends on, as far as it is known without opening images or weights."""
        study, library = self.study, self.library
        return {"study": study.name, "seed": study.seed, "engine": study.search.engine,
                "batch_size": study.search.batch_size, "task": str(self.task), "protocol": self.protocol.name,
                "crop_px": study.data.crop_px, "crops_per_image": study.data.crops_per_image, "limit": study.data.limit,
                "teacher": library.teacher_sha256, "library": library.hash_of(self.space),
                "meters": {name: meter.identity for name, meter in self.meters.items()}}

    @contextmanager
    def recording(self) -> Iterator[Archive]:
        """The archive open for writing; raises ArchiveMismatch where it holds measurements of something else."""
        manifest = {**self.identity, "data": str(self.validation.fingerprint)}
        with open_archive(self.storage, space=self.space, objectives=self.study.search.objectives, manifest=manifest,
                          baseline=self.baseline) as archive:
            self._archive = archive
            yield archive

    @property
    def is_searched(self) -> bool:
        """Whether the budget is spent; raises ArchiveMismatch where the archive is of another configuration."""
        if not self.has_archive:
            return False
        self.archive.check(self.identity)
        return len(self.archive.known()) >= self.study.search.budget

    def front(self, objectives: tuple[str, ...] = ()) -> Front:
        """The front of any two or three objectives that were measured, the search's by default."""
        return select_front(self.archive.measurements(), objectives or self.archive.objectives,
                            baseline=self.archive.baseline)

    def pick(self, pick: str) -> Genotype:
        """What `knee`, `near 1`, `within 0.1` or a genotype as text means; raises ValueError."""
        return pick_genotype(pick, front=self.front(), space=self.archive.space)

    @property
    def is_drawn(self) -> bool:
        """Whether the report shows the archive as it is now."""
        from ens.pareto.report import drawn_fingerprint

        return drawn_fingerprint(self.path / "report.html") == self.archive.fingerprint

    def mark_invalid(self, genotype: Genotype, reason: str) -> None:
        """Take a genotype off the front; it stays in the archive with the reason."""
        mark_invalid(self.storage, genotype, reason)
        self._archive = None

    def candidates(self, pick: str) -> list[Genotype]:
        """The pick and the front's members nearest to it, `finetune.candidates` in all."""
        return nearest_members(self.front(), self.pick(pick), count=self.study.finetune.candidates)

    def best_tuned(self, genotype: Genotype) -> Path | None:
        """File of the best fine-tuning of a genotype by validation PSNR; None where there is none."""
        tuned = self.archive.tuned.get(genotype)
        path = self.hybrids.tuned(genotype, tuned.recipe) if tuned else None
        return path if path and path.exists() else None

    def record_tuned(self, genotype: Genotype, figures: Mapping[str, Sequence[float]]) -> None:
        """Keep what a fine-tuning reached in the archive."""
        report = {name.removeprefix("report_psnr_db_"): fmean(values) for name, values in figures.items()
                  if name.startswith("report_") and values}
        record_tuned(self.storage, genotype, recipe=self.recipe(self.study.finetune).key,
                     psnr_db=figures["psnr_db_after"], report=report)
        self._archive = None

    def facts(self, genotype: Genotype, figures: Mapping[str, Sequence[float]]) -> dict[str, str]:
        """What a hybrid's file says of itself, with the means of `figures` in dB."""
        return {"study": self.study.name, "genotype": format_genotype(genotype), "task": str(self.task),
                "protocol": self.protocol.name, "validation": str(self.validation.fingerprint),
                **({"report": str(self.report_set.fingerprint)} if self.report_set else {}),
                "teacher_sha256": self.library.teacher_sha256, "library_sha256": self.library.hash_of(self.space),
                **{slot.name: choice.label for slot, choice in
                   zip(self.space.slots, self.space.choices(genotype), strict=True)},
                **{name: f"{fmean(values):.3f}" for name, values in figures.items() if values}}
