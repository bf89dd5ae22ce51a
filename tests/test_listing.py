"""What there is, listed: cheaply for the shipped studies, and as JSON."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ens.config import shipped_spaces
from ens.listing import SUMMARY, spaces

ROOT = Path(__file__).resolve().parents[1]
SUMMARISED = json.loads((ROOT / "search_spaces" / SUMMARY).read_text(encoding="utf-8"))


def test_listing_the_shipped_studies_takes_less_than_two_seconds_of_processor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from ens.cli import app\ntry: app(['spaces'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, encoding="utf-8",
                          errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.split()[-1] == "False" and all(path.stem in done.stdout for path in shipped_spaces())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_the_summary_is_that_of_the_shipped_studies(capsys: pytest.CaptureFixture[str]) -> None:
    spaces(None, as_json=True)
    assert json.loads(capsys.readouterr().out) == SUMMARISED, "write it anew, as CONTRIBUTING.md says"
    assert [one["space"] for one in SUMMARISED] == [path.stem for path in shipped_spaces()]


@pytest.mark.parametrize("name", [
    "demo", *(pytest.param(path.stem, marks=pytest.mark.slow) for path in shipped_spaces() if path.stem != "demo")])
def test_the_summary_holds_what_is_counted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of a study elsewhere is no shipped one, so it is counted."""
    study = tmp_path / f"{name}.yaml"
    study.write_bytes((ROOT / "search_spaces" / f"{name}.yaml").read_bytes())
    spaces([str(study)], as_json=True)
    assert json.loads(capsys.readouterr().out)[0] == next(one for one in SUMMARISED if one["space"] == name)
