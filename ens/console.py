"""What a terminal shows: tables, progress bars, remarks. With `cli` the only file that prints.

Results go to standard output; progress, remarks and errors to standard error.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.style import StyleType
from rich.table import Table

from ens.runtime.process import Control, Interrupted, Stop, StopNow, format_duration
from ens.space import Genotype, format_genotype

if TYPE_CHECKING:
    from ens.data.task import Task
    from ens.evaluate.evaluator import Evaluation
    from ens.pareto.selection import Front
    from ens.run_folder import RunFolder
    from ens.runtime.bench import Timing

_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)
stop = Stop()
# C0 but the line end, C1, and what turns the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters written out, line ends aside: a file's name may hold what moves a cursor."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """A line of the result, as it is."""
    _out.print(printable(text), soft_wrap=True)


def show(table: Table) -> None:
    """A table of the result; no word of it is cut, however narrow the terminal is."""
    _out.print(table, crop=False)


def show_json(value: object) -> None:
    """The result as JSON, in ASCII; what is not finite as text, as in an archive."""
    _out.print(json.dumps(_plain(value), indent=1).replace("\x7f", "\\u007f"), soft_wrap=True)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def complain(text: str) -> None:
    """A line on standard error, as it is."""
    _err.print(printable(text), soft_wrap=True)


class _Table(Table):
    """Cells are text, whatever is in them; a column is as wide as its longest word at least."""

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        texts = [printable(cell) if isinstance(cell, str) else cell for cell in cells]
        super().add_row(*texts, style=style, end_section=end_section)
        for column, text in zip(self.columns, texts, strict=False):
            words = f"{column.header} {text}".split()
            column.min_width = max([column.min_width or 0, *map(cell_len, words)])


def replace_unknown_characters() -> None:
    """A terminal or pipe that lacks a character gets a question mark; an error would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def reporting() -> Iterator[Control]:
    """Progress bars on a terminal; elsewhere a line every half minute."""
    bars: dict[str, TaskID] = {}
    last: dict[str, float] = {}
    first: dict[str, tuple[float, int]] = {}
    quiet = os.environ.get("RANK", "0") != "0"  # torchrun starts several processes: the first one speaks
    with Progress(TextColumn("{task.description:>8}"), BarColumn(24), MofNCompleteColumn(),
                  TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                  TextColumn("{task.fields[note]}", markup=False),
                  console=_err, disable=quiet or not _shows_bars()) as progress:

        def report(verb: str, done: int, total: int, note: str) -> None:
            note = printable(note)
            if verb not in bars:
                bars[verb] = progress.add_task(verb, total=total, completed=done, note=note)
            progress.update(bars[verb], completed=done, total=total, note=note)
            now = time.monotonic()
            began, before = first.setdefault(verb, (now, done))
            if progress.disable and not quiet and (done == total or now > last.get(verb, 0.0) + 30):
                last[verb] = now
                left = (now - began) / (done - before) * (total - done) if before < done < total else 0.0
                complain(f"{verb} {done}/{total} {note}" + (f", about {format_duration(left)} left" if left else ""))

        def say(line: str) -> None:
            if not quiet:
                complain(line)

        try:
            yield Control(report, say, stop.is_set)
        except Interrupted:
            raise StopNow from None


