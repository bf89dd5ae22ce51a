"""The command line: each verb is one function of `ens.pipeline`. The only file that prints.

Results go to standard output; progress, remarks and errors to standard error. Exit codes: 0 done, 1 the work failed,
2 the command is wrong, 74 the disk is full or read-only, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import ens
from ens.runtime.memory import keep_freed_memory
from ens.space import format_genotype

# What needs PyTorch is imported inside the verbs, so that `ens --help` answers at once.
if TYPE_CHECKING:
    from ens.config import StudyConfig
    from ens.pareto.archive import Archive
    from ens.pareto.selection import Front
    from ens.pipeline import Control

EXIT_DISK = 74
_DISK_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_DISK_WORDS = ("disk is full", "readonly database", "No space left")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(
    "Search a restoration network for hybrids: which of its blocks can become cheaper ones, and at what cost. "
    "Every verb continues where it was interrupted and skips what is done."))
inspect = typer.Typer(no_args_is_help=True, help="Look inside a run.")
app.add_typer(inspect, name="inspect")
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

Study = Annotated[str, typer.Argument(metavar="SPACE.yaml", help="The study: a file, or the name of a shipped one.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that `ens run` or `ens search` made.")]
Pick = Annotated[str, typer.Option(help="'knee', 'near 1' to 'near 5', 'within 0.1' (dB), or a genotype like 0-2-1.")]
Task = Annotated[str, typer.Option(help="Task with its numbers: denoise_s25, derain, deblur, sr_x4, jpeg_q10.")]
Within = Annotated[float | None, typer.Option(help="Name the cheapest member at most this many dB below the teacher.")]
Storage = Annotated[str, typer.Option(help="Optuna storage URL of the archive instead of RUN/archive.db.")]
Teacher = Annotated[Path | None, typer.Option(help="Checkpoint to use as the teacher.")]
TaughtBy = Annotated[Path | None, typer.Option("--teacher", help=(
    "Checkpoint whose output is extra supervision (DVMSR's distillation)."))]
TaughtWeight = Annotated[float | None, typer.Option("--teacher-weight", min=0, max=1, help=(
    "Share w of the teacher in the loss: (1-w) L1(target) + w L1(teacher's output)."))]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
    "Change one key of the study, for instance search.budget=40. May be given several times."))]


class StopNow(BaseException):
    """A second signal, or a first one where nothing can be finished; no `except Exception` holds it up."""


class Stop:
    """What SIGINT and SIGTERM set: the first asks the verb to finish its step, the second ends it."""

    def __init__(self) -> None:
        self.code = 0
        self._polled = False

    def is_set(self) -> bool:
        self._polled = True
        return self.code != 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        again, self.code = self.code != 0, 128 + number
        if again or not self._polled:
            raise StopNow
        _err.print("Stopping after this step; once more stops at once.")


_stop = Stop()


def main() -> None:
    """Entry point of the `ens` command: one sentence and an exit code for whatever goes wrong."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, _stop.handle)
    signal.signal(signal.SIGTERM, _stop.handle)
    try:
        app()
    except StopNow:
        sys.exit(_report_stop())
    except Exception as error:
        if os.environ.get("ENS_TRACEBACK"):
            raise
        sys.exit(_report_error(error))


def _report_stop() -> int:
    _err.print(f"Interrupted; what is done is kept. To continue: {_this_command()}", soft_wrap=True, markup=False)
    return _stop.code


def _this_command() -> str:
    return shlex.join(["ens", *sys.argv[1:]])


def _report_error(error: Exception) -> int:
    if is_disk_error(error):
        _err.print(f"error: the disk is full or read-only ({error}); what is done is kept. Make room, then: "
                   f"{_this_command()}", soft_wrap=True, markup=False)
        return EXIT_DISK
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if not isinstance(error, ValueError | KeyError | RuntimeError | OSError | ImportError):
        text = f"unexpected {type(error).__name__}: {text}; ENS_TRACEBACK=1 shows where, please report it"
    _err.print(f"error: {text}", soft_wrap=True, markup=False)
    return 1


