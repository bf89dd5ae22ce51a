"""The command line: each verb is one function of `ens.pipeline`. The only file that prints.

Results go to standard output; progress, remarks and errors to standard error. Exit codes: 0 done, 1 the work failed,
2 the command is wrong, 74 the disk is full or read-only, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import ens
from ens import listing, searching, starting, timings
from ens import options as given
from ens.console import (
    complain,
    make_table,
    print_evaluation,
    print_front,
    print_tuned,
    replace_unknown_characters,
    reporting,
    say,
    show,
    stop,
)
from ens.runtime.process import StopNow, describe_error, keep_freed_memory
from ens.space import format_genotype, parse_genotype

# What needs PyTorch is imported inside the verbs, so that `ens --help` answers at once.
app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True,
                  pretty_exceptions_enable=False, epilog=given.show_examples("run"), help=(
    "Search a restoration network for hybrids: which of its blocks can become cheaper ones, and at what cost. "
    "Every verb continues where it was interrupted and skips what is done."))
inspect = typer.Typer(no_args_is_help=True, help="Look inside a run.")
app.add_typer(inspect, name="inspect")
for verb in (timings.profile, timings.bench, timings.estimate, starting.slots, searching.search, searching.pareto,
             starting.init, listing.spaces, listing.info):
    app.command(epilog=given.show_examples(verb.__name__))(verb)


def main() -> None:
    """Entry point of the `ens` command: one sentence and an exit code for whatever goes wrong."""
    replace_unknown_characters()
    keep_freed_memory()
    stop.listen()
    command = shlex.join(["ens", *sys.argv[1:]])
    try:
        app()
    except StopNow:
        complain(f"Interrupted; what is done is kept. To continue: {command}")
        sys.exit(stop.code)
    except Exception as error:
        if os.environ.get("ENS_TRACEBACK"):
            raise
        text, code = describe_error(error, command)
        complain(f"error: {text}")
        sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(f"ens {ens.__version__}")
        raise typer.Exit


@app.command(epilog=given.show_examples("run"))
def run(study: given.Study, out: given.Out, pick: given.Pick = "knee", candidates: given.Candidates = None,
        teacher: given.Teacher = None, bounds: given.Bounds = None, require: given.Require = None,
        patience: given.Patience = None, fix: given.Fix = None, forbid: given.Forbid = None,
        storage: given.Storage = "", jobs: given.Jobs = 1, deterministic: given.Deterministic = False,
        ray: given.Ray = "", restart: given.Restart = False, changes: given.Set = None,
        code: given.Import = None) -> None:
    """The whole road: train, distill, search, finetune, pareto, export; whatever of it is missing."""
    from ens import pipeline
    from ens.forecast import forecast

    with reporting() as control:
        asked = [*_candidates(candidates), *given.search_changes(changes, bounds, require, patience, fix, forbid)]
        folder = given.start(study, out, asked, teacher=teacher, storage=storage, pick=pick,
                             restart=restart)
        if ahead := forecast(folder):
            control.say(f"run: {ahead.describe()}")
        if ray:
            pipeline.distill_spread(folder, control)
        model = pipeline.run_all(folder, control, pick=pick, jobs=jobs, deterministic=deterministic, ray=bool(ray))
    print_front(folder, folder.front())
    print_tuned(folder, [parse_genotype(model.stem, folder.archive.space)])
    say(f"\nPage:     {out / 'report.html'}\nExported: {model}\nUse it:   "
         f"{shlex.join(['ens', 'restore', str(model), 'photo.png', 'restored.png'])}")


@app.command(epilog=given.show_examples("train"))
def train(study: given.Study, out: given.Out, teacher: given.TaughtBy = None, teacher_weight: given.TaughtWeight = None,
          restart: given.Restart = False, changes: given.Set = None, code: given.Import = None) -> None:
    """Train the teacher of a study; several processes under torchrun."""
    from ens import pipeline

    with reporting() as control:
        recipe = [*(changes or ()), *_taught("train", teacher, teacher_weight)]
        pipeline.train(given.start(study, out, recipe, restart=restart), control)
    say(f"The run is in {out}. Next: {given.spell('distill', study, '--out', str(out))}")


@app.command(epilog=given.show_examples("distill"))
def distill(study: given.Study, out: given.Out, teacher: given.Teacher = None, ray: given.Ray = "",
            restart: given.Restart = False, changes: given.Set = None, code: given.Import = None) -> None:
    """Align every surrogate of a study with its slot of the teacher."""
    from ens import pipeline

    with reporting() as control:
        folder = given.start(study, out, changes, teacher=teacher, restart=restart, ray=ray)
        if ray:
            pipeline.distill_spread(folder, control)
        library = pipeline.distill(folder, control)
    table = make_table(("slot", "choice"), ("alignment error", "parameters"))
    for item in library.surrogates.values():
        table.add_row(item.slot, item.choice, item.failed or f"{item.alignment_error:.3f}", f"{item.params:,}")
    show(table)
    say(f"The library is in {library.root}")


@app.command(epilog=given.show_examples("finetune"))
def finetune(run: given.Run, pick: given.Pick = "knee", candidates: given.Candidates = None,
             teacher: given.TaughtBy = None, teacher_weight: given.TaughtWeight = None, bounds: given.Bounds = None,
             storage: given.Storage = "", restart: given.Restart = False, changes: given.Set = None,
             code: given.Import = None) -> None:
    """Train hybrids of the front end to end, with their teacher's output as extra supervision."""
    from ens import pipeline

    recipe = [*(changes or ()), *_candidates(candidates), *_taught("finetune", teacher, teacher_weight),
              *given.bound_changes(bounds)]
    with reporting() as control:
        folder = given.open_run(run, recipe, storage=storage, restart=restart)
        best = pipeline.finetune(folder, pick, control)
    print_tuned(folder, list(folder.archive.tuned))
    say(f"Best on the validation images: {format_genotype(best)}")
    if path := folder.best_tuned(best):  # on another machine where the archive is shared
        say(str(path))


