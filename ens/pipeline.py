"""The whole program, one function a verb, in the order the data flows. Read this file first.

    task ─► train ─► distill ─► search ─► pareto ─► finetune ─► export ─► restore

A verb gets a `RunFolder` and asks it for what it needs; it skips what is there and continues what was interrupted. What
takes long to import is imported by the verb that needs it: a finished run ends at once.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from ens.atomic import write_atomic
from ens.data.pairs import load_validation_set
from ens.data.tasks import Task
from ens.distill.blockwise import create_surrogate, distill_library
from ens.distill.fit import start_processes, train_network
from ens.distill.library import Library, LibraryError
from ens.evaluate.evaluator import Evaluation, evaluate_protocols
from ens.evaluate.protocols import find_protocol, task_protocols
from ens.export.hybrid import load_hybrid, open_network, read_facts, save_hybrid
from ens.networks.checkpoints import remove_state, save_checkpoint
from ens.pareto.selection import Front
from ens.run_folder import RunFolder
from ens.runtime.process import QUIET, Control
from ens.space import Genotype, Measurement, format_genotype, parse_genotype

if TYPE_CHECKING:
    from ens.evaluate.receptive_field import EnergyMap


def train(run: RunFolder, control: Control = QUIET) -> None:
    """Bring the teacher: the study's own (checkpoint or `builtin:NAME`), or train one from scratch into `teacher/`."""
    if run.study.device == "auto" and run.device == "cpu":
        control.say("device: auto takes the CPU, torch sees no GPU")
    if (given := run.study.teacher or run.study.library) or run.teacher_path.exists():
        control.say(f"train: skipped, the teacher is {given or run.teacher_path}")
        return
    start_processes(run.device)
    torch.manual_seed(run.study.seed)
    network, state, recipe = run.create_network(), run.teacher_path.with_name("train.pt"), run.recipe(run.study.train)
    fit = train_network(network, run.patches("train"), recipe=recipe, checkpoint=state, device=run.device,
                        taught_by=open_network(recipe.taught_by) if recipe.taught_by else None,
                        identity={"task": str(run.task)}, on_progress=control.follow("train"),
                        should_stop=control.should_stop)
    control.require(fit.complete, "train")
    save_checkpoint(run.teacher_path, network, facts={"task": str(run.task), "steps": str(recipe.steps)})
    remove_state(state)


def distill(run: RunFolder, control: Control = QUIET) -> Library:
    """Align every surrogate of the space with its slot of the teacher; returns the library."""
    train(run, control)
    library, jobs, settings = run.library, run.jobs, run.study.distill
    if not (missing := sum(not library.has(spec.name, choice) for spec, choice in jobs)):
        control.say(f"distill: skipped, all {len(jobs)} surrogates are in {library.root.name}")
        return library
    if run.study.library:
        raise LibraryError(f"{run.study.library} lacks {missing} of the {len(jobs)} surrogates of {run.study.name}; "
                           "leave `library` out to distil them")
    complete = distill_library(
        run.teacher, library, run.patches("distill"), jobs, steps=settings.steps, batch_size=settings.batch_size,
        patch_px=settings.patch_px, lr=settings.lr, group_size=settings.group_size, seed=run.study.seed,
        device=run.device, should_stop=control.should_stop,
        on_progress=lambda done, total, error: control.progress("distill", done, total, f"error {error:.3f}"))
    control.require(complete, "distill")
    return library


def search(run: RunFolder, control: Control = QUIET) -> list[Measurement]:
    """Measure genotypes until the budget of unique evaluations is spent; every one is in the archive at once."""
    distill(run, control)
    if run.is_searched:
        control.say(f"search: skipped, {len(run.archive.known())} genotypes are measured")
        return run.archive.measurements()
    from ens.search import create_engine
    from ens.search.loop import run_search

    settings = run.study.search
    with run.recording() as archive:
        if archive.known():
            control.say(f"search: goes on after {len(archive.known())} genotypes")
        return run_search(
            engine=create_engine(settings.engine, run.space, seed=run.study.seed), objectives=settings.objectives,
            known=archive.known(), evaluate=run.evaluator.evaluate, record=archive.record, budget=settings.budget,
            batch_size=settings.batch_size, progress=lambda done, total: control.step("search", done, total))


