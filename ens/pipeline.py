"""The whole program, one function a verb, in the order the data flows. Read this file first.

    task ─► train ─► distill ─► profile ─► search ─► pareto ─► finetune ─► export ─► restore

A verb gets a `RunFolder` and asks it for what it needs; it skips what is there and continues what was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ens.atomic import write_atomic
from ens.data.pairs import load_validation_set
from ens.data.tasks import Task
from ens.distill.blockwise import distill_library
from ens.distill.fit import start_processes, train_network
from ens.distill.library import Library
from ens.evaluate.evaluator import Evaluation, evaluate_protocols
from ens.evaluate.protocols import find_protocol, task_protocols
from ens.export.hybrid import open_network, save_hybrid
from ens.networks.checkpoints import remove_state, save_checkpoint
from ens.own_code import spell_imports
from ens.pareto.selection import Front, check_any_valid
from ens.run_folder import RunFolder, describe_harm
from ens.runtime.process import QUIET, Control
from ens.space import Genotype, Measurement, format_genotype

if TYPE_CHECKING:
    from ens.evaluate.receptive_field import EnergyMap
    from ens.export.torch_export import Size
    from ens.networks.steps import Network


def train(run: RunFolder, control: Control = QUIET) -> None:
    """Bring the teacher: the study's own (checkpoint or `builtin:NAME`), or train one from scratch into `teacher/`."""
    if run.study.device == "auto" and run.device == "cpu":
        control.say("device: auto takes the CPU, torch sees no GPU")
    if (given := run.study.teacher or run.study.library) or run.teacher_path.exists():
        control.say(f"train: skipped, the teacher is {given or run.teacher_path}")
        remove_state(run.teacher_state)  # a process may have been killed right after it wrote the teacher
        return
    start_processes(run.device)
    network, recipe = run.create_network(), run.recipe(run.study.train)
    fit = train_network(network, run.patches("train"), recipe=recipe, checkpoint=run.teacher_state, device=run.device,
                        taught_by=open_network(recipe.taught_by) if recipe.taught_by else None,
                        identity={"task": str(run.task)}, on_progress=control.follow("train"),
                        should_stop=control.should_stop)
    control.require(fit.complete, "train")
    save_checkpoint(run.teacher_path, network, facts={"task": str(run.task), "steps": str(recipe.steps)})
    remove_state(run.teacher_state)


def distill(run: RunFolder, control: Control = QUIET) -> Library:
    """Align every surrogate of the space with its slot of the teacher; returns the library."""
    train(run, control)
    library = run.library.take_parts() if run.missing_jobs else run.library
    if not run.missing_jobs:
        control.say(f"distill: skipped, all {len(run.jobs)} surrogates are in {library.root.name}")
        remove_state(run.distill_state)
        return library
    control.say(f"distill: {run.ends.describe()}")  # or that it is not worth the hours
    control.require(distill_library(
        run.teacher, library, run.patches("distill"), run.jobs, seed=run.study.seed, device=run.device,
        on_progress=lambda done, total, error: control.progress("distill", done, total, f"error {error:.3f}"),
        should_stop=control.should_stop, **run.study.distill.model_dump(exclude={"dtype"})), "distill")
    return library


def distill_spread(run: RunFolder, control: Control = QUIET) -> None:
    """Have the Ray cluster that this process has joined distil; `distill` then finds all of it done."""
    from ens.workers import distill_missing
    train(run, control)
    distill_missing(run, control)


def profile(run: RunFolder, control: Control = QUIET, *, objective: str = "latency_ms",
            sizes: Sequence[tuple[int, int]] = ()) -> list[Path]:
    """Time every choice in its slot and write the latency table of an objective, one a size; the first has its name."""
    return [run.make_table(objective, index, size, control)
            for index, size in enumerate(sizes or (run.study.latency.size,))]


def search(run: RunFolder, control: Control = QUIET, *, jobs: int = 1, deterministic: bool = False,
           ray: bool = False) -> list[Measurement]:
    """Measure genotypes until the budget is spent, in `jobs` processes or on the `ray` cluster, together with all
    others that share the archive; every one is in it at once. ValueError where all fail.
    """
    distill(run, control)
    if run.is_untimed:
        profile(run, control)
    if run.budget < run.study.search.budget:
        control.say(f"search: the space ends at {run.budget} genotypes, before the budget of {run.study.search.budget}")
    if run.is_searched:
        control.say(f"search: skipped, {len(run.archive.known())} genotypes are measured")
    else:
        from ens.workers import measure  # brings pymoo, half a second
        measure(run, control, jobs=jobs, deterministic=deterministic, ray=ray)
    check_any_valid(run.archive.measurements())
    return run.archive.measurements()


def pareto(run: RunFolder, control: Control = QUIET, *, objectives: tuple[str, ...] = ()) -> Front:
    """Write `front.csv`, `front.md`, `front.png` and `report.html`; `objectives` are the search's unless given."""
    from ens.evaluate.crops import draw_crops
    from ens.pareto.report import spread_members, telling_images, write_front
    front = run.front(objectives)
    shown = spread_members(front)
    crops = draw_crops(run.shown_networks(front, shown), run.validation, run.protocol, telling_images(front, shown))
    write_front(run.path, front=front, archive=run.archive, crops=crops, storage=run.storage, options=spell_imports())
    control.say(f"pareto: wrote front.csv, front.md, front.png and report.html to {run.path}")
    return front


