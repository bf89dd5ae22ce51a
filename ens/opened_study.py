"""What a study names, opened once and only when it is asked for, and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ens.config import ConfigError, StudyConfig, TrainConfig, parse_choices
from ens.data.folders import load_pairs, require_pairs
from ens.data.pairs import Patches, ValidationSet, load_validation_set
from ens.data.sizes import check_patches_fit
from ens.data.tasks import Task, create_task
from ens.distill.fit import choose_device
from ens.distill.library import EdgeVerdict, Library, LibraryError, create_library, open_library
from ens.distill.recipe import Phase, Recipe
from ens.evaluate.cost import CostTable, build_cost_table
from ens.evaluate.evaluator import Judge
from ens.evaluate.latency import LatencyTable, check_name, read_table, table_path, write_table
from ens.evaluate.meters import METERS, PEAK, Meter, build_latency, build_peak
from ens.evaluate.protocols import Protocol, task_protocols
from ens.export.hybrid import build_hybrid, open_network
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import Network, SlotSpec, create_filling
from ens.objectives import LATENCY, QUALITY, find_objective, find_objectives
from ens.own_code import is_own
from ens.runtime.process import QUIET, Control
from ens.runtime.profiling import profile_space, remove_bundle
from ens.space import Choice, Genotype, SearchSpace

if TYPE_CHECKING:
    from ens.search import Engine


class OpenedStudy:
    """A study and the folder it runs in. Every property is opened at most once in a process, when first asked for.

    The study's `threads` are set for the process. `say` gets a line on what is left out of the space.
    """

    def __init__(self, path: Path, study: StudyConfig, say: Callable[[str], None] = QUIET.say) -> None:
        self.path = path
        self.say = say
        self.study = study
        self.teacher_path = path / "teacher" / "teacher.safetensors"
        self.teacher_state = path / "teacher" / "train.pt"
        self.library_path = path / "library"
        self.distill_state = self.library_path / "training.pt"
        self._verdicts: dict[str, dict[str, EdgeVerdict]] = {}
        self._surrogates: dict[tuple[str, Choice], nn.Module] = {}
        self._meters: dict[str, Meter] = {}
        if study.threads:
            torch.set_num_threads(study.threads)

    def check(self, *, tuned: bool = False) -> None:
        """Raise now what would otherwise be found out after hours: names, choices, device, images, the teacher."""
        from ens.search import create_engine  # brings pymoo, half a second

        study = self.study
        for name in ("device", "task", "protocol", "validation", "report_set"):
            getattr(self, name)  # opening is the check; what is opened is kept
        find_objectives(study.search.objectives)
        for name in self._names():
            if find_objective(name).name.startswith(f"{LATENCY}@"):
                self.read_table(name)  # another device's: it is there, or nobody can make it here
        if self.skeleton.upscale != self.task.scale:
            raise ConfigError(f"{study.name}: the network enlarges {self.skeleton.upscale} times, the task "
                              f"{self.task.scale} times")
        create_engine(study.search.engine, self.bounded, seed=study.seed)
        with torch.device("meta"):
            for spec, choice in self.jobs:
                create_filling(spec, choice)
        if not (study.teacher or study.library or self.teacher_path.exists()):
            self.check_recipe("train", study.train)
        if not self.has_library:
            check_patches_fit(self.train_folder, study.distill.patch_px, scale=self.task.scale)
        if tuned or study.data.train:
            self.check_recipe("finetune", study.finetune)
        if study.library and study.teacher not in ("", study.library) and not self.library.imitates(self.source):
            raise LibraryError(f"{study.library} imitates another teacher than the one of {study.name}")
        if study.library:
            list(self.missing_jobs)  # raises where it lacks some

    def check_recipe(self, name: str, section: TrainConfig) -> None:
        """Raise now what a training would run into: processes, its teacher, images too small for its patches."""
        recipe, own = self.recipe(section), self.skeleton
        recipe.check_processes()
        other = open_network(section.taught_by) if section.taught_by else own
        if (other.upscale, other.in_channels) != (own.upscale, own.in_channels):
            raise ConfigError(f"{name}.taught_by enlarges {other.in_channels} channels {other.upscale} times, the "
                              f"network {own.in_channels} channels {own.upscale} times; both must restore at the same "
                              "scale")
        check_patches_fit(self.train_folder, max(phase.patch_px for phase in recipe.phases), scale=self.task.scale)

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
        if self.has_library:
            return self.library.create_skeleton()
        return self.source if self.study.teacher else self.create_network("meta")

    def create_network(self, device: str = "cpu") -> Network:
        """The network to train as a teacher, initialised by the study's seed."""
        options = dict(self.study.network)
        torch.manual_seed(self.study.seed)
        with torch.device(device):
            return create_network(str(options.pop("name")), **options)

    @cached_property
    def source(self) -> Network:
        """The teacher as it was given or trained, before a library rounds its weights."""
        own = self.create_network if is_own(str(self.study.network.get("name", ""))) else None
        return open_network(self.study.teacher or str(self.teacher_path), own)

    @cached_property
    def teacher(self) -> Network:
        """The teacher with the library's weights, on the CPU in evaluation mode."""
        return self.library.load_teacher()

    @property
    def has_library(self) -> bool:
        return bool(self.study.library) or (self.library_path / "manifest.json").exists()

    @cached_property
    def library(self) -> Library:
        """The study's library, or the run's own, begun with the teacher where there is none yet."""
        if self.has_library:
            return open_library(self.study.library or self.library_path)
        library = create_library(self.library_path, self.source, task=str(self.task), dtype=self.study.distill.dtype,
                                 recipe=self.study.distill.model_dump())
        library.store_verdicts(self._verdicts)
        return library

    @cached_property
    def space(self) -> SearchSpace:
        study, prices = self.study, self.study.penalty
        slots = {name: parse_choices(entries) for name, entries in study.slots.items()}
        space = build_space(study.name, self.skeleton, granularity=study.granularity, slots=slots,
                            choices=parse_choices(study.choices), penalty_teacher=prices.teacher,
                            penalty_per_block=prices.per_block, transformers=prices.transformers)
        return self._require_edge(space) if study.search.require else space

    def _require_edge(self, space: SearchSpace) -> SearchSpace:
        """The space without what the edge contract leaves out; verdicts are the library's, made where it lacks some."""
        from ens.export.edge import keep_edge, lint_space

        known = self.library.manifest.edge if self.has_library else {}
        self._verdicts = lint_space(space, self.skeleton, known, self.say)
        if self.has_library:
            self.library.store_verdicts(self._verdicts)
        return keep_edge(space, self.skeleton, self._verdicts, self.say)

    @property
    def jobs(self) -> list[tuple[SlotSpec, Choice]]:
        """Every surrogate the space needs: slot and choice."""
        return [(self.skeleton.slot(slot.name), choice) for slot in self.space.slots for choice in slot.choices[1:]]

    @property
    def missing_jobs(self) -> list[tuple[SlotSpec, Choice]]:
        """Those of `jobs` that the library lacks; raises LibraryError where the study has given the library."""
        jobs = self.jobs
        missing = [(spec, choice) for spec, choice in jobs if not self.library.has(spec.name, choice)]
        if missing and self.study.library:
            raise LibraryError(f"{self.study.library} lacks {len(missing)} of the {len(jobs)} surrogates of "
                               f"{self.study.name}; leave `library` out to distil them")
        return missing

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

    @property
    def train_folder(self) -> str:
        """Where training images are; raises ConfigError where the study names none."""
        if not self.study.data.train:
            raise ConfigError(f"{self.study.name}: `data.train` names no folder of training images")
        if self.task.needs_pairs:
            require_pairs(self.study.data.train, scale=self.task.scale)
        return self.study.data.train

    def patches(self, purpose: str) -> Patches:
        """Training patches of the study's folder; every purpose (teacher, library, hybrid) draws others."""
        pairs = load_pairs(self.train_folder, scale=self.task.scale, channels=self.skeleton.in_channels,
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
        return load_validation_set(location, self.task, channels=self.skeleton.in_channels, crop_px=data.crop_px,
                                   limit=data.limit, crops_per_image=data.crops_per_image, by_content=True)

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.validation, self.report_set, self.protocol)

    @cached_property
    def meters(self) -> dict[str, Meter]:
        """What every measurement of the search holds."""
        return {name: self.meter(name) for name in dict.fromkeys([*METERS, *self._names(bounds=False)])}

    def meter(self, name: str) -> Meter:
        """What gives the value of a cost that is known without measuring; raises LatencyError without a table."""
        if name not in self._meters:
            if name == PEAK:
                self._meters[name] = build_peak(self.skeleton, self.space, self.study.latency.size)
            elif name in METERS:
                self._meters[name] = METERS[name](self.skeleton, self.space)
            else:
                self._meters[name] = build_latency(self.read_table(name), self.space)
        return self._meters[name]

    def _names(self, *, bounds: bool = True) -> list[str]:
        """The objectives of the search, and what it is bound by, that are known without measuring."""
        names = dict.fromkeys([*self.study.search.objectives, *(self.study.search.max if bounds else ())])
        return [name for name in names if name != QUALITY]

    @property
    def restricted(self) -> SearchSpace:
        """The space without the choices that the study fixes and forbids; ConfigError where that is empty."""
        space = self.space  # outside: what is wrong with a network is no fault of these bounds
        try:
            return space.restrict(fix=self.study.search.fix, forbid=self.study.search.forbid)
        except ValueError as error:
            raise ConfigError(f"{self.study.name}: {error}") from None

    @property
    def bounded(self) -> SearchSpace:
        """The space within the study's bounds, as far as they can be known by now; ConfigError where that is empty."""
        space = self.restricted
        names = [name for name in self.study.search.max if name != QUALITY and not (
            name == LATENCY and not table_path(self.path, name).exists())]
        if not names:
            return space
        from ens.search.bounds import Bound, narrow_space  # brings pymoo, half a second

        try:
            return narrow_space(space, [Bound(name, self.study.search.max[name], self.meter(name).measure,
                                                   self.meter(name).tally) for name in names])
        except ValueError as error:
            raise ConfigError(f"{self.study.name}: {error}") from None

    def build_engine(self) -> Engine:
        """A fresh engine of the search, which is told what is known in advance and the hypervolume's corner."""
        from ens.search import create_engine

        names, teacher = self.study.search.objectives, self.space.teacher
        costs = [None if name == QUALITY else self.meter(name).tally for name in names]
        reference = [item.reference * (self.meter(name).measure(teacher) if item.relative else 1.0)
                     for name, item in zip(names, find_objectives(names), strict=True)]
        return create_engine(self.study.search.engine, self.bounded, seed=self.study.seed, costs=costs,
                             reference=reference)

    def read_table(self, objective: str) -> LatencyTable:
        """The latency table of `latency_ms` or `latency_ms@NAME`; raises LatencyError where there is none for these
        slots and choices.
        """
        check_name(objective)
        table = read_table(table_path(self.path, objective))
        table.check_space(self.space)
        return table

    @property
    def is_untimed(self) -> bool:
        """Whether the search, or a bound of it, wants this machine's latency table and there is none yet."""
        return LATENCY in self._names() and not table_path(self.path, LATENCY).exists()

    def table_path(self, objective: str, index: int, size: tuple[int, int]) -> Path:
        """Where the table of an objective is; every size but the first has the size in its name."""
        path = table_path(self.path, objective)
        return path.with_name(f"{path.stem}-{size[0]}x{size[1]}.json") if index else path

    def make_table(self, objective: str, index: int, size: tuple[int, int], control: Control) -> Path:
        """Time every choice of the study as its `latency` says and write the table; the files are removed then."""
        check_name(objective)
        path = self.table_path(objective, index, size)
        table = self.profile(path.with_suffix(".files"), size, control)
        assert table is not None
        write_table(path, table)
        remove_bundle(path.with_suffix(".files"))
        control.say(f"profile: {path}: {table.quality}")
        return path

    def profile(self, folder: Path, size: tuple[int, int], control: Control, *,
                files_only: bool = False) -> LatencyTable | None:
        """`profile_space` in `folder` as the study's `latency` says, at another size; raises Interrupted."""
        settings = self.study.latency
        table = profile_space(
            self.skeleton, self.space, folder, runtime=settings.runtime, threads=self.study.threads, height=size[0],
            width=size[1], repeats=settings.repeats, passes=settings.passes, checks=settings.checks,
            seed=self.study.seed, files_only=files_only, say=control.say, should_stop=control.should_stop,
            on_write=lambda done, total: control.progress("export", done, total, "files"),
            on_time=lambda done, total: control.progress("profile", done, total, "groups of files"))
        control.require(files_only or table is not None, "profile")
        return table
