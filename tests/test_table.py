"""Tables from CSV files: what they must hold, which costs are known in advance, and engines replayed on them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import ens

LINES = [f"{a}-{b}-{c},{a + b * c},{2 * a + b + 0.5 * c},{a * b * c}"
         for a, b, c in itertools.product(range(3), range(2), range(3))]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(["genotype,drop,cost,peak", *lines]) + "\n", encoding="utf-8")
    return path


def test_a_table_knows_which_of_its_costs_add_up(tmp_path: Path) -> None:
    table = ens.load_table(write(tmp_path / "a.csv", LINES), ("drop", "cost", "peak"))
    assert table.space.sizes == (3, 2, 3) and table.costs[0] is None and table.costs[2] is None
    cost = table.costs[1]
    assert cost is not None
    for genotype in table.space.enumerate():
        assert cost.value(genotype) == pytest.approx(table.values([genotype])[0, 1])


def test_engines_replay_a_table_without_repeating_a_genotype(tmp_path: Path) -> None:
    table = ens.load_table(write(tmp_path / "a.csv", LINES), ("drop", "cost"))
    for engine in ("exact", "random", "exhaustive"):
        order = table.replay(engine, budget=100, seed=1, batch_size=4)
        assert sorted(order) == list(table.space.enumerate())


@pytest.mark.parametrize(("lines", "objectives", "message"), [
    (LINES[:-1], ("drop", "cost"), "17 genotypes, not every one of 18"),
    (LINES, ("drop", "speed"), "no column speed"), (LINES, ("drop",), "two columns or more"),
    (LINES, "drop", "two columns or more"), (LINES, ("drop", "drop"), "each once"), ([], ("drop", "cost"), "holds no"),
    (LINES, ("drop", "csot"), "did you mean cost"),
    ([*LINES[:-1], "2-1-2,nan,1,1"], ("drop", "cost"), "finite"), ([*LINES[:-1], "2-1-2,fast,1,1"], ("drop", "cost"),
                                                                   "line 19: .*fast"),
    ([*LINES[:-1], "2-1-2"], ("drop", "cost"), "line 19: .*nothing"), ([*LINES, "2-1-2,9,1,1"], ("drop", "cost"),
                                                                       "line 20: 2-1-2 has other values")])
def test_a_table_that_is_not_one_says_what_it_lacks(tmp_path: Path, lines: list[str], objectives: tuple[str, ...],
                                                     message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ens.load_table(write(tmp_path / "a.csv", lines), objectives)


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", LINES)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(ens.load_table(path, ["drop", "cost"]).rows) == 18