def finetune(run: RunFolder, pick: str = "knee", control: Control = QUIET) -> Genotype:
    """Train the pick and those nearest to it, each to its best weights on validation images; returns the best."""
    paths = {genotype: run.tuned_path(genotype) for genotype in run.candidates(pick)}
    run.hold()
    tuned = {}
    for genotype, path in paths.items():
        if path.exists():
            control.say(f"finetune: skipped, {path} is there")
            remove_state(path.with_suffix(".pt"))
        else:
            _tune(run, genotype, path, control)
        tuned[genotype] = run.tuned_psnr_db(path)
    return max(tuned, key=lambda genotype: tuned[genotype])


def _tune(run: RunFolder, genotype: Genotype, path: Path, control: Control) -> None:
    """Fine-tune one hybrid and write its file, with its PSNR before and after on validation and on report images."""
    run.check_recipe("finetune", run.study.finetune)
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
    for line in describe_harm(path.stem, facts):
        control.say(line)
    run.record_tuned(genotype, figures)  # before the file: whoever finds the file takes the archive's word for it
    save_hybrid(path, hybrid, choices=run.space.replaced(genotype), facts=facts)
    remove_state(state)


def export(run: RunFolder, pick: str = "knee", control: Control = QUIET, *, formats: Sequence[str] = ("onnx",),
           size: Size | None = None, companions: Sequence[str] = ()) -> list[Path]:
    """Write one hybrid, its best fine-tuned weights where there are some: a file and its card for each of `formats`
    (names of EXPORTS), of a fixed `size` where it is given, the weights as safetensors, and last its COMPANIONS.
    """
    from ens.companions import check_companions, write_companions
    from ens.export.card import export_file, list_targets
    from ens.export.formats import ExportError, ParityError, TracingError

    genotype, paths, targets = run.pick(pick), [], list_targets(run.skeleton, formats, size)
    check_companions(run, genotype, companions, formats=formats, fixed=size is not None)
    run.hold()
    hybrid, facts = run.load_finished(genotype, control.say)
    for suffix, runtimes, side in targets:
        target = run.hybrids.exported(genotype, suffix, side)
        try:
            export_file(hybrid, target, photo=run.validation.images[0].degraded[None], facts=facts, size=side,
                        runtimes=runtimes, on_event=control.say)
        except ParityError as error:
            raise ExportError(f"{error}; {run.blame(genotype, error, suffix)}") from error
        except TracingError as error:
            raise ExportError(f"{error}; {run.exclude(genotype, hybrid, suffix)}") from error
        paths.append(target)
    run.mark_invalid(genotype, "")
    save_hybrid(run.hybrids.weights(genotype), hybrid, choices=run.space.replaced(genotype), facts=facts)
    return paths + write_companions(run, genotype, hybrid, companions, facts=facts, say=control.say)


def run_all(run: RunFolder, control: Control = QUIET, *, pick: str = "knee", jobs: int = 1,
            deterministic: bool = False, ray: bool = False) -> Path:
    """Whatever is still missing, in order: train, distill, search, finetune, pareto, export; returns the ONNX file."""
    search(run, control, jobs=jobs, deterministic=deterministic, ray=ray)
    genotype = finetune(run, pick, control)
    if run.is_drawn:
        control.say(f"pareto: skipped, {run.path / 'report.html'} shows this archive")
    else:
        pareto(run, control)
    if run.hybrids.is_exported(genotype, run.best_tuned(genotype)):
        control.say(f"export: skipped, {run.hybrids.exported(genotype)} is there")
        return run.hybrids.exported(genotype)
    return export(run, format_genotype(genotype), control)[0]


def evaluate(model: Path | str, data: str, task: Task, control: Control = QUIET, *, protocol: str = "",
             crop_px: int | None = None, limit: int | None = None, threads: int | None = None, runtime: str = "",
             tile_px: int | None = None, overlap_px: int | None = None,
             create: Callable[[], Network] | None = None) -> list[Evaluation]:
    """Score any file that holds a network, or `builtin:NAME`, by the named protocol or by all of the task's; weights of
    a user's network as what `create` makes.
    """
    from ens.runtime.session import open_session
    rules = [find_protocol(protocol, scale=task.scale)] if protocol else task_protocols(task)
    session = open_session(model, threads=threads, runtime=runtime, create=create).tiled(tile_px, overlap_px)
    if session.upscale != task.scale:
        raise ValueError(f"{model} enlarges {session.upscale} times, the task {task.scale} times")
    images = load_validation_set(data, task, channels=session.channels, crop_px=crop_px, limit=limit)
    control.say(f"evaluate: {images.origin}" + (f"; in {session.tiles}" if session.tiles else ""))
    return evaluate_protocols(session.restore, images, rules,
                              on_progress=lambda done, total: control.progress("evaluate", done, total, "images"))


def inspect_erf(run: RunFolder, slot: str, target: Path) -> dict[str, dict[str, EnergyMap]]:
    """Draw the effective receptive field of a slot into the PNG `target`: choice -> state -> map, of four images."""
    from ens.evaluate.receptive_field import draw_receptive_fields, measure_slot
    images, downscale = run.validation.images[:4], run.skeleton.slot(slot).downscale
    maps = {choice: {state: measure_slot(network, slot, images, module=module)
                     for state, (network, module) in known.items()} for choice, known in run.slot_states(slot).items()}
    write_atomic(target, draw_receptive_fields(f"{slot}: 1 px is {downscale} px of the image", maps))
    return maps
