"""What the verbs of the command line are given: arguments and options that several of them share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ens.console import complain
from ens.objectives import find_objective, read_quantity

if TYPE_CHECKING:
    from ens.config import StudyConfig
    from ens.networks.steps import Network
    from ens.run_folder import RunFolder

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
Task = Annotated[str, typer.Option(help=(
    "Task with its numbers: denoise_s25, derain, deblur, sr_x4, jpeg_q10; or my_degradation:degrade with --import."))]
Within = Annotated[float | None, typer.Option(help="Name the cheapest member at most this many dB below the teacher.")]
Storage = Annotated[str, typer.Option(help=(
    "URL of the archive instead of RUN/archive.db, postgresql+psycopg://… for instance; several machines may "
    "search into it."))]
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
    "Overlap of the tiles: 64, or a quarter of a smaller tile, unless given."))]
Int8 = Annotated[bool, typer.Option("--int8", help=(
    "Also NAME.int8.onnx: 8-bit convolutions, calibrated on training images, at most 0.2 dB worse; measured."))]
Bundle = Annotated[bool, typer.Option("--bundle", help=(
    "Also a folder that restores images with onnxruntime, numpy and Pillow alone."))]
Plain = Annotated[bool, typer.Option("--plain", help=(
    "Also one Python file of plain PyTorch, with its weights, to read and train on without ens."))]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Runtime = Annotated[str, typer.Option(help=(
    "Runtime of an exported file: ort, openvino, openvino-default, executorch or torch; the format's own by default."))]
Restart = Annotated[bool, typer.Option("--restart", help=(
    "Drop the state of an unfinished training, where it is damaged or of another recipe, and begin it again."))]
Patience = Annotated[int | None, typer.Option(min=1, metavar="N", help=(
    "End when the front, and with it its hypervolume, has not grown for N evaluations."))]
Fix = Annotated[list[str] | None, typer.Option("--fix", metavar="SLOT=CHOICE", help=(
    "Measure and show only what keeps this choice in a slot, for instance latent=conv×1. May be given several "
    "times."))]
Forbid = Annotated[list[str] | None, typer.Option("--forbid", metavar="FAMILY", help=(
    "Measure and show nothing with blocks of this family, the teacher's own included. May be given several times."))]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help=(
    "Processes that measure on this machine; more may join with the same --storage. Asynchronous: which genotypes are "
    "measured depends on who is faster."))]
Ray = Annotated[str, typer.Option("--ray", metavar="ADDRESS", help=(
    "Distil and measure on the Ray cluster at this address (auto, host:6379); its nodes need the run folder and what "
    "its study names at the same paths."))]
Deterministic = Annotated[bool, typer.Option("--deterministic", help=(
    "Work in batches (search.batch_size) that all wait for: one seed measures the same with any number of workers."))]
OwnNetwork = Annotated[str, typer.Option("--network", metavar="NETWORK", help=(
    "What weights of your own belong to: my_network:build with --import, or my_network.py:build."))]
NetworkSet = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
    "Option of that network, for instance dim=48."))]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
    "Change one key of the study, for instance search.budget=40. May be given several times."))]


def _import_code(given: list[str] | None) -> list[str] | None:
    """Runs before the verb does; without --import nothing is loaded for it."""
    if given:
        from ens.own_code import import_code  # brings PyTorch

        for code in given:
            import_code(code)
    return given


EXAMPLES = {
    "run": ("ens run demo --out runs/demo", "ens run study.yaml --out run --pick best-under=latency_ms:100",
            "ens run study.yaml --out run --import my_network.py"),
    "init": ("ens init --network my_network.py:build --data photos --task sr_x2",
             "ens init --teacher dat.pth --data photos --task sr_x4"),
    "slots": ("ens slots my_network.py:build", "ens slots my_network.py:build --set dim=60 --all"),
    "estimate": ("ens estimate study.yaml", "ens estimate study.yaml --set distill.steps=2000"),
    "train": ("ens train study.yaml --out run",),
    "distill": ("ens distill study.yaml --out run --teacher restormer.pth",),
    "profile": ("ens profile runs/demo", "ens profile run --emit-bundle for_phone",
                "ens profile run --from results.json --name phone"),
    "search": ("ens search demo --out runs/demo --jobs 2", "ens search study.yaml --out run --max latency_ms=300"),
    "pareto": ("ens pareto runs/demo", "ens pareto runs/demo --objectives psnr_drop_db,macs",
               "ens pareto runs/demo --json"),
    "finetune": ("ens finetune runs/demo", "ens finetune run --pick 'within 0.1' --set finetune.steps=2000"),
    "export": ("ens export runs/demo", "ens export run --pick 0-2-1 --format onnx,pte --size 256"),
    "evaluate": ("ens evaluate --checkpoint run/export/0-2-1.onnx --data photos --task sr_x4",
                 "ens evaluate --checkpoint dat.pth --data set5 --task sr_x4 --json"),
    "restore": ("ens restore run/export/0-2-1.onnx photo.png restored.png",
                "ens restore restormer.pth photos restored --tile 512"),
    "degrade": ("ens degrade clean.png noisy.png --task denoise_s25",),
    "bench": ("ens bench teacher.onnx hybrid.onnx --size 256,480x640",),
    "spaces": ("ens spaces", "ens spaces study.yaml --json"),
    "info": ("ens info",),
    "schema": ("ens schema > study.schema.json",),
    "erf": ("ens inspect erf runs/demo --slot latent",),
}
"""Commands that the help of every verb ends with, in the order in which `ens --help` lists the verbs."""


def show_examples(verb: str) -> str:
    """The end of a verb's help: an empty line is a new line there."""
    return "\n\n".join(["Examples:" if len(EXAMPLES[verb]) > 1 else "Example:", *EXAMPLES[verb]])


