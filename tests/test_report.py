"""Selection, tables and the report: what a person sees of a front."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ens.objectives import OBJECTIVES, format_value
from ens.pareto.archive import Archive, open_archive, read_archive, record_tuned
from ens.pareto.baseline import Baseline
from ens.pareto.charts import draw_png
from ens.pareto.palette import TEACHER, choice_colours, text_colour
from ens.pareto.report import (
    draw_report,
    drawn_fingerprint,
    slot_levels,
    spread_members,
    telling_images,
    write_front,
)
from ens.pareto.selection import Front, cheapest_member, pick_genotype, select_front
from ens.pareto.tables import front_rows, front_table
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
        made.append(Measurement(genotype, {"psnr_drop_db": drop, "psnr_drop_se_db": 0.01,
                                           "macs": 2e9 / (1 + sum(genotype)),
                                           "params": 1e6 - 1e4 * genotype[3]}, (30.0 - drop, 31.0 - drop)))
    return [*made, Measurement((3,) * 8, {"psnr_drop_db": math.nan}, valid=False, note="diverged </script>")]


BASELINE = Baseline((30.0, 31.0), (20.0, 21.0), {"macs": 2e9, "params": 9.9e5})


def archive_of(folder: Path, items: list[Measurement], *, objectives: tuple[str, ...] = TWO, space: SearchSpace = SPACE,
               baseline: Baseline | None = BASELINE) -> Archive:
    manifest = {"study": "Front <of> tests", "protocol": "awgn <b>v1</b>"}
    with open_archive(folder / "archive.db", space=space, objectives=objectives, manifest=manifest,
                      baseline=baseline) as archive:
        for item in items:
            archive.record(item)
    return read_archive(folder / "archive.db")


def written(folder: Path, items: list[Measurement], objectives: tuple[str, ...] = TWO, *, space: SearchSpace = SPACE,
            tuned: bool = False) -> Front:
    """`write_front` of an archive with these measurements; `tuned` fine-tunes the knee first."""
    archive = archive_of(folder, items, objectives=objectives, space=space)
    front = select_front(archive.measurements(), objectives, baseline=archive.baseline)
    if tuned:
        record_tuned(folder / "archive.db", front.members[front.knee].genotype, recipe="abc", psnr_db=[29.9, 30.9],
                     report={"input": 20.0, "before": 27.5, "after": 29.25, "teacher": 29.5})
        archive = read_archive(folder / "archive.db")
        front = select_front(archive.measurements(), objectives, baseline=archive.baseline)
    write_front(folder, front=front, archive=archive,
                crops={"<photo>.png": [("input, 20.2 dB", PNG + b"1"), ("teacher", PNG + b"2")]})
    return front


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
    assert pick_genotype("near 1", front=front, space=SPACE) == (2, *(0,) * 7), "the teacher is nobody's neighbour"
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
    front = written(tmp_path, measurements(), THREE, tuned=True)
    table = pd.read_csv(tmp_path / "front.csv", keep_default_na=False, na_values=[""])
    assert {"role", "genotype", *THREE, "psnr_drop_se_db", "psnr_db", "psnr_db_tuned", *STAGES} <= set(table.columns)
    assert (table[list(THREE)].to_numpy() == front.values).all()
    assert table.loc[front.knee, "role"] == "knee" and table.loc[0, "latent"] == "restormer×2"
    assert table.loc[front.knee, "psnr_db_tuned"] == 30.4
    assert len(table) == len(front_table(front, space=SPACE))


def test_markdown_has_one_row_a_member_and_words_for_people(tmp_path: Path) -> None:
    front = written(tmp_path, measurements(), tuned=True)
    text = (tmp_path / "front.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "# Front <of> tests: PSNR drop (dB) against multiply-adds at 256×256"
    assert len({line.count("|") for line in lines[2:4 + len(front.members)]}) == 1
    assert "psnr_drop_db" not in text and "macs" not in text and "e+" not in text
    assert "| 27.50 | 29.25 | 29.50 |" in text and "report images, which chose nothing" in text


def test_rows_carry_the_error_of_the_drop_and_marks_that_are_explained(tmp_path: Path) -> None:
    front = written(tmp_path, measurements())
    headers, rows = front_rows(front)
    assert headers[2:4] == [OBJECTIVES[name].label for name in TWO]
    drop = rows[1][headers.index("PSNR drop (dB)")]
    assert re.fullmatch(r"-?\d\.\d{3} ± 0\.010( ≈)?", drop)
    # The teacher of the baseline has 990,000 parameters: members with the million of the table are marked.
    marked = [row[headers.index("parameters")].endswith("▲") for row in rows]
    assert marked == [member.values["params"] > 9.9e5 for member in front.members]


@pytest.mark.parametrize("objectives", [TWO, THREE, ("macs", "params")])
def test_the_png_is_a_picture_of_its_size(objectives: tuple[str, ...], tmp_path: Path) -> None:
    written(tmp_path, measurements(), objectives, tuned=True)
    data = (tmp_path / "front.png").read_bytes()
    assert data.startswith(PNG) and int.from_bytes(data[16:20]) == 1200 and int.from_bytes(data[20:24]) == 750
    assert data != draw_png(title="t", front=front_of((0, 1), (1, 0)))


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
    folder = tmp_path_factory.mktemp("report")
    front = written(folder, measurements(), request.param, tuned=True)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert sorted(entry.name for entry in folder.glob("*front*")) == ["front.csv", "front.md", "front.png"]
    assert drawn_fingerprint(folder / "report.html") == read_archive(folder / "archive.db").fingerprint
    return front, Page(text), text


def test_the_page_loads_nothing_from_anywhere(page: tuple[Front, Page, str]) -> None:
    _, parsed, text = page
    assert parsed.loads and all(link.startswith("data:") for link in parsed.loads)
    style = text[text.index("<style>"):text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_page_carries_every_member_and_marks_the_knee(page: tuple[Front, Page, str]) -> None:
    front, parsed, _ = page
    state = json.loads(parsed.scripts["state"])
    view, items = state["views"][0], state["items"]
    assert [items[number]["genotype"] for number in view["members"]] == [format_genotype(m.genotype)
                                                                         for m in front.members]
    assert view["knee"] == front.knee and view["roles"][front.knee] == "knee"
    assert state["levels"] == [0, 1, 2, 3, 2, 1, 0, 0] and state["slots"][0]["name"] == "encoder level 1"
    knee = items[view["members"][front.knee]]
    assert knee["tuned"] == "30.40" and knee["tuned_drop"] == pytest.approx(0.1)
    assert knee["psnr"] == f"{np.mean(front.members[front.knee].psnr_db):.2f}"


def test_every_two_measured_objectives_have_a_view_with_their_own_front(page: tuple[Front, Page, str]) -> None:
    front, parsed, _ = page
    state = json.loads(parsed.scripts["state"])
    pairs = [pair for pair in itertools.combinations(THREE, 2) if set(pair) != set(front.objectives)]
    assert [view["label"] for view in state["views"][1:]] == [
        " against ".join(OBJECTIVES[name].label for name in pair) for pair in pairs]
    for view, pair in zip(state["views"][1:], pairs, strict=True):
        expected = select_front(measurements(), pair, baseline=BASELINE)
        assert [state["items"][number]["genotype"] for number in view["members"]] == [
            format_genotype(member.genotype) for member in expected.members]


def test_the_page_draws_every_valid_measurement_the_teacher_and_the_input(page: tuple[Front, Page, str]) -> None:
    _, parsed, _ = page
    state = json.loads(parsed.scripts["state"])
    assert {item["genotype"] for item in state["items"]} == {
        format_genotype(item.genotype) for item in measurements() if item.valid}
    assert state["input"] == 10.0 and state["objectives"][0]["label"] == "PSNR drop (dB)"
    assert state["teacher"] == [0.0, 2e9, 9.9e5] and any(state["views"][0]["errors"])
    assert state["command"].startswith("ens export ") and state["growth"][-1][1] == 100.0


def test_the_size_that_milliseconds_refer_to_is_in_their_label() -> None:
    meters = {"latency_ms": "ort 1.31.1, float32, 1 thread, 192x256, a CPU", "macs": "at 256×256"}
    items = [Measurement((one, *(0,) * 7), {"psnr_drop_db": one, "latency_ms": 3.0 - one}) for one in (0, 1)]
    front = select_front(items, ("psnr_drop_db", "latency_ms"), meters=meters)
    assert front.caption == "PSNR drop (dB) against latency (ms) at 192×256"
    assert front.label("macs") == "multiply-adds at 256×256"


def test_members_that_are_shown_lie_far_apart_and_images_are_those_on_which_they_differ() -> None:
    def measured(number: int, drop: float, cost: float) -> Measurement:
        psnr_db = (30.0 - drop, 30.0 - 3 * drop, 30.0, 30.0 - 2 * drop)
        return Measurement((number, *(0,) * 7), {"psnr_drop_db": drop, "macs": cost}, psnr_db)

    front = select_front([measured(0, 0, 10), measured(1, 0.1, 6), measured(2, 1, 5.9), measured(3, 4, 1)], TWO)
    assert [front.members[index].genotype[0] for index in spread_members(front)] == [1, 2, 3], "never the teacher"
    assert [front.members[index].genotype[0] for index in spread_members(front, count=2)] == [1, 3]
    assert telling_images(front, [1, 2]) == [1, 3, 0] and telling_images(front, [1, 2], count=1) == [1]


def test_a_large_archive_gives_a_page_under_two_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space = SearchSpace("large", tuple(Slot(f"group{number}.{block}", CHOICES) for number in range(4)
                                       for block in range(11)))
    names = ("psnr_drop_db", "macs", "params", "latency_ms")
    items = [Measurement(space.sample(rng), dict(zip(names, rng.uniform(0.1, 5, 4), strict=True)), (30.0, 31.0))
             for _ in range(4000)]
    archive = archive_of(tmp_path, items[:1], space=space)
    picture = rng.integers(0, 256, 96 * 96 * 3, np.uint8).tobytes()  # does not compress, like noise
    crops = {f"{number}.png": [(f"hybrid {column}", picture) for column in range(7)] for number in range(3)}
    front = select_front(items, names[:3])
    page = draw_report("large", front=front, archive=archive, crops=crops, command="ens export")
    assert len(page.encode()) < 2e6


def test_what_users_named_is_escaped(page: tuple[Front, Page, str]) -> None:
    _, parsed, text = page
    for raw in ("Front <of> tests", "awgn <b>v1</b>", "<photo>.png", "diverged </script>"):
        assert raw not in text and any(raw in piece for piece in parsed.texts), raw


def test_only_encoders_and_decoders_form_a_u_and_blocks_share_their_stage() -> None:
    def levels(*names: str) -> list[int]:
        return slot_levels(SearchSpace("s", tuple(Slot(name, CHOICES) for name in names)))

    assert levels("encoder1", "encoder2", "bottleneck", "decoder2", "decoder1") == [0, 1, 2, 1, 0]
    assert levels("group1", "group2", "group3") == [0, 0, 0]
    assert levels("encoder_level1.0", "encoder_level1.1", "latent.0", "latent.1", "decoder_level1.0",
                  "refinement.0") == [0, 0, 1, 1, 0, 0]


def test_cells_leave_options_out_unless_they_tell_choices_apart(tmp_path: Path) -> None:
    def shown(*choices: Choice) -> list[str]:
        space = SearchSpace("s", (Slot("a", (Choice("restormer", 2, teacher=True), *choices)),))
        folder = tmp_path / str(len(choices))
        written(folder, [Measurement((1,), {"psnr_drop_db": 0.0, "macs": 1.0}, (30.0, 31.0))], space=space)
        state = Page((folder / "report.html").read_text(encoding="utf-8")).scripts["state"]
        return [choice["short"] for choice in json.loads(state)["slots"][0]["choices"]]

    small, large = (Choice("vssd", 1, (("state", state),)) for state in (8, 16))
    assert shown(small) == ["restormer×2", "vssd×1"]
    assert shown(small, large) == ["restormer×2", "vssd×1(state=8)", "vssd×1(state=16)"]


def test_colours_tell_families_and_depths_apart() -> None:
    colours = choice_colours(SPACE)[0]
    assert colours[0] == TEACHER and len(set(colours)) == len(CHOICES)
    assert text_colour("#000000") == "#ffffff" and text_colour("#FFFFFF") != "#ffffff"
