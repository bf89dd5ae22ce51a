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

from ens.config import ConfigError, StudyConfig, open_run, parse_choices, save_run
from ens.data.folders import load_pairs
from ens.data.images import ImageError, Photo, read_photo, to_float, to_pixels, write_photo
from ens.data.pairs import Patches, ValidationSet, load_validation_set
from ens.data.tasks import Task, create_task, find_protocol
from ens.distill.blockwise import distill_library
from ens.distill.library import BUILTIN, Library, LibraryError, create_library, open_library
from ens.distill.losses import TaughtLoss, l1_loss
from ens.distill.training import Phase, Progress, start_processes, train_network
from ens.evaluate.cost import build_cost_table, count_cost
from ens.evaluate.crops import draw_crops
from ens.evaluate.evaluator import Evaluation, Evaluator, evaluate_restorer, mean_psnr_db
from ens.evaluate.metrics import score_input
from ens.export.formats import export_onnx, write_card
from ens.export.hybrid import build_hybrid, load_hybrid, open_network, read_facts, save_hybrid
from ens.networks import create_network
from ens.networks.checkpoints import load_checkpoint, save_checkpoint
from ens.networks.slots import build_space
from ens.networks.steps import Network
from ens.pareto.archive import Archive, acquire_lock, open_archive, read_archive
from ens.pareto.report import write_csv, write_markdown, write_png, write_report
from ens.pareto.selection import Front, pick_genotype, select_front
from ens.runtime.session import open_session, restore_files
from ens.search import create_engine
from ens.search.loop import run_search
from ens.search.objectives import add_objectives, reference_point
from ens.space import Genotype, Measurement, SearchSpace, format_genotype


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
    _hold(out)
    save_run(out, study)
    if study.teacher:
        return _open_network(study.teacher)
    path = out / "teacher" / "teacher.safetensors"
    if path.exists():
        control.say(f"train: skipped, {path} is there")
        return load_checkpoint(path)
    start_processes(_device(study))
    torch.manual_seed(study.seed)
    network = _create_network(study)
    task = _task(study)
    patches = Patches(load_pairs(_train_folder(study), scale=task.scale, channels=network.in_channels), task,
                      seed=study.seed)
    settings = study.train
    loss = l1_loss if not settings.taught_by else TaughtLoss(
        _open_network(settings.taught_by).to(_device(study)), weight=settings.taught_weight)
    _fit(network, patches, study, "train", out / "teacher" / "train.pt", loss, control,
         {"task": str(task), "taught": f"{settings.taught_weight} by {settings.taught_by}"})
    save_checkpoint(path, network, facts={"task": str(task), "steps": str(study.train.steps)})
    return network


