"""Selection, tables and the report: what a person sees of a front."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ens.pareto.charts import draw_png
from ens.pareto.palette import TEACHER, choice_colours, text_colour
from ens.pareto.report import slot_levels, write_csv, write_markdown, write_png, write_report
from ens.pareto.selection import Front, cheapest_member, format_value, front_table, pick_genotype, select_front
from ens.space import Choice, Measurement, SearchSpace, Slot, format_genotype

STAGES = ("encoder_level1", "encoder_level2", "encoder_level3", "latent", "decoder_level3", "decoder_level2",
          "decoder_level1", "refinement")
CHOICES = (Choice("restormer", 2, teacher=True), Choice("vssd", 1), Choice("vssd", 2), Choice("identity", 1))
SPACE = SearchSpace("report <&>", tuple(Slot(name, CHOICES) for name in STAGES))
TWO, THREE = ("psnr_drop_db", "macs"), ("psnr_drop_db", "macs", "params")
PNG = b"\x89PNG\r\n\x1a\n"


def measurements(count: int = 40) -> list[Measurement]:
    rng = np.random.default_rng(0)
    made = [Measurement((0,) * 8, {"psnr_drop_db": 0.0, "macs": 2e9, "params": 1e6}, (30.0, 31.0))]
    for genotype in sorted({SPACE.sample(rng) for _ in range(count)}):
        drop = 0.1 * sum(genotype) + 0.01 * genotype[0]
        made.append(Measurement(genotype, {"psnr_drop_db": drop, "macs": 2e9 / (1 + sum(genotype)),
                                           "params": 1e6 - 1e4 * genotype[3]}, (30.0 - drop, 31.0 - drop)))
    return [*made, Measurement((3,) * 8, {"psnr_drop_db": math.nan}, valid=False, note="diverged </script>")]


def front_of(*points: tuple[float, float]) -> Front:
    return select_front([Measurement((number, *(0,) * 7), dict(zip(TWO, point, strict=True)))
                         for number, point in enumerate(points)], TWO)


def test_the_front_is_sorted_and_holds_no_invalid_or_dominated_member() -> None:
    front = select_front(measurements(), TWO)
    assert (np.diff(front.values[:, 0]) >= 0).all() and (np.diff(front.values[:, 1]) <= 0).all()
    assert all(member.valid for member in front.members)
    assert front.knee not in front.nearest and len(front.nearest) == 5
    roles = [front.role(index) for index in (front.knee, *front.nearest)]
    assert roles == ["knee", "near 1", "near 2", "near 3", "near 4", "near 5"]


def test_without_a_valid_measurement_there_is_no_front() -> None:
    with pytest.raises(ValueError, match="none of the 1 measurements is valid"):
        select_front(measurements()[-1:], TWO)


def test_a_member_is_picked_by_role_limit_or_genotype() -> None:
    front = front_of((0.0, 10.0), (0.1, 4.0), (1.0, 3.0))
    for pick, first in (("knee", 1), ("within 0.05", 0), ("within 2", 2), ("2-0-0-0-0-0-0-0", 2)):
        assert pick_genotype(pick, front=front, space=SPACE) == (first, *(0,) * 7), pick
    assert pick_genotype("near 1", front=front, space=SPACE) == (0, *(0,) * 7)
    for pick, message in (("within much", "within 0.1"), ("best", "write knee"), ("", "write knee"),
                          ("within -1", "the smallest is 0"), ("near 5", "no 'near 5'; it has knee, near 1"),
                          ("9-0-0-0-0-0-0-0", "allows 0 to 3")):
        with pytest.raises(ValueError, match=message):
            pick_genotype(pick, front=front, space=SPACE)


def test_the_cheapest_member_needs_a_drop() -> None:
    with pytest.raises(ValueError, match="needs the objective psnr_drop_db"):
        cheapest_member(select_front(measurements(), ("macs", "params")), 0.1)


def test_values_are_printed_as_people_read_them() -> None:
    for name, value, text in (("macs", 1.234e9, "1.23 G"), ("macs", 310e9, "310 G"), ("params", 26_126_644, "26.1 M"),
                              ("params", 512, "512"), ("macs", 8e9, "8.00 G"),
                              ("psnr_drop_db", 0.12345, "0.123"), ("penalty", 6.5, "6.5")):
        assert format_value(name, value) == text


def test_csv_keeps_full_precision_and_every_slot(tmp_path: Path) -> None:
    front = select_front(measurements(), THREE)
    write_csv(tmp_path / "front.csv", front=front, space=SPACE)
    table = pd.read_csv(tmp_path / "front.csv", keep_default_na=False)
    assert table.columns.tolist() == ["role", "genotype", *THREE, "psnr_db", *STAGES]
    assert (table[list(THREE)].to_numpy() == front.values).all()
    assert table.loc[front.knee, "role"] == "knee" and table.loc[0, "latent"] == "restormer×2"
    assert table.equals(front_table(front, space=SPACE).astype(table.dtypes))


def test_markdown_has_one_row_a_member(tmp_path: Path) -> None:
    front = select_front(measurements(), TWO)
    write_markdown(tmp_path / "front.md", title="A front", front=front)
    lines = (tmp_path / "front.md").read_text().splitlines()
    assert lines[0] == "# A front" and len(lines) == 4 + len(front.members)
    assert len({line.count("|") for line in lines[2:]}) == 1


@pytest.mark.parametrize("objectives", [TWO, THREE, ("macs", "params")])
def test_the_png_is_a_picture_of_its_size(objectives: tuple[str, ...], tmp_path: Path) -> None:
    write_png(tmp_path / "front.png", title="t", measurements=measurements(), front=select_front(measurements(),
                                                                                                objectives))
    data = (tmp_path / "front.png").read_bytes()
    assert data.startswith(PNG) and int.from_bytes(data[16:20]) == 1200 and int.from_bytes(data[20:24]) == 750
    assert data != draw_png(title="t", measurements=measurements()[:5], front=front_of((0, 1), (1, 0)))


class Page(HTMLParser):
    """Attributes that could load something, texts of script elements, and all visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: dict[str, str] = {}
        self.texts: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [found[key] or "" for key in ("src", "href", "action", "data") if key in found]
        if tag == "script":
            self._script = found.get("id") or f"script{len(self.scripts)}"

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.texts.append(data)


