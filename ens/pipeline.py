"""The whole program, one function a verb, in the order the data flows. Read this file first.

    task ─► train ─► distill ─► search ─► pareto ─► finetune ─► export ─► restore

A run folder holds `study.yaml`, `teacher/`, `library/`, `archive.db`, the front, `finetune/` and `export/`. Every verb
skips what is already there and continues what was interrupted.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from ens.atomic import write_atomic
from ens.config import StudyConfig, open_run, save_run
from ens.data.images import ImageError, Photo, read_photo, to_float, to_pixels, write_photo
from ens.data.pairs import Patches, ValidationSet, load_validation_set
from ens.data.tasks import Task
from ens.distill.blockwise import create_surrogate, distill_library
from ens.distill.fit import Phase, Progress, start_processes, train_network
from ens.distill.library import BUILTIN, Library, LibraryError, open_library
from ens.distill.losses import TaughtLoss, l1_loss
from ens.evaluate.cost import count_cost
from ens.evaluate.crops import draw_crops
from ens.evaluate.evaluator import Evaluation, evaluate_protocols, mean_psnr_db
from ens.evaluate.metrics import score_input
from ens.evaluate.protocols import find_protocol, task_protocols
from ens.evaluate.receptive_field import EnergyMap, draw_receptive_fields, measure_receptive_field
from ens.export.formats import ExportError, export_onnx, write_card
from ens.export.hybrid import load_hybrid, read_facts, save_hybrid
from ens.networks.checkpoints import load_checkpoint, remove_state, save_checkpoint
from ens.networks.steps import Network, pad_to_multiple
from ens.objectives import add_quality, reference_point
from ens.pareto.archive import Archive, acquire_lock, mark_invalid, open_archive, read_archive
from ens.pareto.report import write_csv, write_markdown, write_png, write_report
from ens.pareto.selection import Front, pick_genotype, select_front
from ens.runtime.session import open_session, restore_files
from ens.search import create_engine
from ens.search.loop import run_search
from ens.space import Genotype, Measurement, SearchSpace, format_genotype, parse_genotype
from ens.study import (
    build_evaluator,
    build_genotype,
    check_study,
    choose_device,
    create_study_network,
    load_patches,
    load_validation,
    open_location,
    open_study_library,
    read_space,
    read_task,
)


class Interrupted(RuntimeError):
    """The user stopped the work; all state is on disk and the same command continues it."""


@dataclass(frozen=True)
class Control:
    """What every verb reports to and asks: `progress(verb, done, total, note)`, `say(line)`, `should_stop()`."""

    progress: Callable[[str, int, int, str], None] = lambda verb, done, total, note: None
    say: Callable[[str], None] = lambda line: None
    should_stop: Callable[[], bool] = lambda: False


QUIET = Control()


def train(study: StudyConfig, out: Path, control: Control = QUIET) -> Network:
    """Bring the teacher: the study's own (checkpoint or `builtin:NAME`), or train one from scratch into `teacher/`."""
    check_study(study)
    _hold(out)
    save_run(out, study)
    if study.device == "auto" and choose_device(study) == "cpu":
        control.say("device: auto takes the CPU, torch sees no GPU")
    if study.teacher:
        return open_location(study.teacher)
    path = out / "teacher" / "teacher.safetensors"
    if path.exists():
        control.say(f"train: skipped, {path} is there")
        return load_checkpoint(path)
    start_processes(choose_device(study))
    torch.manual_seed(study.seed)
    network, taught_by = create_study_network(study), study.train.taught_by
    _fit(network, load_patches(study, network, purpose=0), study, "train", out / "teacher" / "train.pt", control,
         taught_by=open_location(taught_by) if taught_by else None, identity={"task": str(read_task(study))})
    save_checkpoint(path, network, facts={"task": str(read_task(study)), "steps": str(study.train.steps)})
    return network