def pareto(run: RunFolder, control: Control = QUIET, *, objectives: tuple[str, ...] = ()) -> Front:
    """Write `front.csv`, `front.md`, `front.png` and `report.html`; `objectives` are the search's unless given."""
    from ens.evaluate.crops import draw_crops
    from ens.pareto.report import write_front

    front = run.front(objectives)
    members = {front.role(index): front.members[index].genotype for index in (front.knee, *front.nearest[:2])}
    networks = {"teacher": run.teacher, **{role: run.build(genotype) for role, genotype in members.items()}}
    crops = draw_crops(networks, run.validation, run.protocol)
    write_front(run.path, front=front, archive=run.archive, crops=crops)
    control.say(f"pareto: wrote front.csv, front.md, front.png and report.html to {run.path}")
    return front


def finetune(run: RunFolder, pick: str = "knee", control: Control = QUIET) -> Genotype:
    """Train the pick and the members nearest to it (`finetune.candidates` in all); returns the one of highest PSNR.

    Each keeps the best weights seen on the validation images and has its own file in `finetune/`, one a recipe.
    """
    run.hold()
    tuned = {}
    for genotype in run.candidates(pick):
        path = run.hybrids.tuned(genotype, run.recipe(run.study.finetune).key)
        if path.exists():
            control.say(f"finetune: skipped, {path} is there")
        else:
            _tune(run, genotype, path, control)
        tuned[genotype] = float(read_facts(path)["psnr_db_after"])
    return max(tuned, key=lambda genotype: tuned[genotype])


def _tune(run: RunFolder, genotype: Genotype, path: Path, control: Control) -> None:
    """Fine-tune one hybrid and write its file, with its PSNR before and after on validation and on report images."""
    hybrid, recipe, state = run.build(genotype), run.recipe(run.study.finetune), path.with_suffix(".pt")
    control.say(f"finetune: the loss is {recipe.describe_loss()}")
    figures = run.judge.judge_input() | run.judge.judge(run.teacher, "teacher") | run.judge.judge(hybrid, "before")
    fit = train_network(hybrid, run.patches("finetune"), recipe=recipe, checkpoint=state, device=run.device,
                        taught_by=open_network(recipe.taught_by) if recipe.taught_by else run.teacher,
                        identity={"genotype": format_genotype(genotype), "library": run.library.hash_of(run.space)},
                        validate=run.judge.score, on_progress=control.follow("finetune"),
                        should_stop=control.should_stop)
    control.require(fit.complete, "finetune")
    figures |= run.judge.judge(hybrid, "after")
    facts = {"finetune": recipe.key, **run.facts(genotype, figures)}
    if figures["psnr_db_input"] and fmean(figures["psnr_db_after"]) < fmean(figures["psnr_db_input"]):
        control.say(f"finetune: warning, {path.stem} restores to {facts['psnr_db_after']} dB, below the degraded "
                    f"input's {facts['psnr_db_input']} dB")
    run.record_tuned(genotype, figures)  # before the file: whoever finds the file takes the archive's word for it
    save_hybrid(path, hybrid, choices=run.space.replaced(genotype), facts=facts)
    remove_state(state)


