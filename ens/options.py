"""What the verbs of the command line are given: arguments and options that several of them share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from ens.objectives import find_objective, read_quantity

Study = Annotated[str, typer.Argument(metavar="SPACE.yaml", help="The study: a file, or the name of a shipped one.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that `ens run` or `ens search` made.")]
Pick = Annotated[str, typer.Option(help=(
    "knee, near 1 to near 5, 'within 0.1' (dB, least of the first cost), fastest-within=0.1 (dB), "
    "best-under=latency_ms:120, or a genotype like 0-2-1."))]
Bounds = Annotated[list[str] | None, typer.Option("--max", metavar="OBJECTIVE=VALUE", help=(
    "Measure and show nothing that exceeds this, for instance latency_ms=300 or peak_bytes=200M. May be given several "
    "times."))]
Require = Annotated[Literal["edge"] | None, typer.Option("--require", help=(
    "edge: leave out every choice that is no single piece in ExecuTorch (XNNPACK) or a loop in ONNX."))]
Task = Annotated[str, typer.Option(help="Task with its numbers: denoise_s25, derain, deblur, sr_x4, jpeg_q10.")]
Within = Annotated[float | None, typer.Option(help="Name the cheapest member at most this many dB below the teacher.")]
Storage = Annotated[str, typer.Option(help=(
    "URL of the archive instead of RUN/archive.db, for instance postgresql+psycopg://user@host/name; several machines "
    "may search into it."))]
Teacher = Annotated[Path | None, typer.Option(help="Checkpoint to use as the teacher.")]
TaughtBy = Annotated[Path | None, typer.Option("--teacher", help="Checkpoint whose output is extra supervision.")]
TaughtWeight = Annotated[float | None, typer.Option("--teacher-weight", min=0, max=1, help=(
    "Share w of the teacher in the loss: (1-w) L1(target) + w L1(teacher's output)."))]
Sizes = Annotated[str, typer.Option("--size", help="Sides of the image in px: 256, 480x640, or several with commas.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of the runtime.")]
Repeats = Annotated[int, typer.Option(metavar="N", min=2, help="Times that each file runs.")]
Candidates = Annotated[int | None, typer.Option(min=1, help="Hybrids to fine-tune: the pick and its nearest.")]
Formats = Annotated[str, typer.Option("--format", metavar="NAMES", help=(
    "One or several of onnx, openvino (the ONNX file, checked there too), pte (ExecuTorch), pt2 (torch.export)."))]
Size = Annotated[str, typer.Option(metavar="HxW", help=(
    "Fixed size of the image, for instance 256 or 192x256; else any, and 256 for pte, which cannot."))]
Tile = Annotated[int | None, typer.Option(metavar="PX", min=1, help="Work in tiles of this size.")]
TileOverlap = Annotated[int | None, typer.Option(metavar="PX", min=0, help=(
    "Overlap of the tiles: 32, or half of a smaller tile, unless given."))]
Int8 = Annotated[bool, typer.Option("--int8", help=(
    "Also NAME.int8.onnx: 8-bit convolutions, calibrated on training images, at most 0.2 dB worse; measured."))]
Bundle = Annotated[bool, typer.Option("--bundle", help=(
    "Also a folder that restores images with onnxruntime, numpy and Pillow alone."))]
Plain = Annotated[bool, typer.Option("--plain", help=(
    "Also one Python file of plain PyTorch, with its weights, to read and train on without ens."))]
Runtime = Annotated[str, typer.Option(help=(
    "Runtime of an exported file: ort, openvino, openvino-default, executorch or torch; the format's own by default."))]
Restart = Annotated[bool, typer.Option("--restart", help=(
    "Drop the state of an unfinished training, where it is damaged or of another recipe, and begin it again."))]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help=(
    "Processes that measure on this machine; more may join with the same --storage. Asynchronous: which genotypes are "
    "measured depends on who is faster."))]
Deterministic = Annotated[bool, typer.Option("--deterministic", help=(
    "Work in batches (search.batch_size) that all wait for: one seed measures the same with any number of workers."))]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
    "Change one key of the study, for instance search.budget=40. May be given several times."))]


_imports: list[str] = []


def _import_code(given: list[str] | None) -> list[str] | None:
    """Runs before the verb does; without --import nothing is loaded for it."""
    if given:
        from ens.networks.own import import_code  # brings PyTorch

        for code in given:
            import_code(code)
            _imports.append(code)
    return given


def spell(*words: str) -> str:
    """A command to type next, with what this one imports."""
    return shlex.join(["ens", *words, *(word for code in _imports for word in ("--import", code))])


Import = Annotated[list[str] | None, typer.Option("--import", metavar="FILE.py|MODULE", callback=_import_code, help=(
    "Python code that defines a network of yours, my_network.py or my_package.module; nothing else is ever imported. "
    "May be given several times."))]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`256,480x640` as heights and widths; raises ValueError."""
    sizes = []
    for part in text.split(","):
        height, times, width = part.strip().lower().partition("x")
        width = width if times else height
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise ValueError(f"--size takes sides in px such as 256 or 480x640, several with commas, not {text!r}")
        sizes.append((int(height), int(width)))
    return sizes


def parse_size(text: str) -> tuple[int, int] | None:
    """The one size of `256` or `480x640`, None for nothing; raises ValueError."""
    sizes: list[tuple[int, int] | None] = [*parse_sizes(text)] if text else [None]
    if len(sizes) > 1:
        raise ValueError(f"--size takes one size here, not {text!r}")
    return sizes[0]


def parse_names(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def require_changes(require: str | None) -> list[str]:
    """Changes of the study behind --require."""
    return [f"search.require={require}"] if require else []


def bound_changes(bounds: list[str] | None) -> list[str]:
    """Changes of the study behind --max; raises ValueError."""
    changes = []
    for bound in bounds or ():
        name, equals, text = bound.partition("=")
        if not equals:
            raise ValueError(f"--max takes OBJECTIVE=VALUE, for instance latency_ms=300, got {bound!r}")
        find_objective(name)
        changes.append(f"search.max.{name}={read_quantity(text)!r}")
    return changes