def is_disk_error(error: BaseException | None) -> bool:
    """Whether a full or read-only disk is behind an error, however many libraries have wrapped it."""
    while error is not None:
        if getattr(error, "errno", None) in _DISK_ERRNO or any(word in str(error) for word in _DISK_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _reporting() -> Iterator[Control]:
    """Progress bars on a terminal; elsewhere a line every half minute."""
    from ens.pipeline import Control, Interrupted

    bars: dict[str, TaskID] = {}
    last: dict[str, float] = {}
    quiet = os.environ.get("RANK", "0") != "0"  # torchrun starts several processes: the first one speaks
    with Progress(TextColumn("{task.description:>8}"), BarColumn(24), MofNCompleteColumn(),
                  TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[note]}"),
                  console=_err, disable=quiet or not _err.is_terminal) as progress:

        def report(verb: str, done: int, total: int, note: str) -> None:
            if verb not in bars:
                bars[verb] = progress.add_task(verb, total=total, completed=done, note=note)
            progress.update(bars[verb], completed=done, total=total, note=note)
            if progress.disable and not quiet and (done == total or time.monotonic() > last.get(verb, 0.0) + 30):
                last[verb] = time.monotonic()
                _err.print(f"{verb} {done}/{total} {note}", markup=False)

        def say(line: str) -> None:
            if not quiet:
                _err.print(line, markup=False, soft_wrap=True)

        try:
            yield Control(report, say, _stop.is_set)
        except Interrupted:
            raise StopNow from None


def _load_study(name: str, changes: Sequence[str] | None, teacher: Path | None = None) -> StudyConfig:
    from ens.config import find_study, load_study, parse_changes

    overrides = parse_changes(changes or ())
    return load_study(find_study(name), {**overrides, "teacher": str(teacher.resolve())} if teacher else overrides)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _say(f"ens {ens.__version__}")
        raise typer.Exit


@app.command()
def run(study: Study, out: Out, pick: Pick = "knee", teacher: Teacher = None, storage: Storage = "",
        changes: Set = None) -> None:
    """The whole road: train, distill, search, pareto, finetune, export; whatever of it is missing."""
    from ens import pipeline
    from ens.pareto.archive import read_archive
    from ens.pareto.selection import select_front

    with _reporting() as control:
        model = pipeline.run(_load_study(study, changes, teacher), out, control, pick=pick, storage=storage)
    archive = read_archive(storage or out / "archive.db")
    _print_front(select_front(archive.measurements(), archive.objectives), archive)
    _say(f"\nPage:     {out / 'report.html'}\nExported: {model}\nUse it:   ens restore {model} photo.png restored.png")


@app.command()
def train(study: Study, out: Out, teacher: TaughtBy = None, teacher_weight: TaughtWeight = None,
          changes: Set = None) -> None:
    """Train the teacher of a study; several processes under torchrun."""
    from ens import pipeline

    taught = {"train.taught_by": teacher and json.dumps(str(teacher.resolve())),
              "train.taught_weight": 0.5 if teacher and teacher_weight is None else teacher_weight}
    changes = [*(changes or ()), *(f"{key}={value}" for key, value in taught.items() if value is not None)]
    with _reporting() as control:
        network = pipeline.train(_load_study(study, changes), out, control)
    _say(f"The teacher has {sum(weight.numel() for weight in network.parameters()):,} parameters.")


@app.command()
def distill(study: Study, out: Out, teacher: Teacher = None, changes: Set = None) -> None:
    """Align every surrogate of a study with its slot of the teacher."""
    from ens import pipeline

    with _reporting() as control:
        library = pipeline.distill(_load_study(study, changes, teacher), out, control)
    table = _table(("slot", "choice"), ("alignment error", "parameters"))
    for item in library.surrogates.values():
        table.add_row(item.slot, item.choice, item.failed or f"{item.alignment_error:.3f}", f"{item.params:,}")
    _out.print(table)
    _say(f"The library is in {library.root}")


@app.command()
def search(study: Study, out: Out, teacher: Teacher = None, storage: Storage = "", changes: Set = None) -> None:
    """Measure genotypes until the budget of unique evaluations is spent."""
    from ens import pipeline

    with _reporting() as control:
        measured = pipeline.search(_load_study(study, changes, teacher), out, control, storage=storage)
    _say(f"{len(measured)} genotypes are measured. Next: ens pareto {out}")


@app.command()
def pareto(run: Run, within: Within = None, storage: Storage = "") -> None:
    """Print the front of a run and write it as CSV, Markdown, PNG and one HTML page."""
    from ens import pipeline
    from ens.pareto.selection import cheapest_member

    with _reporting() as control:
        front, _, archive = pipeline.pareto(run, control, storage=storage)
    _print_front(front, archive)
    if within is not None:
        index = front.members.index(cheapest_member(front, within))
        _say(f"Cheapest within {within:g} dB: {_describe_member(front, index)}")