def distill(study: StudyConfig, out: Path, control: Control = QUIET) -> Library:
    """Align every surrogate of the space with its slot of the teacher; returns the library."""
    library = _open_library(study, out, train(study, out, control))
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
    task, settings = _task(study), study.distill
    patches = Patches(load_pairs(_train_folder(study), scale=task.scale, channels=teacher.in_channels), task,
                      seed=study.seed + 1)
    complete = distill_library(
        teacher.to(_device(study)), library, patches, jobs, steps=settings.steps, batch_size=settings.batch_size,
        patch_px=settings.patch_px, lr=settings.lr, group_size=settings.group_size, seed=study.seed,
        device=_device(study), should_stop=control.should_stop,
        macs=lambda spec, blocks: count_cost(
            blocks, (1, spec.channels, 256 // spec.downscale, 256 // spec.downscale)).macs,
        on_progress=lambda done, total, error: control.progress("distill", done, total, f"error {error:.3f}"))
    if not complete:
        raise Interrupted("distill")
    return library


def search(study: StudyConfig, out: Path, control: Control = QUIET, *, storage: str = "") -> list[Measurement]:
    """Measure genotypes until the budget of unique evaluations is spent; every one is in `archive.db` at once."""
    library = distill(study, out, control)
    evaluator, space, images = _evaluator(study, library)
    teacher = evaluator.measure(space.teacher)
    settings = study.search
    manifest = {"study": study.name, "seed": study.seed, "engine": settings.engine, "batch_size": settings.batch_size,
                "protocol": _task(study).protocol.name, "data": str(images.fingerprint),
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
    library = _open_library(study, out, None)
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
                 crops=draw_crops(_chosen(teacher, space, library, front), _validation(study, teacher),
                                  _task(study).protocol))
    control.say(f"pareto: wrote front.csv, front.md, front.png and report.html to {out}")
    return front, space, archive


def finetune(out: Path, pick: str = "knee", control: Control = QUIET, *, storage: str = "") -> Path:
    """Train one hybrid of the front end to end with L1 plus the teacher's output; returns its safetensors file.

    The PSNR before and after, on the run's validation images, is recorded in the file.
    """
    study = open_run(out)
    _hold(out)
    library = _open_library(study, out, None)
    teacher, space, genotype = _picked(study, out, library, pick, storage)
    path = out / "finetune" / f"{format_genotype(genotype)}.safetensors"
    if path.exists():
        control.say(f"finetune: skipped, {path} is there")
        return path
    hybrid = _build(teacher, space, library, genotype)
    images, protocol = _validation(study, teacher), _task(study).protocol
    before = mean_psnr_db(hybrid, images, protocol)
    task = _task(study)
    patches = Patches(load_pairs(_train_folder(study), scale=task.scale, channels=teacher.in_channels), task,
                      seed=study.seed + 2)
    teacher.to(_device(study))
    _fit(hybrid, patches, study, "finetune", path.with_suffix(".pt"),
         TaughtLoss(teacher, weight=study.finetune.taught_weight), control,
         {"genotype": format_genotype(genotype), "library": library.hash_of(space)})
    figures = {"psnr_db_before": before, "psnr_db_after": mean_psnr_db(hybrid.cpu(), images, protocol),
               "psnr_db_teacher": mean_psnr_db(teacher.cpu(), images, protocol)}
    save_hybrid(path, hybrid, choices=space.replaced(genotype),
                facts=_facts(study, library, space, genotype, images, figures))
    path.with_suffix(".pt").unlink(missing_ok=True)
    return path


def export(out: Path, pick: str = "knee", control: Control = QUIET, *, storage: str = "") -> Path:
    """Write one hybrid as ONNX, safetensors and a YAML card; its fine-tuned weights where there are some.

    Returns the ONNX file, which appears only after ONNX Runtime has reproduced it.
    """
    study = open_run(out)
    _hold(out)
    library = _open_library(study, out, None)
    teacher, space, genotype = _picked(study, out, library, pick, storage)
    name = format_genotype(genotype)
    tuned = out / "finetune" / f"{name}.safetensors"
    images = _validation(study, teacher)
    hybrid = load_hybrid(tuned) if tuned.exists() else _build(teacher, space, library, genotype)
    figures = {} if tuned.exists() else {"psnr_db": mean_psnr_db(hybrid, images, _task(study).protocol)}
    facts = dict(read_facts(tuned)) if tuned.exists() else _facts(study, library, space, genotype, images, figures)
    target = out / "export" / f"{name}.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    save_hybrid(target.with_suffix(".safetensors"), hybrid, choices=space.replaced(genotype), facts=facts)
    parity = export_onnx(hybrid, target, photo=images.images[0].degraded[None], facts=facts)
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
             crop_px: int | None = None, limit: int | None = None, threads: int | None = None) -> Evaluation:
    """Score a checkpoint, hybrid or exported file (`builtin:NAME` for a shipped teacher) on a folder of images."""
    rule = find_protocol(protocol, scale=task.scale) if protocol else task.protocol
    if str(model).startswith(BUILTIN):
        network = open_library(str(model)).load_teacher()
        restore: Callable[[Tensor], Tensor] = network
        channels = network.in_channels
    else:
        session = open_session(model, threads=threads)
        restore, channels = session.restore, session.channels
    images = load_validation_set(data, task, channels=channels, crop_px=crop_px, limit=limit)
    scores = evaluate_restorer(restore, images, rule,
                               on_progress=lambda done, total: control.progress("evaluate", done, total, "images"))
    inputs = [score_input(image.degraded, image.clean, rule) for image in images.images] if task.scale == 1 else []
    return Evaluation(rule.name, str(images.fingerprint), tuple(image.name for image in images.images), tuple(inputs),
                      tuple(scores))


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


@dataclass(frozen=True)
class SpaceSummary:
    """What `ens spaces` lists; ranges are over the choices, MACs for an image of 256×256."""

    space: SearchSpace
    params: tuple[float, float]
    macs: tuple[float, float]


def summarise_space(study: StudyConfig) -> SpaceSummary:
    """Slots, choices and cost range of a study, without any weights where it names no teacher."""
    teacher = _open_network(study.teacher) if study.teacher else _create_network(study)
    space = read_space(study, teacher)
    costs = build_cost_table(teacher, space)
    return SpaceSummary(space, costs.range("params"), costs.range("macs"))


def read_space(study: StudyConfig, teacher: Network) -> SearchSpace:
    """The search space a study describes on this teacher."""
    return build_space(study.name, teacher, granularity=study.granularity, choices=parse_choices(study.choices),
                       slots={name: parse_choices(entries) for name, entries in study.slots.items()},
                       penalty_teacher=study.penalty.teacher, penalty_per_block=study.penalty.per_block)


def _create_network(study: StudyConfig) -> Network:
    options = dict(study.network)
    if "name" not in options:
        raise ConfigError(f"{study.name}: give `teacher`, or `network` with a name, for instance {{name: restormer}}")
    return create_network(str(options.pop("name")), **options)


def _open_network(location: str) -> Network:
    return open_library(location).load_teacher() if location.startswith(BUILTIN) else open_network(location)


_held: dict[Path, FileLock] = {}


def _hold(out: Path) -> None:
    """Keep other processes from writing to this run folder until this one ends; raises ArchiveLocked."""
    if os.environ.get("RANK", "0") == "0" and out.resolve() not in _held:
        out.mkdir(parents=True, exist_ok=True)
        _held[out.resolve()] = acquire_lock(out / "run")


def _task(study: StudyConfig) -> Task:
    options = dict(study.task)
    if "name" not in options:
        raise ConfigError(f"{study.name}: `task` needs a name, for instance {{name: denoise, sigma_255: 25}}")
    return create_task(str(options.pop("name")), options)


def _train_folder(study: StudyConfig) -> str:
    if not study.data.train:
        raise ConfigError(f"{study.name}: `data.train` names no folder of training images")
    return study.data.train


def _device(study: StudyConfig) -> str:
    if study.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if study.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"{study.name}: device {study.device} is asked for, but torch sees no GPU; use auto or cpu")
    return study.device


