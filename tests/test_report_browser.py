"""The report in a real browser: its scripts run, build what they should, and ask for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ens.pareto.archive import open_archive
from ens.pareto.baseline import Baseline
from ens.pareto.report import write_front
from ens.pareto.selection import Front, select_front
from ens.space import Choice, Measurement, SearchSpace, Slot, format_genotype

CHOICES = (Choice("restormer", 2, teacher=True), Choice("vssd", 1), Choice("conv", 1))
SLOTS = ("encoder_level1", "encoder_level2", "latent", "decoder_level2", "decoder_level1", "refinement")
SPACE = SearchSpace("browser", tuple(Slot(name, CHOICES) for name in SLOTS))

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")]


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Headless Chromium on a local page; the page's console goes to its standard error."""
    return subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
         "--log-level=0", "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking",
         f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=10000", *arguments, page.as_uri()],
        capture_output=True, encoding="utf-8", timeout=240, check=True)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, str, str]:
    """The front, the document after the page's scripts, and the browser's console."""
    rng = np.random.default_rng(0)
    genotypes = sorted({(0,) * len(SLOTS), *(SPACE.sample(rng) for _ in range(30))})
    measured = [Measurement(item, {"psnr_drop_db": 0.1 * sum(item), "macs": 2e9 / (1 + sum(map(bool, item)))},
                            (30.0 - 0.1 * sum(item),)) for item in genotypes]
    folder = tmp_path_factory.mktemp("browser")
    with open_archive(folder / "archive.db", space=SPACE, objectives=("psnr_drop_db", "macs"), baseline=Baseline(
            (30.0,), (20.0,), {"macs": 2e9}), manifest={"study": "In a browser"}) as archive:
        for item in measured:
            archive.record(item)
    front = select_front(measured, ("psnr_drop_db", "macs"), baseline=archive.baseline)
    write_front(folder, front=front, archive=archive, crops={})
    path = folder / "report.html"
    done = browse(path, "--dump-dom")
    return front, done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_no_script_fails_and_the_page_links_nowhere(opened: tuple[Front, str, str]) -> None:
    _, dom, console = opened
    assert "Uncaught" not in console and "rror" not in console, console
    assert not re.search(r"""<[^<>]*\s(?:src|href)=["']?(?:https?:)?//""", re.sub(r"<script.*?</script>", "", dom,
                                                                                flags=re.DOTALL))


def test_the_scripts_draw_every_measurement_the_knee_and_the_slot_map(opened: tuple[Front, str, str]) -> None:
    front, dom, _ = opened
    knee = format_genotype(front.members[front.knee].genotype)
    assert re.search(rf'id="chosen"[^>]*>{knee}<', dom)
    assert re.search(r'id="role"[^>]*>knee<', dom)
    chart = re.search(r'<div id="front".*?(?=<section)', dom, re.DOTALL)
    drawing = re.search(r'<svg id="u".*?</svg>', dom, re.DOTALL)
    assert chart and drawing
    assert chart[0].count('class="point"') >= len(front.members)
    assert drawing[0].count("<rect") == len(SLOTS) and [*re.findall(r"<title>(\w+): ", drawing[0])] == [*SLOTS]
    cells = re.findall(r'<td class="cell"[^>]*style="[^"]*background', dom)
    assert len(cells) == len(front.members) * len(SLOTS)
    assert len(re.findall(r'<tr[^>]*class="chosen"', dom)) == 1
