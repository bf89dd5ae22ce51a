"""RunFolder: a study, opened, and where the files of its run are.

    study.yaml  teacher/  library/  latency/  archive.db  front.csv …  report.html  finetune/  export/
"""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from torch import nn

from ens.atomic import sweep, write_atomic
from ens.config import ConfigError, StudyConfig, check_same_run, dump_study, load_study
from ens.distill.blockwise import create_surrogate
from ens.evaluate.evaluator import Evaluator, list_input_psnr_db, list_psnr_db
from ens.export.hybrid import HybridFiles, load_hybrid, read_facts
from ens.networks.checkpoints import remove_state
from ens.networks.steps import Network
from ens.networks.weight_files import CheckpointError
from ens.objectives import QUALITY, find_objective, mean_psnr_db
from ens.opened_study import OpenedStudy
from ens.pareto.archive import Archive, mark_invalid, open_archive, read_archive, record_tuned
from ens.pareto.baseline import Baseline
from ens.pareto.selection import (
    Front,
    check_pick,
    keep_within,
    nearest_members,
    pick_genotype,
    pick_objectives,
    select_front,
)
from ens.pareto.storage import Storage, acquire_lock
from ens.runtime.process import QUIET
from ens.space import Genotype, format_genotype, parse_genotype

RUN_FILE = "study.yaml"
_MADE = ("teacher", "library", "archive.db")
_held: dict[Path, FileLock] = {}