@app.command(epilog=given.show_examples("export"))
def export(run: given.Run, pick: given.Pick = "knee", formats: given.Formats = "onnx", size: given.Size = "",
           int8: given.Int8 = False, bundle: given.Bundle = False, plain: given.Plain = False,
           bounds: given.Bounds = None, storage: given.Storage = "", code: given.Import = None) -> None:
    """Write one hybrid in one or several formats, each with a card; every file is checked in its own runtime first."""
    from ens import pipeline

    names, sides = given.parse_names(formats), given.parse_size(size)
    beside = [name for name, wanted in {"int8": int8, "bundle": bundle, "plain": plain}.items() if wanted]
    with reporting() as control:
        folder = given.open_run(run, given.bound_changes(bounds), storage=storage)
        paths = pipeline.export(folder, pick, control, formats=names, size=sides, companions=beside)
    say("\n".join(f"Exported: {path}" for path in paths))


@app.command(epilog=given.show_examples("restore"))
def restore(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="Exported file, hybrid or checkpoint.")],
    source: Annotated[Path, typer.Argument(metavar="IN", help="Image, or folder of images.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Image or folder to write.")],
    tile: given.Tile = None, tile_overlap: given.TileOverlap = None, threads: given.Threads = None,
    runtime: given.Runtime = "", network: given.OwnNetwork = "", options: given.NetworkSet = None,
    code: given.Import = None,
) -> None:
    """Restore an image, or every image of a folder."""
    from ens.runtime.session import open_session, restore_files

    with reporting() as control:
        session = open_session(model, threads=threads, runtime=runtime, create=given.find_network(network, options))
        failures = restore_files(session, source, target, tile_px=tile, overlap_px=tile_overlap,
                                 on_event=control.say,
                                 on_progress=lambda done, total, name: control.progress("restore", done, total, name))
    for failure in failures:
        complain(f"error: {failure}")
    if failures:
        raise typer.Exit(1)
    say(f"Restored: {target}")


