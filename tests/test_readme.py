"""The README's examples run as they stand: `python` and `sh` blocks, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ens.data.folders import find_pairs
from ens.data.pairs import degrade_photo
from ens.data.tasks import create_task

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    """Where `ens` is the command of this interpreter and the package is this checkout's."""
    path = [str(Path(sys.executable).parent), *filter(None, [os.environ.get("PATH")])]
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT)}


def test_python_example_prints_a_hybrid_near_its_teacher(tmp_path: Path) -> None:
    code = blocks("python")[0]
    (tmp_path / "example.py").write_text(code, encoding="utf-8")  # a file: an argument is in the locale's encoding
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment(), capture_output=True,
                          encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    teacher, hybrid = (float(number) for number in re.findall(r"([\d.]+) dB", done.stdout))
    assert 28 < hybrid < teacher + 0.1


@pytest.mark.slow
def test_the_whole_road_in_python_exports_a_file_and_is_skipped_when_it_is_done(tmp_path: Path) -> None:
    code = blocks("python")[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "example.py").write_text(code + "print(len(front.measured))", encoding="utf-8")
    for _ in range(2):
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment(), capture_output=True,
                              encoding="utf-8", errors="replace")
        assert done.returncode == 0, done.stderr
        *_, said, count = done.stdout.strip().splitlines()
        assert count == "8" and "multiply-adds at 256×256" in said
        assert len([*tmp_path.glob("runs/python/export/*.onnx")]) == 1
    assert "skipped, 8 genotypes are measured" in done.stderr


@pytest.mark.slow
def test_shell_examples_run_and_write_what_they_say(tmp_path: Path) -> None:
    (script,) = blocks("sh")
    degrade_photo(find_pairs("builtin:photos")[0].clean, tmp_path / "photo.png", create_task("denoise_s25"))
    (tmp_path / "example.sh").write_text(script, encoding="utf-8")
    done = subprocess.run(["bash", "-euxo", "pipefail", "example.sh"], cwd=tmp_path, env=environment(),
                          capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "restored.png").stat().st_size > 0
    assert "<html" in (tmp_path / "runs" / "quick" / "report.html").read_text(encoding="utf-8")[:1000]


def test_set_up_commands_exist() -> None:
    (script,) = blocks("bash")
    for command in re.findall(r"^(\S+)", script, re.MULTILINE):
        assert os.access(ROOT / command, os.X_OK), command


def test_tree_names_what_is_there() -> None:
    tree = re.search(r"^```\nens/\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert tree is not None
    for line in tree[1].splitlines():
        name = line.split()[0]
        assert (ROOT / ("ens" if line.startswith(" ") else ".") / name).exists(), name