def distill(study: StudyConfig, out: Path, control: Control = QUIET) -> Library:
    """Align every surrogate of the space with its slot of the teacher; returns the library."""
    library = open_study_library(study, out, train(study, out, control))
    teacher = library.load_teacher()
    space = read_space(study, teacher)
    jobs = [(teacher.slot(slot.name), choice) for slot in space.slots for choice in slot.choices[1:]]
    missing = sum(not library.has(spec.name, choice) for spec, choice in jobs)
    if not missing:
        control.say(f"distill: skipped, all {len(jobs)} surrogates are in {library.root.name}")
        return library
    if study.library:
        raise LibraryError(f"{study.library} lacks {missing} of the {len(jobs)} surrogates of {study.name}; "
                           "leave `library` out to distil them")
    settings, patches = study.distill, load_patches(study, teacher, purpose=1)
    complete = distill_library(
        teacher.to(choose_device(study)), library, patches, jobs, steps=settings.steps, batch_size=settings.batch_size,
        patch_px=settings.patch_px, lr=settings.lr, group_size=settings.group_size, seed=study.seed,
        device=choose_device(study), should_stop=control.should_stop,
        macs=lambda spec, blocks: count_cost(
            blocks, (1, spec.channels, 256 // spec.downscale, 256 // spec.downscale)).macs,
        on_progress=lambda done, total, error: control.progress("distill", done, total, f"error {error:.3f}"))
    if not complete:
        raise Interrupted("distill")
    return library


def search(study: StudyConfig, out: Path, control: Control = QUIET, *, storage: str = "") -> list[Measurement]:
    """Measure genotypes until the budget of unique evaluations is spent; every one is in `archive.db` at once."""
    library = distill(study, out, control)
    evaluator, space, images = build_evaluator(study, library)
    teacher = evaluator.measure(space.teacher)
    settings = study.search
    manifest = {"study": study.name, "seed": study.seed, "engine": settings.engine, "batch_size": settings.batch_size,
                "protocol": task_protocols(read_task(study))[0].name, "data": str(images.fingerprint),
                "library": library.hash_of(space),
                "reference": list(reference_point(settings.objectives, teacher_values=[
                    _with_objectives(teacher, space, teacher).values[name] for name in settings.objectives]))}
    with open_archive(storage or out / "archive.db", space=space, objectives=settings.objectives,
                      manifest=manifest) as archive:
        known = archive.known()
        if len(known) >= settings.budget:
            control.say(f"search: skipped, {len(known)} genotypes are measured")
            return archive.measurements()
        if known:
            control.say(f"search: goes on after {len(known)} genotypes")

        def record(measurement: Measurement) -> None:
            archive.record(measurement)
            if control.should_stop():
                raise Interrupted("search")

        return run_search(
            engine=create_engine(settings.engine, space, seed=study.seed), objectives=settings.objectives, known=known,
            evaluate=lambda genotypes: (_with_objectives(measurement, space, teacher)
                                        for measurement in evaluator.evaluate(genotypes)),
            record=record, budget=settings.budget, batch_size=settings.batch_size,
            progress=lambda done, total: control.progress("search", done, total, "genotypes"))


def pareto(out: Path, control: Control = QUIET, *, storage: str = "") -> tuple[Front, SearchSpace, Archive]:
    """Write `front.csv`, `front.md`, `front.png` and `report.html` of a run; returns the front."""
    study = open_run(out)
    library = open_study_library(study, out, None)
    teacher = library.load_teacher()
    space = read_space(study, teacher)
    archive = read_archive(storage or out / "archive.db")
    measurements = archive.measurements()
    front = select_front(measurements, archive.objectives)
    title = f"{study.name}: {' against '.join(front.objectives)}"
    write_csv(out / "front.csv", front=front, space=space)
    write_markdown(out / "front.md", title=title, front=front)
    write_png(out / "front.png", title=title, measurements=measurements, front=front)
    manifest = archive.manifest
    some = front.members[0]
    teacher_psnr_db = statistics.fmean(some.psnr_db) + some.values["psnr_drop_db"]
    facts = {"protocol": manifest["protocol"], "data": manifest["data"], "engine": manifest["engine"],
             "seed": str(manifest["seed"]), "teacher": f"{teacher_psnr_db:.2f} dB",
             "library": manifest["library"][:12]}
    write_report(out / "report.html", title=title, space=space, measurements=measurements, front=front,
                 reference=manifest["reference"], facts=facts,
                 crops=draw_crops(_chosen(teacher, space, library, front), load_validation(study, teacher),
                                  task_protocols(read_task(study))[0]))
    control.say(f"pareto: wrote front.csv, front.md, front.png and report.html to {out}")
    return front, space, archive


def finetune(out: Path, pick: str = "knee", control: Control = QUIET, *, storage: str = "", taught_by: str = "",
             taught_weight: float | None = None) -> Path:
    """Train one hybrid of the front end to end with L1 plus the teacher's output; returns its safetensors file.

    `taught_by` (a checkpoint, by default the run's own teacher) and `taught_weight` (0 to 1) replace those of the
    study. The PSNR before and after, on the run's validation images, is recorded in the file.
    """
    study = open_run(out)
    settings = study.finetune
    settings = dataclasses.replace(settings, taught_by=taught_by or settings.taught_by, taught_weight=(
        settings.taught_weight if taught_weight is None else taught_weight))
    study = dataclasses.replace(study, finetune=settings)
    _hold(out)
    library = open_study_library(study, out, None)
    teacher, space, genotype = _picked(study, out, library, pick, storage)
    path = out / "finetune" / f"{format_genotype(genotype)}.safetensors"
    if path.exists():
        control.say(f"finetune: skipped, {path} is there")
        return path
    hybrid = build_genotype(teacher, space, library, genotype)
    images, protocol = load_validation(study, teacher), task_protocols(read_task(study))[0]
    before = mean_psnr_db(hybrid, images, protocol)
    _fit(hybrid, load_patches(study, teacher, purpose=2), study, "finetune", path.with_suffix(".pt"), control,
         taught_by=open_location(settings.taught_by) if settings.taught_by else teacher,
         identity={"genotype": format_genotype(genotype), "library": library.hash_of(space)})
    figures = {"psnr_db_before": before, "psnr_db_after": mean_psnr_db(hybrid.cpu(), images, protocol),
               "psnr_db_teacher": mean_psnr_db(teacher.cpu(), images, protocol)}
    save_hybrid(path, hybrid, choices=space.replaced(genotype),
                facts=_facts(study, library, space, genotype, images, figures))
    remove_state(path.with_suffix(".pt"))
    return path


def export(out: Path, pick: str = "knee", control: Control = QUIET, *, storage: str = "") -> Path:
    """Write one hybrid as ONNX, safetensors and a YAML card; its fine-tuned weights where there are some.

    Returns the ONNX file, which appears only after ONNX Runtime has reproduced it.
    """
    study = open_run(out)
    _hold(out)
    library = open_study_library(study, out, None)
    teacher, space, genotype = _picked(study, out, library, pick, storage)
    name = format_genotype(genotype)
    tuned = out / "finetune" / f"{name}.safetensors"
    images = load_validation(study, teacher)
    hybrid = load_hybrid(tuned) if tuned.exists() else build_genotype(teacher, space, library, genotype)
    figures = {} if tuned.exists() else {"psnr_db": mean_psnr_db(hybrid, images, task_protocols(read_task(study))[0])}
    facts = dict(read_facts(tuned)) if tuned.exists() else _facts(study, library, space, genotype, images, figures)
    target = out / "export" / f"{name}.onnx"
    save_hybrid(target.with_suffix(".safetensors"), hybrid, choices=space.replaced(genotype), facts=facts)
    try:
        parity = export_onnx(hybrid, target, photo=images.images[0].degraded[None], facts=facts)
    except ExportError as error:
        mark_invalid(storage or out / "archive.db", genotype, f"export failed: {error}")
        raise ExportError(f"{error}; {name} is marked invalid and leaves the front") from error
    write_card(target.with_suffix(".yaml"), {**facts, "onnx_relative_error": f"{parity:.1e}"}, model=target.name)
    control.say(f"export: {target} agrees with PyTorch to {parity:.1e}")
    return target


def degrade(source: Path, target: Path, task: Task) -> Photo:
    """Write the degraded version of one clean photo as the task's validation would have it; returns it as written."""
    clean = task.prepare(to_float(read_photo(source).pixels))
    photo = Photo(to_pixels(task.degrade_for_validation(clean, 0).clip(0, 1)))
    write_photo(target, photo)
    return photo


def restore(model: Path | str, source: Path, target: Path, control: Control = QUIET, *, tile_px: int | None = None,
            overlap_px: int = 32, threads: int | None = None) -> list[ImageError]:
    """Restore an image, or every image of a folder, with any file that holds a network; returns the failed ones."""
    return restore_files(open_session(model, threads=threads), source, target, tile_px=tile_px, overlap_px=overlap_px,
                         on_event=control.say,
                         on_progress=lambda done, total, name: control.progress("restore", done, total, name))


def evaluate(model: Path | str, data: str, task: Task, control: Control = QUIET, *, protocol: str = "",
             crop_px: int | None = None, limit: int | None = None, threads: int | None = None) -> list[Evaluation]:
    """Score a checkpoint, hybrid or exported file (`builtin:NAME` for a shipped teacher) on a folder of images.

    One evaluation a protocol: the named one, or all that people quote for the task, its own first.
    """
    rules = [find_protocol(protocol, scale=task.scale)] if protocol else task_protocols(task)
    if str(model).startswith(BUILTIN):
        network = open_library(str(model)).load_teacher()
        restore: Callable[[Tensor], Tensor] = network
        channels, upscale = network.in_channels, network.upscale
    else:
        session = open_session(model, threads=threads)
        restore, channels, upscale = session.restore, session.channels, session.upscale
    if upscale != task.scale:
        raise ValueError(f"{model} enlarges {upscale} times, the task {task.scale} times")
    images = load_validation_set(data, task, channels=channels, crop_px=crop_px, limit=limit)
    scores = evaluate_protocols(restore, images, rules,
                                on_progress=lambda done, total: control.progress("evaluate", done, total, "images"))
    names = tuple(image.name for image in images.images)
    return [Evaluation(rule.name, str(images.fingerprint), names, tuple(
        score_input(image.degraded, image.clean, rule) for image in images.images if task.scale == 1), tuple(outputs))
        for rule, outputs in zip(rules, scores, strict=True)]


def inspect_erf(out: Path, slot: str, target: Path, control: Control = QUIET) -> dict[str, dict[str, EnergyMap]]:
    """Draw the effective receptive field of a slot: the teacher's and every surrogate's, before and after training.

    Choice -> state -> map; surrogates stand before distillation, after it, and after a fine-tuning of this run where
    one uses them. Features are the slot's own on the first four validation images. Writes the PNG `target`.
    """
    study = open_run(out)
    library = open_study_library(study, out, None)
    teacher = library.load_teacher()
    spec, space = teacher.slot(slot), read_space(study, teacher)
    names, task = [one.name for one in space.slots], read_task(study)
    if slot not in names:
        raise ValueError(f"{study.name} does not search slot {slot!r}; it searches {', '.join(names)}")
    images = load_validation_set(study.data.validation, task, channels=teacher.in_channels, limit=4,
                                 crop_px=_ERF_CROP_PX * task.scale)
    position = names.index(slot)
    choices = space.slots[position].choices
    tuned = {choices[parse_genotype(path.stem, space)[position]].label: load_hybrid(path)
             for path in sorted((out / "finetune").glob("*.safetensors"))}

    def measure(network: Network, module: nn.Module) -> EnergyMap:
        return measure_receptive_field(module, [network.capture(
            pad_to_multiple(image.degraded[None], network.size_multiple), [slot])[slot][0] for image in images.images])

    maps = {choices[0].label: {"teacher": measure(teacher, teacher.get_submodule(spec.module))}}
    for done, choice in enumerate(choices[1:], 1):
        maps[choice.label] = {"before": measure(teacher, create_surrogate(teacher, spec, choice, seed=study.seed))}
        if not library.missing(slot, choice):
            maps[choice.label]["distilled"] = measure(teacher, library.load_surrogate(spec, choice))
        if choice.label in tuned:
            hybrid = tuned[choice.label]
            maps[choice.label]["fine-tuned"] = measure(hybrid, hybrid.get_submodule(spec.module))
        control.progress("inspect", done, len(choices) - 1, choice.label)
    write_atomic(target, draw_receptive_fields(f"{study.name}, {slot}: 1 px is {spec.downscale} px of the image", maps))
    return maps


def run(study: StudyConfig, out: Path, control: Control = QUIET, *, pick: str = "knee", storage: str = "") -> Path:
    """Whatever is still missing, in order: train, distill, search, pareto, finetune, export; returns the ONNX file."""
    search(study, out, control, storage=storage)
    front, space, _ = pareto(out, control, storage=storage)
    genotype = format_genotype(pick_genotype(pick, front=front, space=space))
    target = out / "export" / f"{genotype}.onnx"
    if target.exists():
        control.say(f"finetune, export: skipped, {target} is there")
        return target
    finetune(out, genotype, control, storage=storage)
    return export(out, genotype, control, storage=storage)


_ERF_CROP_PX = 256
_held: dict[Path, FileLock] = {}


def _hold(out: Path) -> None:
    """Keep other processes from writing to this run folder until this one ends; raises ArchiveLocked."""
    if os.environ.get("RANK", "0") == "0" and out.resolve() not in _held:
        _held[out.resolve()] = acquire_lock(out / "run")


def _fit(network: Network, patches: Patches, study: StudyConfig, verb: str, checkpoint: Path, control: Control, *,
         taught_by: Network | None, identity: Mapping[str, str]) -> None:
    """Train or fine-tune as the study says; raises Interrupted when stopped, with all state in `checkpoint`."""
    settings = study.train if verb == "train" else study.finetune
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = l1_loss
    taught: dict[str, str] = {}
    if taught_by is not None:
        weight = settings.taught_weight
        taught = {"taught": f"{weight} by {settings.taught_by or 'its own teacher'}"}
        loss = TaughtLoss(taught_by.to(choose_device(study)), weight=weight)
        control.say(f"{verb}: the loss is {1 - weight:g}·L1 to the target + {weight:g}·L1 to the teacher's output")

    def report(progress: Progress) -> None:
        skipped = f", {progress.skipped} skipped" if progress.skipped else ""
        control.progress(verb, progress.step, progress.steps, f"loss {progress.loss:.4f}{skipped}")

    fit = train_network(
        network, patches, checkpoint=checkpoint, loss=loss, phases=[Phase(*phase) for phase in settings.phases],
        steps=settings.steps, lr=settings.lr, lr_final=settings.lr_final, warmup_steps=settings.warmup_steps,
        clip_norm=settings.clip_norm, ema_decay=settings.ema_decay, device=choose_device(study),
        identity=taught | {"seed": str(study.seed), **identity}, on_progress=report, should_stop=control.should_stop)
    if not fit.complete:
        raise Interrupted(verb)


def _with_objectives(measurement: Measurement, space: SearchSpace, teacher: Measurement) -> Measurement:
    values = {**measurement.values, "penalty": space.penalty(measurement.genotype)}
    return add_quality(dataclasses.replace(measurement, values=values), teacher_psnr_db=teacher.psnr_db)


def _picked(study: StudyConfig, out: Path, library: Library, pick: str,
            storage: str) -> tuple[Network, SearchSpace, Genotype]:
    teacher = library.load_teacher()
    space = read_space(study, teacher)
    archive = read_archive(storage or out / "archive.db")
    front = select_front(archive.measurements(), archive.objectives)
    return teacher, space, pick_genotype(pick, front=front, space=space)


def _facts(study: StudyConfig, library: Library, space: SearchSpace, genotype: Genotype, images: ValidationSet,
           figures: Mapping[str, float]) -> dict[str, str]:
    """What a hybrid's file says of itself."""
    return {"study": study.name, "genotype": format_genotype(genotype), "task": str(read_task(study)),
            "protocol": task_protocols(read_task(study))[0].name, "validation": str(images.fingerprint),
            "teacher_sha256": library.teacher_sha256, "library_sha256": library.hash_of(space),
            **{slot.name: choice.label for slot, choice in zip(space.slots, space.choices(genotype), strict=True)},
            **{name: f"{value:.3f}" for name, value in figures.items()}}


def _chosen(teacher: Network, space: SearchSpace, library: Library, front: Front) -> dict[str, nn.Module]:
    """The networks whose pictures the report shows: the teacher, the knee and its two nearest."""
    chosen = {front.role(index): front.members[index].genotype for index in (front.knee, *front.nearest[:2])}
    return {"teacher": teacher, **{role: build_genotype(teacher, space, library, genotype)
                                   for role, genotype in chosen.items()}}