def spell(*words: str) -> str:
    """A command to type next, with what this one has imported."""
    from ens.own_code import spell_imports

    return shlex.join(["ens", *words, *spell_imports()])


Import = Annotated[list[str] | None, typer.Option("--import", metavar="FILE.py|MODULE", callback=_import_code, help=(
    "Python code that defines a network or degradation of yours, my_network.py or my_package.module; nothing else is "
    "ever imported. May be given several times."))]


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


def search_changes(changes: Sequence[str] | None, bounds: list[str] | None = None, require: str | None = None,
                   patience: int | None = None, fix: list[str] | None = None,
                   forbid: list[str] | None = None) -> list[str]:
    """Changes of the study behind --set, --max, --require, --patience, --fix and --forbid; raises ValueError."""
    fixed: dict[str, str] = {}
    for entry in fix or ():
        slot, equals, choice = entry.partition("=")
        if not (slot and equals and choice):
            raise ValueError(f"--fix takes SLOT=CHOICE, for instance latent=conv×1, got {entry!r}")
        if fixed.setdefault(slot, choice) != choice:
            raise ValueError(f"--fix keeps one choice of a slot, got {fixed[slot]} and {choice} for {slot}")
    return [*(changes or ()), *bound_changes(bounds), *([f"search.require={require}"] if require else []),
            *([f"search.patience={patience}"] if patience else []),
            *([f"search.fix={json.dumps(fixed)}"] if fixed else []),
            *([f"search.forbid={json.dumps(forbid)}"] if forbid else [])]


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


def find_network(network: str, options: Sequence[str] | None, upscale: int = 1) -> Callable[[], Network] | None:
    """What makes the user's network behind --network and its --set, of this scale unless they say; None without one."""
    if not network:
        if options:
            raise ValueError("--set is for the options of --network, which is not given")
        return None
    from ens.config import parse_changes
    from ens.networks.own import create_whole
    from ens.own_code import name_code

    name, values = name_code(network), parse_changes(options or ())
    return lambda: create_whole(name, {"upscale": upscale, **values})


def load_named(name: str, changes: Sequence[str] | None = None, teacher: Path | None = None) -> StudyConfig:
    """A study by its file or shipped name, with what the command changes in it."""
    from ens.config import find_study, load_study, parse_changes

    overrides = parse_changes(changes or ())
    return load_study(find_study(name), {**overrides, "teacher": str(teacher.resolve())} if teacher else overrides)


def start(study: str, out: Path, changes: Sequence[str] | None, *, teacher: Path | None = None, storage: str = "",
          pick: str = "", restart: bool = False, wait_s: float = 0, ray: str = "", jobs: int = 1) -> RunFolder:
    """Take a folder for a study, or go on where it ran before; before that, join the cluster `ray`."""
    from ens.run_folder import RunFolder

    _check_storage(storage)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; a run takes a folder")
    if ray and jobs > 1:
        raise ValueError("--jobs is for this machine, --ray for a cluster: give one of them")
    if ray:
        from ens.workers import join_cluster

        join_cluster(ray)
    return RunFolder.start(load_named(study, changes, teacher), out, storage=storage, pick=pick, restart=restart,
                           wait_s=wait_s, say=complain)


def _check_storage(storage: str) -> None:
    """Raises ValueError for what is no URL (nor a file's whole path, as pages print it), or in no folder there is."""
    if not storage:
        return
    if "://" not in storage and not Path(storage).is_absolute():
        raise ValueError(f"--storage takes a URL, sqlite:///runs/archive.db or postgresql+psycopg://user@host/name, "
                         f"not {storage!r}")
    from ens.pareto.storage import Storage

    file = Storage(storage).path
    if file is not None and not file.parent.is_dir():
        raise ValueError(f"--storage {storage}: there is no folder {file.parent}")


def open_run(run: Path, changes: Sequence[str] | None = None, *, storage: str = "", restart: bool = False) -> RunFolder:
    """Open the run in a folder."""
    _check_storage(storage)
    from ens.config import parse_changes
    from ens.run_folder import RunFolder

    return RunFolder.reopen(run, parse_changes(changes or ()), storage=storage, restart=restart)
