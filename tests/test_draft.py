"""What `ens init` writes is a study: whole, explained, and of sizes that images and network allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from torch import nn

from ens.config import StudyConfig, build_study, load_study, parse_choices
from ens.data.images import Photo, write_photo
from ens.draft import CHOICES, comment_study, draft_study
from ens.networks.steps import create_filling
from ens.networks.wrap import FramedNetwork, frame_network


def save_photos(folder: Path, *, height: int, width: int, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        write_photo(folder / f"{index}.png", Photo(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))


def network(size_multiple: int = 1) -> FramedNetwork:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1))
    return frame_network(module, slots=["1"], size_multiple=size_multiple)


def every_key(section: type[BaseModel] = StudyConfig) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield key
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from every_key(type(default))


def test_the_file_is_the_study_and_says_what_every_key_means(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", height=70, width=90)
    draft = draft_study(network(), task={"name": "denoise_s25"}, scale=1, data=str(tmp_path / "photos"), validation="",
                        report="", bounds={"latency_ms": 100.0}, folder=tmp_path)
    values = {"name": "mine", "network": {"name": "my:build", "slots": ["1"]}, **draft.values}
    text = comment_study(values, draft.notes, ["Made here"])
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_study(tmp_path / "mine.yaml") == build_study(values, folder=tmp_path)
    lines = text.splitlines()
    keys = [(index, line.strip().partition(":")[0]) for index, line in enumerate(lines)
            if line.strip() and not line.strip().startswith("#")]
    assert [key for _, key in keys] == list(every_key())
    assert all(lines[index - 1].strip().startswith("#") for index, _ in keys), "a sentence above each"
    study = load_study(tmp_path / "mine.yaml")
    assert study.data.train == str(tmp_path / "photos") and yaml.safe_load(text)["data"]["train"] == "photos"
    assert study.search.objectives == ("psnr_drop_db", "latency_ms") and study.search.max == {"latency_ms": 100.0}


@pytest.mark.parametrize(("size_multiple", "height", "patch", "crop"), [
    (1, 300, 64, 128), (1, 50, 48, 48), (16, 100, 64, 96), (24, 100, 48, 96), (2, 33, 32, 32)])
def test_patches_and_crops_fit_into_images_and_network(tmp_path: Path, size_multiple: int, height: int, patch: int,
                                                       crop: int) -> None:
    save_photos(tmp_path, height=height, width=310, count=2)
    draft = draft_study(network(size_multiple), task={"name": "denoise"}, scale=1, data=str(tmp_path), validation="",
                        report="", bounds={}, folder=tmp_path)
    assert draft.values["distill"]["patch_px"] == patch and draft.values["data"]["crop_px"] == crop
    assert draft.values["search"]["objectives"] == ["psnr_drop_db", "macs"]


def test_a_network_that_is_slow_gets_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photos(tmp_path, height=64, width=64)
    make: Callable[[], dict[str, dict[str, int]]] = lambda: draft_study(  # noqa: E731
        network(), task={}, scale=1, data=str(tmp_path), validation="", report="", bounds={}, folder=tmp_path).values
    assert make()["distill"]["batch_size"] == 8
    monkeypatch.setattr("ens.draft._time_pass", lambda network, side_px: 1.5)
    assert make()["distill"]["batch_size"] == 2
    monkeypatch.setattr("ens.draft._time_pass", lambda network, side_px: 60.0)
    assert make()["distill"]["batch_size"] == 1


def test_every_choice_offered_can_be_made() -> None:
    for choice in parse_choices(CHOICES):
        assert create_filling(network().slot("1"), choice)(torch.rand(1, 4, 9, 7)).shape == (1, 4, 9, 7)