def _fit(network: Network, patches: Patches, study: StudyConfig, verb: str, checkpoint: Path,
         loss: Callable[[nn.Module, Tensor, Tensor], Tensor], control: Control, identity: Mapping[str, str]) -> None:
    """Train or fine-tune as the study says; raises Interrupted when stopped, with all state in `checkpoint`."""
    settings = study.train if verb == "train" else study.finetune

    def report(progress: Progress) -> None:
        skipped = f", {progress.skipped} skipped" if progress.skipped else ""
        control.progress(verb, progress.step, progress.steps, f"loss {progress.loss:.4f}{skipped}")

    complete = train_network(
        network, patches, checkpoint=checkpoint, loss=loss, phases=[Phase(*phase) for phase in settings.phases],
        steps=settings.steps, lr=settings.lr, lr_final=settings.lr_final, warmup_steps=settings.warmup_steps,
        clip_norm=settings.clip_norm, ema_decay=settings.ema_decay, device=_device(study),
        identity={"seed": str(study.seed), **identity}, on_progress=report, should_stop=control.should_stop)
    if not complete:
        raise Interrupted(verb)


def _open_library(study: StudyConfig, out: Path, teacher: Network | None) -> Library:
    """The study's library; begun in `out/library` when a teacher is given and there is none."""
    if study.library:
        library = open_library(study.library)
    elif teacher is None or (out / "library" / "manifest.json").exists():
        library = open_library(out / "library")
    else:
        return create_library(out / "library", teacher, task=str(_task(study)), dtype=study.distill.dtype,
                              recipe=dataclasses.asdict(study.distill))
    if teacher is not None and not library.imitates(teacher):
        raise LibraryError(f"{library.root} imitates another teacher than the one of {study.name}")
    return library


def _validation(study: StudyConfig, teacher: Network) -> ValidationSet:
    return load_validation_set(study.data.validation, _task(study), channels=teacher.in_channels,
                               crop_px=study.data.crop_px, limit=study.data.limit)


def _evaluator(study: StudyConfig, library: Library) -> tuple[Evaluator, SearchSpace, ValidationSet]:
    teacher = library.load_teacher()
    space = read_space(study, teacher)
    device = _device(study)
    fillings: list[list[nn.Module | str | None]] = []
    for slot in space.slots:
        spec = teacher.slot(slot.name)
        fillings.append([None, *(library.missing(slot.name, choice) or library.load_surrogate(spec, choice).to(device)
                                 for choice in slot.choices[1:])])
    images = _validation(study, teacher)
    evaluator = Evaluator(teacher, space, fillings, images=images, protocol=_task(study).protocol,
                          costs=build_cost_table(teacher, space), device=device)
    return evaluator, space, images


def _with_objectives(measurement: Measurement, space: SearchSpace, teacher: Measurement) -> Measurement:
    return add_objectives(measurement, space=space, teacher_psnr_db=teacher.psnr_db)


def _picked(study: StudyConfig, out: Path, library: Library, pick: str,
            storage: str) -> tuple[Network, SearchSpace, Genotype]:
    teacher = library.load_teacher()
    space = read_space(study, teacher)
    archive = read_archive(storage or out / "archive.db")
    front = select_front(archive.measurements(), archive.objectives)
    return teacher, space, pick_genotype(pick, front=front, space=space)


def _build(teacher: Network, space: SearchSpace, library: Library, genotype: Genotype) -> Network:
    return build_hybrid(teacher, {name: library.load_surrogate(teacher.slot(name), choice)
                                  for name, choice in space.replaced(genotype).items()})


def _facts(study: StudyConfig, library: Library, space: SearchSpace, genotype: Genotype, images: ValidationSet,
           figures: Mapping[str, float]) -> dict[str, str]:
    """What a hybrid's file says of itself."""
    return {"study": study.name, "genotype": format_genotype(genotype), "task": str(_task(study)),
            "protocol": _task(study).protocol.name, "validation": str(images.fingerprint),
            "teacher_sha256": library.teacher_sha256, "library_sha256": library.hash_of(space),
            **{slot.name: choice.label for slot, choice in zip(space.slots, space.choices(genotype), strict=True)},
            **{name: f"{value:.3f}" for name, value in figures.items()}}


def _chosen(teacher: Network, space: SearchSpace, library: Library, front: Front) -> dict[str, nn.Module]:
    """The networks whose pictures the report shows: the teacher, the knee and its two nearest."""
    return {"teacher": teacher, **{front.role(index): _build(teacher, space, library, front.members[index].genotype)
                                   for index in (front.knee, *front.nearest[:2])}}