@pytest.fixture(scope="module", params=[TWO, THREE], ids=["two objectives", "three objectives"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, Page, str]:
    front = select_front(measurements(), request.param)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, title="Front <of> tests", space=SPACE, measurements=measurements(), front=front,
                 reference=(6.0, 2.2e9, 1.1e6)[:len(request.param)], facts={"protocol": "awgn <b>v1</b>"},
                 crops={"<photo>.png": [("input, 20.2 dB", PNG + b"1"), ("teacher", PNG + b"2")]})
    text = path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"], "no temporary file stays"
    return front, Page(text), text


def test_the_page_loads_nothing_from_anywhere(page: tuple[Front, Page, str]) -> None:
    _, parsed, text = page
    assert parsed.loads and all(link.startswith("data:") for link in parsed.loads)
    style = text[text.index("<style>"):text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_page_carries_every_member_and_marks_the_knee(page: tuple[Front, Page, str]) -> None:
    front, parsed, _ = page
    state = json.loads(parsed.scripts["state"])
    assert [member["genotype"] for member in state["members"]] == [format_genotype(m.genotype) for m in front.members]
    assert state["knee"] == front.knee and state["levels"] == [0, 1, 2, 3, 2, 1, 0, 0]
    assert set(state["members"][front.knee]["values"]) == {"psnr_drop_db", "macs", "params"}
    for member in front.members:
        assert format_genotype(member.genotype) in parsed.texts


def test_hovering_shows_the_genotype_of_every_valid_measurement(page: tuple[Front, Page, str]) -> None:
    front, parsed, _ = page
    traces = json.loads(parsed.scripts["front-figure"])["data"]
    hover = [text for trace in traces for text in trace.get("hovertext", [])]
    shown = {re.match(r"<b>([\d-]+)</b>", text)[1] for text in hover}  # type: ignore[index]
    assert shown == {format_genotype(item.genotype) for item in measurements() if item.valid}
    assert len(traces[1]["hovertext"]) == len(front.members), "the script takes trace 1 for the front"


def test_what_users_named_is_escaped(page: tuple[Front, Page, str]) -> None:
    _, parsed, text = page
    for raw in ("Front <of> tests", "awgn <b>v1</b>", "<photo>.png", "diverged </script>"):
        assert raw not in text and any(raw in piece for piece in parsed.texts), raw


def test_slots_without_levels_form_a_symmetrical_u_and_blocks_share_their_stage() -> None:
    def levels(*names: str) -> list[int]:
        return slot_levels(SearchSpace("s", tuple(Slot(name, CHOICES) for name in names)))

    assert levels("a", "b", "c", "d", "e") == [0, 1, 2, 1, 0]
    assert levels("encoder_level1.0", "encoder_level1.1", "latent.0", "latent.1", "decoder_level1.0",
                  "refinement.0") == [0, 0, 1, 1, 0, 0]


def test_cells_leave_options_out_unless_they_tell_choices_apart(tmp_path: Path) -> None:
    def shown(*choices: Choice) -> list[str]:
        space = SearchSpace("s", (Slot("a", (Choice("restormer", 2, teacher=True), *choices)),))
        front = select_front([Measurement((1,), {"psnr_drop_db": 0.0, "macs": 1.0})], TWO)
        write_report(tmp_path / "r.html", title="t", space=space, measurements=front.members, front=front,
                     reference=(1.0, 2.0), facts={}, crops={})
        return re.findall(r'<td class="cell">(.*?)</td>', (tmp_path / "r.html").read_text())

    small, large = (Choice("vssd", 1, (("state", state),)) for state in (8, 16))
    assert shown(small) == ["vssd×1"] and shown(small, large) == ["vssd×1(state=8)"]


def test_colours_tell_families_and_depths_apart() -> None:
    colours = choice_colours(SPACE)[0]
    assert colours[0] == TEACHER and len(set(colours)) == len(CHOICES)
    assert text_colour("#000000") == "#ffffff" and text_colour("#FFFFFF") != "#ffffff"
