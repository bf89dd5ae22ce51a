"""What a terminal gets: names as they are, whatever is in them, and whole words, however narrow it is."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ens import console


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 40 columns for both streams."""
    written = io.StringIO()
    for name in ("_out", "_err"):
        monkeypatch.setattr(console, name, Console(file=written, width=40, highlight=False, markup=False,
                                                   force_terminal=name == "_err", color_system=None))
    return written


HOSTILE = "a[red]b[/red]\x1b[2J\x1b]0;title\x07\r\u202egnp.png\x9b1m"
SHOWN = r"a[red]b[/red]\x1b[2J\x1b]0;title\x07\r\u202egnp.png\x9b1m"


def test_names_are_shown_and_never_obeyed(screen: io.StringIO) -> None:
    console.say(HOSTILE)
    console.complain(HOSTILE)
    table = console.make_table(("image",), ("dB",))
    table.add_row(HOSTILE, "1")
    console.show(table)
    assert screen.getvalue().count(SHOWN) == 3 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", screen.getvalue())


def test_names_survive_the_progress_bar(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console._err, "_width", 200)
    with console.reporting() as control:
        control.progress("restore", 1, 2, HOSTILE)
    assert SHOWN in screen.getvalue() and "\x1b[2J" not in screen.getvalue() and "\x07" not in screen.getvalue()


def test_no_word_of_a_table_is_cut_at_forty_columns(screen: io.StringIO) -> None:
    genotype = "-".join(str(index % 10) for index in range(40))
    table = console.make_table(("", "genotype"), ("PSNR drop (dB)", "parameters", "penalty"))
    table.add_row("knee", genotype, "0.123", "12.3 M", "7.25")
    table.add_row("", "", "", "", "")
    console.show(table)
    words = set(screen.getvalue().split())
    assert {"knee", genotype, "0.123", "7.25", "12.3", "parameters"} <= words