class RunFolder(OpenedStudy):
    """One run on disk: what its study names (see OpenedStudy), its lock, its archive and its files.

    Made by `start` (a study and the folder it runs in) or `reopen` (a folder with a study). `storage` is where the
    archive is, `archive.db` unless given; with `restart`, states of unfinished trainings are dropped when the folder is
    held.
    """

    def __init__(self, path: Path, study: StudyConfig, *, storage: str = "", restart: bool = False,
                 say: Callable[[str], None] = QUIET.say) -> None:
        super().__init__(path, study, say)
        self.restart = restart
        self.storage: str | Path = storage or path / "archive.db"
        self.hybrids = HybridFiles(path)
        self._archive: Archive | None = None

    @classmethod
    def start(cls, study: StudyConfig, path: Path, *, storage: str = "", pick: str = "", restart: bool = False,
              wait_s: float = 0, say: Callable[[str], None] = QUIET.say) -> Self:
        """Take a folder for a study, or go on where it ran before; everything the study names is checked first, and
        the `pick` that is to be fine-tuned in the end. A mistake leaves the folder as it was.

        Raises ConfigError, with the differences, where another study ran there: only the budget, the device, threads,
        report images and fine-tuning may change once something was made. Raises ArchiveLocked where another process
        writes to the folder, after `wait_s`.
        """
        run, file = cls(path, study, storage=storage, restart=restart, say=say), path / RUN_FILE
        Storage(run.storage).check()
        made = file.exists() and any((path / name).exists() for name in _MADE)
        if not made or check_same_run(load_study(file), study, path):
            run.check(tuned=bool(pick))
        if pick:
            check_pick(pick, run.space)
        run.hold(wait_s)
        write_atomic(file, dump_study(study).encode())
        return run

    @classmethod
    def reopen(cls, path: Path, changes: Mapping[str, Any] | None = None, *, storage: str = "",
               restart: bool = False) -> Self:
        """Open the run in a folder; `changes` replace keys of its study in this process. Raises ConfigError."""
        if not (path / RUN_FILE).exists():
            raise ConfigError(f"{path} is not a run folder: it has no {RUN_FILE}; "
                              f"`ens search SPACE.yaml --out {shlex.quote(str(path))}` makes one")
        study = load_study(path / RUN_FILE, changes)
        if changes:
            check_same_run(load_study(path / RUN_FILE), study, path)
        return cls(path, study, storage=storage, restart=restart)

    def hold(self, wait_s: float = 0) -> None:
        """Keep other processes from writing to this folder until `release` or the end of this one, and sweep up what
        killed ones left; raises ArchiveLocked where another has it for longer than `wait_s`.
        """
        if os.environ.get("RANK", "0") != "0" or self.path.resolve() in _held:
            return
        _held[self.path.resolve()] = acquire_lock(self.path / "run", wait_s=wait_s, on_wait=lambda holder: self.say(
            f"waits for {holder}, which writes to {self.path}") if wait_s else None)
        sweep(self.path)
        for state in self._states() if self.restart else ():
            remove_state(state)

    def release(self) -> None:
        """Let other processes write to this folder: whoever only measures writes to the archive alone."""
        if lock := _held.pop(self.path.resolve(), None):
            lock.release()

    def _states(self) -> list[Path]:
        """States of unfinished trainings."""
        return [self.teacher_state, self.distill_state, *self.path.glob("finetune/*.pt")]

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
    def ends(self) -> Baseline:
        """What teacher and doing nothing reach on the validation images; ValueError where no search can use that."""
        self.say(f"the teacher restores {len(self.validation.images)} validation images")
        teacher = list_psnr_db(copy.deepcopy(self.teacher).to(self.device), self.validation, self.protocol)
        return Baseline(teacher, list_input_psnr_db(self.validation, self.protocol), {}).check()

    @cached_property
    def baseline(self) -> Baseline:
        """`ends` with what the teacher costs: the archive's, where there is one."""
        found = self.archive.baseline if self.has_archive else None
        return found.check() if found else replace(
            self.ends, values={name: meter.measure(self.space.teacher) for name, meter in self.meters.items()})

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
    def budget(self) -> int:
        """Genotypes to measure: the study's budget, or all there are; those recorded before a bound was set count."""
        bounded = self.bounded
        outside = sum(not bounded.allows(genotype) for genotype in self.archive.known()) if self.has_archive else 0
        return min(self.study.search.budget, bounded.num_genotypes + outside)

    @property
    def is_searched(self) -> bool:
        """Whether the budget is spent; raises ArchiveMismatch where the archive is of another configuration."""
        if not self.has_archive:
            return False
        self.archive.check(self.identity)
        return len(self.archive.known()) >= self.budget

    def front(self, objectives: tuple[str, ...] = ()) -> Front:
        """The front of any two or three objectives, the search's by default: measured ones, or costs that are known
        without. What exceeds a bound of the study (`search.max`) or is not fixed or forbidden by it is left out.
        """
        archive, names = self.archive, objectives or self.archive.objectives
        meters = {name: str(text) for name, text in archive.manifest.get("meters", {}).items()}
        measured, baseline, bounds = archive.measurements(), archive.baseline, self.study.search.max
        for name in {*names, *bounds} - {QUALITY}:
            if find_objective(name) and any(one.valid and name not in one.values for one in measured):
                meter = self.meter(name)
                meters[name] = meter.identity
                measured = [replace(one, values={**one.values, name: meter.measure(one.genotype)}) for one in measured]
                baseline = baseline and replace(baseline, values={**baseline.values,
                                                                  name: meter.measure(archive.space.teacher)})
        allowed = self.restricted.allows
        if not (kept := [one for one in measured if allowed(one.genotype)]):
            raise ValueError("no genotype that was measured keeps to what `search.fix` and `search.forbid` leave")
        return select_front(keep_within(kept, bounds), names, baseline=baseline, meters=meters)

    def shown_networks(self, front: Front, indices: Sequence[int]) -> dict[str, Network]:
        """The teacher and these members of a front, also fine-tuned where they were, by what they are."""
        shown = {"teacher": self.teacher}
        for index in indices:
            genotype, name = front.members[index].genotype, front.describe(index)
            shown[name] = self.build(genotype)
            if tuned := self.best_tuned(genotype):
                shown[f"fine-tuned: {name}"] = load_hybrid(tuned)
        return shown

    def pick(self, pick: str) -> Genotype:
        """What `knee`, `near 1`, `fastest-within=0.1` or a genotype as text means (`PICKS`); raises ValueError."""
        front = self.front(pick_objectives(pick, self.archive.objectives))
        return self.space.check_open(pick_genotype(pick, front=front, space=self.archive.space))

    @property
    def is_drawn(self) -> bool:
        """Whether the report shows the archive as it is now."""
        from ens.pareto.report import drawn_fingerprint

        return drawn_fingerprint(self.path / "report.html") == self.archive.fingerprint

    def mark_invalid(self, genotype: Genotype, reason: str) -> None:
        """Take a genotype off the front, "" puts it back; it stays in the archive with the reason."""
        if not reason and genotype not in self.archive.marked:
            return
        mark_invalid(self.storage, genotype, reason)
        self._archive = None

    def blame(self, genotype: Genotype, error: Exception, suffix: str) -> str:
        """Mark a genotype whose ONNX file differs from PyTorch, unless its own training may be to blame; say which."""
        name = format_genotype(genotype)
        if self.best_tuned(genotype):
            return f"{name} stays on the front: fine-tune it by another recipe"
        if suffix != ".onnx":
            return f"{name} stays on the front: its other files may do"
        self.mark_invalid(genotype, f"export failed: {error}")
        return f"{name} is marked invalid and leaves the front"

    def exclude(self, genotype: Genotype, hybrid: Network, suffix: str) -> str:
        """Mark every genotype that has what this one's ONNX file fails on; say which slots these are."""
        from ens.export.culprits import list_culprits

        slots = {slot.name: place for place, slot in enumerate(self.space.slots)}
        found = list_culprits(hybrid, list(slots), suffix)
        named = ", ".join(f"{name} ({self.space.slots[slots[name]].choices[genotype[slots[name]]].label})"
                          for name in found)
        if not found or suffix != ".onnx":
            return f"the cause is {named}" if found else "no slot is the cause, so it lies between them"
        alike = [other for other in self.archive.known() if any(
            other[slots[name]] == genotype[slots[name]] for name in found)]
        for other in alike:
            self.mark_invalid(other, f"export failed on {named}")
        return f"the cause is {named}; the {len(alike)} genotypes with it are marked invalid and leave the front"

    def unmark(self, text: str) -> None:
        """Put a genotype back that was marked invalid after its measurement; raises ValueError where it was not."""
        marked = self.archive.marked
        if (genotype := parse_genotype(text, self.archive.space)) not in marked:
            raise ValueError(f"{text} is not marked; " + (f"marked are {', '.join(map(format_genotype, marked))}"
                                                          if marked else "no genotype is"))
        self.mark_invalid(genotype, "")

    def candidates(self, pick: str) -> list[Genotype]:
        """The pick and the front's members nearest to it, `finetune.candidates` in all."""
        return nearest_members(self.front(), self.pick(pick), count=self.study.finetune.candidates)

    def tuned_path(self, genotype: Genotype) -> Path:
        """Where a genotype goes that is fine-tuned by the study's recipe."""
        return self.hybrids.tuned(genotype, self.recipe(self.study.finetune).key)

    def tuned_psnr_db(self, path: Path) -> float:
        """Mean validation PSNR in dB that a fine-tuned file reports; raises CheckpointError for another file."""
        try:
            return float(read_facts(path)["psnr_db_after"])
        except KeyError:
            raise CheckpointError(path, "reports no fine-tuning; move it away, and it is tuned anew") from None

    def best_tuned(self, genotype: Genotype) -> Path | None:
        """File of the best fine-tuning of a genotype by validation PSNR; None where there is none."""
        tuned = self.archive.tuned.get(genotype)
        path = self.hybrids.tuned(genotype, tuned.recipe) if tuned else None
        return path if path and path.exists() else None

    def record_tuned(self, genotype: Genotype, figures: Mapping[str, Sequence[float]]) -> None:
        """Keep what a fine-tuning reached in the archive."""
        report = {name.removeprefix("report_psnr_db_"): mean_psnr_db(values) for name, values in figures.items()
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
                **{name: f"{mean_psnr_db(values):.3f}" for name, values in figures.items() if values}}

    def load_finished(self, genotype: Genotype, say: Callable[[str], None]) -> tuple[Network, dict[str, str]]:
        """The hybrid to export, fine-tuned where it was, and what its files say; it is said where it was not."""
        if tuned := self.best_tuned(genotype):
            return load_hybrid(tuned), read_facts(tuned)
        say("export: " + ("without fine-tuning; `ens finetune` first gives a better file" if any(genotype) else
                          "this genotype is the teacher itself, no slot is replaced"))
        hybrid = self.build(genotype)
        return hybrid, self.facts(genotype, self.judge.judge(hybrid, "before"))

    def slot_states(self, slot: str) -> dict[str, dict[str, tuple[Network, nn.Module | None]]]:
        """Choice -> state (teacher; before, distilled, fine-tuned) -> a network, and what fills the slot in it instead
        of its own. Raises ValueError for a slot that is not searched.
        """
        names = [one.name for one in self.space.slots]
        if slot not in names:
            raise ValueError(f"{self.study.name} does not search slot {slot!r}; it searches {', '.join(names)}")
        position, spec = names.index(slot), self.skeleton.slot(slot)
        own, *choices = self.space.slots[position].choices
        tuned = {parse_genotype(read_facts(path)["genotype"], self.space)[position]: path
                 for path in self.hybrids.list_tuned()}
        found: dict[str, dict[str, tuple[Network, nn.Module | None]]] = {own.label: {"teacher": (self.teacher, None)}}
        for index, choice in enumerate(choices, 1):
            before = create_surrogate(self.teacher, spec, choice, seed=self.study.seed)
            states = found[choice.label] = {"before": (self.teacher, before)}
            if not self.library.missing(slot, choice):
                states["distilled"] = (self.teacher, self.surrogate(spec, choice))
            if index in tuned:
                states["fine-tuned"] = (load_hybrid(tuned[index]), None)
        return found


def describe_harm(name: str, facts: Mapping[str, str]) -> list[str]:
    """A line where a fine-tuned hybrid restores worse than doing nothing."""
    after, given = facts["psnr_db_after"], facts.get("psnr_db_input", "-inf")
    return [f"finetune: warning, {name} restores to {after} dB, below the degraded input's {given} dB"] if (
        float(after) < float(given)) else []