def _shows_bars() -> bool:
    """Whether bars can be drawn: on a terminal, and in a notebook that has widgets for what changes."""
    return _err.is_terminal or (_err.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


def make_table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of words on the left, of numbers on the right."""
    table = _Table(*words, box=SIMPLE_HEAD)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def print_front(folder: RunFolder, front: Front) -> None:
    """The members of a front, and what fills every slot at the knee."""
    from ens.pareto.tables import front_notes, front_rows

    headers, rows = front_rows(front, short=True)
    table = _Table(box=SIMPLE_HEAD, padding=(0, 1))
    for index, header in enumerate(headers):
        width = max(len(row[index]) for row in rows)  # a value is never broken, its header may be
        table.add_column(header, justify="left" if index < 2 else "right", min_width=width)
    for index, row in enumerate(rows):
        table.add_row(*row, style="bold" if index == front.knee else None)
    show(table)
    measured, space = folder.archive.measurements(), folder.archive.space
    knee = front.members[front.knee].genotype
    for note in front_notes(front):
        say(note)
    say(f"{len(measured)} genotypes measured, {len(front.members)} on the front, "
        f"{sum(not item.valid for item in measured)} invalid\nKnee: {format_genotype(knee)}")
    for slot, choice in zip(space.slots, space.choices(knee), strict=True):
        say(f"  {slot.name:<16} {choice.label}")


def print_tuned(folder: RunFolder, genotypes: Sequence[Genotype]) -> None:
    """PSNR of fine-tuned hybrids on the images that chose them and on those that chose nothing."""
    from ens.export.hybrid import read_facts

    states = ("input", "before", "after", "teacher")
    table = make_table(("fine-tuned", "images"), [f"{state} dB" for state in states])
    for path in filter(None, map(folder.best_tuned, genotypes)):
        facts = read_facts(path)
        for prefix, images in (("", "validation"), ("report_", "report")):
            if f"{prefix}psnr_db_after" in facts:
                table.add_row(facts["genotype"], images, *(facts.get(f"{prefix}psnr_db_{state}", "")
                                                           for state in states))
    if table.row_count:
        show(table)


def print_evaluation(results: Sequence[Evaluation], task: Task, *, as_json: bool) -> None:
    """Scores of every image, and the means by every protocol."""
    first = results[0]
    if as_json:
        show_json({"data": first.fingerprint, "task": dict(asdict(task), name=task.name), "protocols": [
            {"protocol": result.protocol, "gain_db": result.gain_db,
             **dict(zip(("psnr_db", "ssim", "input_psnr_db"), result.means(), strict=True)),
             "images": [{"name": name, "psnr_db": score.psnr_db, "ssim": score.ssim} for name, score in
                        zip(result.names, result.outputs, strict=True)]} for result in results]})
        return
    table = make_table(("image",), (*(("input dB",) if first.inputs else ()), "PSNR dB", "SSIM"))
    for index, (name, score) in enumerate(zip(first.names, first.outputs, strict=True)):
        before = (f"{first.inputs[index].psnr_db:.2f}",) if first.inputs else ()
        table.add_row(name, *before, f"{score.psnr_db:.2f}", f"{score.ssim:.4f}")
    show(table)
    say(f"data     {first.fingerprint}\ntask     {task}")
    for result in results:
        psnr_db, ssim, input_db = result.means()
        gain = f" (input {input_db:.2f} dB, gain {result.gain_db:+.2f} dB)" if result.inputs else ""
        say(f"protocol {result.protocol}\nPSNR     {psnr_db:.2f} dB{gain}\nSSIM     {ssim:.4f}")
        for sentence in result.left_out:
            say(f"         {sentence}")


def print_bench(files: Sequence[str], found: Mapping[str, Sequence[Timing]], facts: Mapping[str, str], *,
                as_json: bool) -> None:
    """Milliseconds of files by image size, and how many times as fast as the first each is; quartiles in brackets."""
    if as_json:
        show_json({**facts, "sizes": {size: [{"file": file, **asdict(timing)} for file, timing in
                                             zip(files, timings, strict=True)] for size, timings in found.items()}})
        return
    table = make_table(("size", "file"), ("ms", "", "times as fast", ""))
    for size, timings in found.items():
        for file, one in zip(files, timings, strict=True):
            (low, high), (slower, faster) = one.quartiles_ms, one.times_as_fast_quartiles
            table.add_row(size, file, f"{one.median_ms:.1f}", f"{low:.1f}-{high:.1f}", f"{one.times_as_fast:.2f}",
                          f"{slower:.2f}-{faster:.2f}")
    show(table)
    say("Medians and quartiles; " + ", ".join(f"{name} {value}" for name, value in facts.items()))