@app.command()
def finetune(run: Run, pick: Pick = "knee", teacher: TaughtBy = None, teacher_weight: TaughtWeight = None,
             storage: Storage = "") -> None:
    """Train one hybrid of the front end to end, with its teacher's output as extra supervision."""
    from ens import pipeline
    from ens.export.hybrid import read_facts

    with _reporting() as control:
        path = pipeline.finetune(run, pick, control, storage=storage, taught_weight=teacher_weight,
                                 taught_by=str(teacher) if teacher else "")
    facts = read_facts(path)
    _say(f"PSNR {facts['psnr_db_before']} dB before, {facts['psnr_db_after']} after, {facts['psnr_db_teacher']} "
         f"of the teacher ({facts['protocol']})\n{path}")


@app.command()
def export(run: Run, pick: Pick = "knee", storage: Storage = "") -> None:
    """Write one hybrid as ONNX, safetensors and a card; checked in ONNX Runtime first."""
    from ens import pipeline

    with _reporting() as control:
        path = pipeline.export(run, pick, control, storage=storage)
    _say(f"Exported: {path}")


@app.command()
def restore(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="Exported .onnx file, hybrid or checkpoint.")],
    source: Annotated[Path, typer.Argument(metavar="IN", help="Image, or folder of images.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Image or folder to write.")],
    tile: Annotated[int | None, typer.Option(metavar="PX", min=1, help="Work in tiles of this size.")] = None,
    tile_overlap: Annotated[int, typer.Option(metavar="PX", min=0, help="Overlap of the tiles.")] = 32,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of the runtime.")] = None,
) -> None:
    """Restore an image, or every image of a folder."""
    from ens import pipeline

    with _reporting() as control:
        failures = pipeline.restore(model, source, target, control, tile_px=tile, overlap_px=tile_overlap,
                                    threads=threads)
    for failure in failures:
        _err.print(f"error: {failure}", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)
    _say(f"Restored: {target}")


@app.command()
def degrade(source: Annotated[Path, typer.Argument(metavar="IN", help="Clean image.")],
            target: Annotated[Path, typer.Argument(metavar="OUT", help="Image to write.")], task: Task) -> None:
    """Write what a task's validation would make of a clean image: something to restore."""
    from ens import pipeline
    from ens.data.tasks import create_task

    pipeline.degrade(source, target, create_task(task))
    _say(f"Degraded: {target}")


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option("--checkpoint", "--model", help=(
        "Checkpoint, hybrid or exported file, or builtin:NAME for a shipped teacher."))],
    data: Annotated[str, typer.Option(help="Folder of images (clean, or input/ and target/), or builtin:photos.")],
    task: Task,
    protocol: Annotated[str, typer.Option(help="Evaluation protocol instead of the task's own.")] = "",
    crop: Annotated[int | None, typer.Option(metavar="PX", help="Cut this square out of the centre first.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Take the first N images.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads of an exported file's runtime.")] = None,
) -> None:
    """Score a file on a folder of images: protocol, data, PSNR and SSIM."""
    from ens import pipeline
    from ens.data.tasks import create_task

    job = create_task(task)
    with _reporting() as control:
        results = pipeline.evaluate(checkpoint, data, job, control, protocol=protocol, crop_px=crop, limit=limit,
                                    threads=threads)
    first = results[0]
    table = _table(("image",), (*(("input dB",) if first.inputs else ()), "PSNR dB", "SSIM"))
    for index, (name, score) in enumerate(zip(first.names, first.outputs, strict=True)):
        before = (f"{first.inputs[index].psnr_db:.2f}",) if first.inputs else ()
        table.add_row(name, *before, f"{score.psnr_db:.2f}", f"{score.ssim:.4f}")
    _out.print(table)
    _say(f"data     {first.fingerprint}\ntask     {job}")
    for result in results:
        psnr_db, ssim, input_db = result.means()
        gain = f" (input {input_db:.2f} dB, gain {psnr_db - input_db:+.2f} dB)" if result.inputs else ""
        _say(f"protocol {result.protocol}\nPSNR     {psnr_db:.2f} dB{gain}\nSSIM     {ssim:.4f}")