def export(run: RunFolder, pick: str = "knee", control: Control = QUIET) -> Path:
    """Write one hybrid, its best fine-tuned weights where there are some, as ONNX, safetensors and a YAML card."""
    from ens.export.formats import ExportError, write_card, write_checked

    run.hold()
    genotype = run.pick(pick)
    tuned, target = run.best_tuned(genotype), run.hybrids.exported(genotype)
    if not any(genotype) or tuned is None:
        control.say("export: " + ("without fine-tuning; `ens finetune` first gives a better file" if any(genotype) else
                                  "this genotype is the teacher itself, no slot is replaced"))
    hybrid = load_hybrid(tuned) if tuned else run.build(genotype)
    facts = read_facts(tuned) if tuned else run.facts(genotype, run.judge.judge(hybrid, "before"))
    save_hybrid(target.with_suffix(".safetensors"), hybrid, choices=run.space.replaced(genotype), facts=facts)
    try:
        parity = write_checked(hybrid, target, photo=run.validation.images[0].degraded[None], facts=facts,
                               on_event=control.say)
    except ExportError as error:
        run.mark_invalid(genotype, f"export failed: {error}")
        raise ExportError(f"{error}; {target.stem} is marked invalid and leaves the front") from error
    write_card(target.with_suffix(".yaml"), {**facts, "onnx_relative_error": f"{parity:.1e}"}, model=target.name)
    control.say(f"export: {target} agrees with PyTorch to {parity:.1e}")
    return target


def run_all(run: RunFolder, control: Control = QUIET, *, pick: str = "knee") -> Path:
    """Whatever is still missing, in order: train, distill, search, finetune, pareto, export; returns the ONNX file."""
    search(run, control)
    genotype = finetune(run, pick, control)
    if run.is_drawn:
        control.say(f"pareto: skipped, {run.path / 'report.html'} shows this archive")
    else:
        pareto(run, control)
    if run.hybrids.is_exported(genotype, run.best_tuned(genotype)):
        control.say(f"export: skipped, {run.hybrids.exported(genotype)} is there")
        return run.hybrids.exported(genotype)
    return export(run, format_genotype(genotype), control)


def evaluate(model: Path | str, data: str, task: Task, control: Control = QUIET, *, protocol: str = "",
             crop_px: int | None = None, limit: int | None = None, threads: int | None = None) -> list[Evaluation]:
    """Score any file that holds a network, or `builtin:NAME`, by the named protocol or by all of the task's."""
    from ens.runtime.session import open_session
    rules = [find_protocol(protocol, scale=task.scale)] if protocol else task_protocols(task)
    session = open_session(model, threads=threads)
    if session.upscale != task.scale:
        raise ValueError(f"{model} enlarges {session.upscale} times, the task {task.scale} times")
    images = load_validation_set(data, task, channels=session.channels, crop_px=crop_px, limit=limit)
    control.say(f"evaluate: {images.origin}")
    return evaluate_protocols(session.restore, images, rules,
                              on_progress=lambda done, total: control.progress("evaluate", done, total, "images"))


def inspect_erf(run: RunFolder, slot: str, target: Path) -> dict[str, dict[str, EnergyMap]]:
    """Draw the effective receptive field of a slot, the teacher's and every surrogate's, into the PNG `target`.

    Choice -> state (before, distilled, fine-tuned) -> map, of the slot's features on the first four validation images.
    """
    from ens.evaluate.receptive_field import draw_receptive_fields, measure_slot

    names, images = [one.name for one in run.space.slots], run.validation.images[:4]
    if slot not in names:
        raise ValueError(f"{run.study.name} does not search slot {slot!r}; it searches {', '.join(names)}")
    position, spec = names.index(slot), run.skeleton.slot(slot)
    teacher, *choices = run.space.slots[position].choices
    paths = run.hybrids.list_tuned()
    tuned = {parse_genotype(read_facts(path)["genotype"], run.space)[position]: path for path in paths}
    maps = {teacher.label: {"teacher": measure_slot(run.teacher, slot, images)}}
    for index, choice in enumerate(choices, 1):
        before = create_surrogate(run.teacher, spec, choice, seed=run.study.seed)
        states = maps[choice.label] = {"before": measure_slot(run.teacher, slot, images, module=before)}
        if not run.library.missing(slot, choice):
            states["distilled"] = measure_slot(run.teacher, slot, images, module=run.surrogate(spec, choice))
        if index in tuned:
            states["fine-tuned"] = measure_slot(load_hybrid(tuned[index]), slot, images)
    write_atomic(target, draw_receptive_fields(f"{slot}: 1 px is {spec.downscale} px of the image", maps))
    return maps
