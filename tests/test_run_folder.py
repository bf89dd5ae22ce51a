"""What a study names is checked before any work is done for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ens import pipeline
from ens.config import load_study

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("change", "message"), [
    ({"search": {"engine": "nsga3"}}, "engine 'nsga3' does not exist; choose from ehvi"),
    ({"search": {"objectives": ["psnr", "macs"]}}, "objective 'psnr' does not exist; choose from psnr_drop_db"),
    ({"search": {"objectives": ["macs"]}}, "two or three different objectives, got macs"),
    ({"task": {"name": "denoize"}}, "no task 'denoize'; there are denoise"),
    ({"task": {"sigma": 25}}, "the nearest is 'sigma_255'"),
    ({"choices": ["mambaire×1"]}, "no block family 'mambaire'; allowed: restormer"),
    ({"choices": ["mambair×1(stat=3)"]}, "no option 'stat'; allowed: state"),
    ({"choices": [], "slots": {"latnet": ["vssd×1"]}}, "no slot 'latnet'; the network has encoder_level1"),
    ({"teacher": "", "network": {"name": "restromer"}}, "'restromer' is unknown; allowed: restormer"),
    ({"teacher": "nowhere.pth"}, "nowhere.pth: does not exist"),
    ({"data": {"validation": "nowhere"}}, "nowhere is not a folder"),
    ({"teacher": "", "network": {"name": "plksr"}}, "the network enlarges 4 times, the task 1 times"),
    ({"device": "gpu"}, "device is auto, cpu, cuda or cuda:1, got 'gpu'"),
    ({"device": "meta"}, "device is auto, cpu, cuda or cuda:1, got 'meta'"),
])
def test_a_mistake_is_found_before_anything_is_made(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError, KeyError), match=message):
        pipeline.search(load_study(ROOT / "search_spaces" / "demo.yaml", change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_validation_image_is_found_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    study = load_study(ROOT / "search_spaces" / "demo.yaml", {"data": {"validation": str(tmp_path / "photos")}})
    with pytest.raises(ValueError, match=r"torn\.png"):
        pipeline.search(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_auto_takes_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said: list[str] = []
    pipeline.train(load_study(ROOT / "search_spaces" / "demo.yaml"), tmp_path / "run",
                   pipeline.Control(say=said.append))
    assert said == ["device: auto takes the CPU, torch sees no GPU"]
