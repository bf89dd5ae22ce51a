"""The verbs of the command line that time: `ens profile`, `ens bench` and `ens estimate`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ens.console import make_table, print_bench, reporting, say, show
from ens.options import AsJson, Import, Repeats, Runtime, Set, Sizes, Study, Teacher, Threads, load_named, parse_sizes

if TYPE_CHECKING:
    from ens.run_folder import RunFolder


def bench(files: Annotated[list[str], typer.Argument(metavar="A B...", help="Files that hold networks.")],
          runtime: Runtime = "", size: Sizes = "256", threads: Threads = None,
          repeats: Repeats = 15,
          as_json: AsJson = False, code: Import = None) -> None:
    """Time files in turn, in one run: milliseconds, and how many times as fast as the first."""
    from ens.runtime.bench import bench_files
    from ens.runtime.runner import describe_machine

    shapes, machine = parse_sizes(size), describe_machine()
    with reporting() as control:
        found = {f"{height}x{width}": bench_files(
            files, height=height, width=width, threads=threads, runtime=runtime, repeats=repeats,
            on_round=lambda number: control.progress("bench", number, repeats, "rounds")) for height, width in shapes}
    print_bench(files, found, {**machine, "threads": str(threads or "default")}, as_json=as_json)


def profile(
    target: Annotated[str, typer.Argument(metavar="RUN|LIBRARY", help="Run folder, library, or study with --out.")],
    runtime: Runtime = "", size: Sizes = "", threads: Threads = None,
    name: Annotated[str, typer.Option(help="Fill the table of latency_ms@NAME instead of latency_ms's.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the tables of a library or study.")] = None,
    emit_bundle: Annotated[Path | None, typer.Option(help=(
        "Write files, plan and runner into this folder for another device, and time nothing."))] = None,
    results: Annotated[Path | None, typer.Option("--from", metavar="results.json", help=(
        "Read what the runner of a bundle has left, and time nothing."))] = None,
    changes: Set = None, code: Import = None,
) -> None:
    """Time every choice of every slot in a runtime: the latency table that latency_ms is read from.

    Goes on where it was stopped; a table that is there is made anew. Random hybrids are timed whole beside their
    prediction.
    """
    from ens.evaluate.latency import format_table, read_table, write_table
    from ens.objectives import LATENCY
    from ens.pipeline import profile as make_tables
    from ens.runtime.profiling import read_results

    given_here = {"latency.runtime": runtime and json.dumps(runtime), "threads": threads}
    folder = _open_target(target, out, [*(changes or ()), *(f"{key}={value}" for key, value in given_here.items()
                                                            if value)])
    objective, sizes = f"{LATENCY}@{name}" if name else LATENCY, parse_sizes(size) if size else []
    first = sizes[0] if sizes else folder.study.latency.size
    if emit_bundle:
        with reporting() as control:
            folder.profile(emit_bundle, first, control, files_only=True)
        say(f"The bundle is in {emit_bundle}. There: python run.py. Then here: ens profile {target} --from "
            f"{emit_bundle / 'results.json'}")
        return
    if results:
        paths = [folder.table_path(objective, 0, first)]
        write_table(paths[0], read_results(results, folder.space))
    else:
        folder.hold()
        with reporting() as control:
            paths = make_tables(folder, control, objective=objective, sizes=sizes)
    for path in paths:
        table = read_table(path)
        headers, rows = format_table(table)
        shown = make_table(headers[:2], headers[2:])
        for row in rows:
            shown.add_row(*row)
        show(shown)
        say(f"{table.protocol}\n{table.quality}\n{path}")


def _open_target(target: str, out: Path | None, changes: list[str]) -> RunFolder:
    """The run in a folder, or one whose tables go to `out`: of a library's surrogates, or of a study."""
    from ens.config import build_study, find_study, load_study, parse_changes
    from ens.distill.library import open_library
    from ens.run_folder import RunFolder
    from ens.space import BUILTIN

    tree = parse_changes(changes)
    if (Path(target) / "study.yaml").exists():
        return RunFolder.reopen(Path(target), tree)
    if out is None:
        raise ValueError(f"{target} is no run folder; give --out, a folder for its tables")
    if not target.startswith(BUILTIN) and not (Path(target) / "manifest.json").exists():
        return RunFolder(out, load_study(find_study(target), tree))
    slots: dict[str, list[str]] = {}
    for item in open_library(target).surrogates.values():
        if not item.failed:
            slots.setdefault(item.slot, []).append(item.choice)
    study = {"name": "library", "task": {"name": "library"}, "library": target, "slots": slots, **tree}
    return RunFolder(out, build_study(study, folder=Path.cwd()))


def estimate(study: Study, teacher: Teacher = None,
             out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder with what is done.")] = None,
             changes: Set = None, code: Import = None) -> None:
    """Say what `ens run` of a study takes here: time of every verb, memory and disk, from a pilot of seconds."""
    from ens.forecast import forecast
    from ens.run_folder import RunFolder
    from ens.runtime.process import format_duration

    with tempfile.TemporaryDirectory() as empty, reporting() as control:
        folder = RunFolder(out or Path(empty), load_named(study, changes, teacher), say=control.say)
        folder.check(tuned=True)
        found = forecast(folder)
    if found is None:
        say("Nothing is left that takes long.")
        return
    table = make_table(("verb", "what"), ("time",))
    for cost in found.costs:
        table.add_row(cost.verb, cost.what, format_duration(cost.seconds))
    show(table)
    say(found.describe())