@app.command()
def spaces(studies: Annotated[list[str] | None, typer.Argument(
        metavar="[SPACE.yaml]...", help="Studies to list; the shipped ones by default.")] = None) -> None:
    """List studies: slots × choices, genotypes, and the range of parameters and multiply-adds."""
    from ens.config import shipped_spaces
    from ens.objectives import format_value
    from ens.study import summarise_space

    table = _table(("space",), ("slots", "genotypes", "surrogates", "params", "MACs 256²"))
    for column in table.columns[:4]:
        column.no_wrap = True
    for name in studies or map(str, shipped_spaces()):
        summary = summarise_space(_load_study(name, None))
        space, sizes = summary.space, summary.space.sizes
        ranges = [f"{format_value(key, low)} – {format_value(key, high)}"
                  for key, (low, high) in (("params", summary.params), ("macs", summary.macs))]
        choices = f"{min(sizes)}–{max(sizes)}" if min(sizes) != max(sizes) else f"{sizes[0]}"
        count = f"{space.num_genotypes:,}" if space.num_genotypes < 1e9 else f"{space.num_genotypes:.1e}"
        table.add_row(space.name, f"{len(sizes)} × {choices}", count, f"{space.num_surrogates}", *ranges)
    _out.print(table)


@inspect.command()
def erf(run: Run, slot: Annotated[str, typer.Option(help="Slot to look into, for instance latent.")],
        target: Annotated[Path | None, typer.Option("--out", "-o", help="PNG; RUN/erf_SLOT.png by default.")] = None,
        ) -> None:
    """Effective receptive field: the teacher's, and the surrogates' before and after distillation and fine-tuning.

    The gradient of the centre of the slot's update (output - input) with respect to its input: a PNG, and the sides of
    the squares around the centre that hold 50 % and 95 % of its norm.
    """
    from ens import pipeline
    from ens.evaluate.receptive_field import energy_side_px

    target = target or run / f"erf_{slot}.png"
    with _reporting() as control:
        rows = pipeline.inspect_erf(run, slot, target, control)
    table = _table(("choice", "state"), ("50 % px", "95 % px"))
    for choice, states in rows.items():
        for state, energy in states.items():
            table.add_row(choice, state, *(str(energy_side_px(energy, share)) for share in (0.5, 0.95)))
    _out.print(table)
    _say(f"Sides in pixels of the slot's own features\n{target}")


@app.command()
def info() -> None:
    """What this installation has: versions, devices, scan kernels, and every name a study may use."""
    import onnxruntime
    import torch

    from ens.data.tasks import TASKS
    from ens.evaluate.protocols import PROTOCOLS
    from ens.objectives import OBJECTIVES
    from ens.ops.selective_scan import scan_backends
    from ens.search import ENGINES

    gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    rows = {"ens": ens.__version__, "python": sys.version.split()[0], "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__, "threads": str(torch.get_num_threads()), "GPU": gpus or "none",
            **{f"scan on {device}": path for device, path in scan_backends().items()},
            "networks": ", ".join(ens.NETWORKS), "families": ", ".join(ens.FAMILIES), "tasks": ", ".join(TASKS),
            "protocols": ", ".join(PROTOCOLS), "engines": ", ".join(ENGINES), "objectives": ", ".join(OBJECTIVES)}
    table = Table(box=None, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _out.print(table)


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(*words, box=SIMPLE_HEAD)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _print_front(front: Front, archive: Archive) -> None:
    from ens.objectives import format_value

    measured = archive.measurements()
    table = _table(("", "genotype"), (*front.objectives, "PSNR dB"))
    for index, member in enumerate(front.members):
        psnr_db = f"{sum(member.psnr_db) / len(member.psnr_db):.2f}" if member.psnr_db else ""
        table.add_row(front.role(index), format_genotype(member.genotype), *(
            format_value(name, member.values[name]) for name in front.objectives), psnr_db,
            style="bold" if index == front.knee else None)
    _out.print(table)
    _say(f"{len(measured)} genotypes measured, {len(front.members)} on the front, "
         f"{sum(not item.valid for item in measured)} invalid\nKnee: {_describe_member(front, front.knee)}")
    for (slot, labels), choice in zip(archive.slots.items(), front.members[front.knee].genotype, strict=True):
        _say(f"  {slot:<16} {labels[choice]}")


def _describe_member(front: Front, index: int) -> str:
    from ens.objectives import format_value

    member = front.members[index]
    values = ", ".join(f"{name} {format_value(name, member.values[name])}" for name in front.objectives)
    return f"{format_genotype(member.genotype)} ({values})"


def _say(text: str) -> None:
    _out.print(text, markup=False, soft_wrap=True)