@app.command(epilog=given.show_examples("degrade"))
def degrade(source: Annotated[Path, typer.Argument(metavar="IN", help="Clean image.")],
            target: Annotated[Path, typer.Argument(metavar="OUT", help="Image to write.")], task: given.Task) -> None:
    """Write what a task's validation would make of a clean image: something to restore."""
    from ens.data.pairs import degrade_photo
    from ens.data.tasks import create_task

    degrade_photo(source, target, create_task(task))
    say(f"Degraded: {target}")


@app.command(epilog=given.show_examples("evaluate"))
def evaluate(
    checkpoint: Annotated[str, typer.Option("--checkpoint", "--model", help=(
        "Checkpoint, hybrid or exported file, or builtin:NAME for a shipped teacher."))],
    data: Annotated[str, typer.Option(help="Folder of images (clean, or input/ and target/), or builtin:photos.")],
    task: given.Task,
    protocol: Annotated[str, typer.Option(help="Evaluation protocol instead of the task's own.")] = "",
    crop: Annotated[int | None, typer.Option(metavar="PX", help="Cut this square out of the centre first.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Take the first N images.")] = None,
    threads: given.Threads = None, runtime: given.Runtime = "", tile: given.Tile = None,
    tile_overlap: given.TileOverlap = None, network: given.OwnNetwork = "", options: given.NetworkSet = None,
    as_json: given.AsJson = False, code: given.Import = None,
) -> None:
    """Score a file on a folder of images: protocol, data, PSNR and SSIM."""
    from ens import pipeline
    from ens.data.tasks import create_task

    job = create_task(task)
    with reporting() as control:
        results = pipeline.evaluate(checkpoint, data, job, control, protocol=protocol, crop_px=crop, limit=limit,
                                    threads=threads, runtime=runtime, tile_px=tile, overlap_px=tile_overlap,
                                    create=given.find_network(network, options, job.scale))
    print_evaluation(results, job, as_json=as_json)
    if broken := results[0].broken:
        complain(f"error: {checkpoint}: {broken}")
        raise typer.Exit(1)


@app.command(epilog=given.show_examples("schema"))
def schema() -> None:
    """Print the JSON schema of study files, by which an editor completes and checks them."""
    from ens.config import study_schema

    print(study_schema())


@inspect.command(epilog=given.show_examples("erf"))
def erf(run: given.Run, slot: Annotated[str, typer.Option(help="Slot to look into, for instance latent.")],
        target: Annotated[Path | None, typer.Option("--out", "-o", help="PNG; RUN/erf_SLOT.png by default.")] = None,
        code: given.Import = None) -> None:
    """Effective receptive field: the teacher's, and the surrogates' before and after distillation and fine-tuning.

    The gradient of the centre of the slot's update (output - input) with respect to its input: a PNG, and the sides of
    the squares around the centre that hold 50 % and 95 % of its norm.
    """
    from ens import pipeline
    from ens.evaluate.receptive_field import energy_side_px

    target = target or run / f"erf_{slot}.png"
    if target.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG; {target} has another suffix")
    rows = pipeline.inspect_erf(given.open_run(run), slot, target)
    table = make_table(("choice", "state"), ("50 % px", "95 % px"))
    for choice, states in rows.items():
        for state, energy in states.items():
            table.add_row(choice, state, *(str(energy_side_px(energy, share)) for share in (0.5, 0.95)))
    show(table)
    say(f"Sides in pixels of the slot's own features\n{target}")


app.registered_commands.sort(key=lambda verb: list(given.EXAMPLES).index(verb.callback.__name__))  # type: ignore


def _candidates(count: int | None) -> list[str]:
    return [] if count is None else [f"finetune.candidates={count}"]


def _taught(section: str, teacher: Path | None, weight: float | None) -> list[str]:
    """Changes of the study behind --teacher and --teacher-weight."""
    share = 0.5 if teacher and weight is None else weight
    values = {"taught_by": teacher and json.dumps(str(teacher.resolve())), "taught_weight": share}
    return [f"{section}.{key}={value}" for key, value in values.items() if value is not None]


