"""Tasks and protocols: parameters, the patch-in-context rule, and published figures of degraded images."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ens.data.degradations import resize_bicubic
from ens.data.folders import DataError, load_pairs
from ens.data.images import FloatImage, Photo, list_images, read_photo, to_float, to_pixels, write_photo
from ens.data.pairs import Patches, load_validation_set
from ens.data.tasks import TASKS, Denoise, Derain, Task, create_task
from ens.evaluate.metrics import psnr_db, score
from ens.evaluate.protocols import PROTOCOLS, find_protocol, task_protocols

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
EVERY_TASK = ["denoise", "derain", "deblur", "sr_x2", "sr_x3", "sr_x4", "csr_x4_q10", "jpeg_q10"]


def photo(height: int = 150, width: int = 170) -> FloatImage:
    rng = np.random.default_rng(0)
    coarse = rng.random((height // 10 + 1, width // 10 + 1, 3)).astype(np.float32)
    return np.clip(resize_bicubic(coarse, height=height, width=width), 0, 1)


def test_protocol_table_is_the_stated_one() -> None:
    table = {p.name: (p.colour, p.border_px, p.quantised) for p in PROTOCOLS.values()}
    assert table == {
        "denoise-color-awgn": ("rgb", 0, True), "denoise-sidd": ("rgb", 0, False), "derain-y": ("y_rounded", 0, True),
        "deblur-rgb": ("rgb", 0, True), "sr-y": ("y", 0, True), "sr-rgb": ("rgb", 4, True), "csr-y": ("y", 4, True),
        "jpeg-y": ("gray", 0, True), "paired-rgb": ("rgb", 0, True), "paired-y": ("y", 0, True),
    }
    assert find_protocol("sr-y", scale=3).border_px == 3 and task_protocols(create_task("sr_x2"))[0].border_px == 2


def test_every_task_names_a_protocol_and_is_frozen() -> None:
    assert set(TASKS) == {"denoise", "derain", "deblur", "sr", "csr", "jpeg", "paired"}
    for name, kind in TASKS.items():
        assert kind.name == name and task_protocols(kind())[0].name in PROTOCOLS
    with pytest.raises(FrozenInstanceError):
        Denoise().sigma_255 = 1.0  # type: ignore[misc]


def test_tasks_are_made_from_text_and_from_options() -> None:
    assert create_task("denoise", {"sigma_255": 25}) == create_task("denoise_s25") == Denoise(sigma_255=25)
    assert create_task("denoise", {"sigma_255": [0, 50]}) == Denoise(sigma_255=(0.0, 50.0))
    assert create_task("derain", {"angle_deg": [-5, 5]}) == Derain(angle_deg=(-5.0, 5.0))
    assert create_task("csr_x4_q20") == create_task("csr", {"upscale": 4, "quality": 20})
    assert [create_task(f"sr_x{scale}").scale for scale in (2, 3, 4)] == [2, 3, 4]


@pytest.mark.parametrize(("name", "options", "said"), [
    ("dehaze", {}, "denoise, derain, deblur, sr, csr, jpeg, paired"),
    ("paired_x9", {}, "from 1 to 8, got 9"),
    ("sr", {"protocol": "sr-rgb"}, "no option 'protocol'"),
    ("sr_x5", {}, "2, 3 or 4, got 5"),
    ("sr_q10", {}, "not understood at 'q10'"),
    ("denoise", {"sigma": 25}, "nearest is 'sigma_255'"),
    ("denoise", {"sigma_255": -1}, "0 to 255, got -1"),
    ("denoise", {"sigma_255": [50, 0]}, "low first"),
    ("denoise", {"sigma_255": "25"}, "number or a range of two numbers, got '25'"),
    ("derain", {"density": 0.1}, "two numbers"),
    ("deblur", {"shake": [0, 1]}, "shake goes from 0 to 1"),
    ("sr", {"upscale": [2, 3]}, "2, 3 or 4"),
    ("jpeg", {"quality": 0}, "1 to 100, got 0"),
    ("csr", {"quality": [10, 40]}, "1 to 100"),
])
def test_bad_task_is_refused_with_what_is_allowed(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_task(name, options)


@pytest.mark.parametrize("name", EVERY_TASK)
def test_degradation_is_seeded_and_shaped(name: str) -> None:
    task = create_task(name)
    clean = task.prepare(photo())
    degraded = task.degrade(clean, np.random.default_rng(3))
    assert degraded.dtype == np.float32
    assert tuple(side * task.scale for side in degraded.shape[:2]) == clean.shape[:2] and degraded.shape[2] == 3
    np.testing.assert_array_equal(degraded, task.degrade(clean, np.random.default_rng(3)))
    np.testing.assert_array_equal(task.degrade_for_validation(clean), task.degrade_for_validation(clean))


@pytest.mark.parametrize("name", ["derain", "deblur"])
def test_validation_degradation_follows_the_pixels_of_the_image(name: str) -> None:
    """Half of the image changes: what is added to the other half changes, too, for the whole image is the seed."""
    task = create_task(name)
    clean = photo()
    changed = clean.copy()
    changed[:, : clean.shape[1] // 4] = 0.5
    first, second = task.degrade_for_validation(clean), task.degrade_for_validation(changed)
    assert not np.array_equal(first[:, -20:], second[:, -20:])
    np.testing.assert_array_equal(first, task.degrade_for_validation(clean.copy()))


def test_jpeg_gives_networks_of_one_and_of_three_channels_the_same_pixels(tmp_path: Path) -> None:
    colour = to_pixels(photo())
    write_photo(tmp_path / "photo.png", Photo(colour))
    one, three = (load_validation_set(tmp_path, create_task("jpeg_q10"), channels=channels).images[0]
                  for channels in (1, 3))
    for name in ("clean", "degraded"):
        gray, repeated = getattr(one, name), getattr(three, name)
        assert gray.shape[0] == 1 and all(torch.equal(gray[0], plane) for plane in repeated)
    luma = np.rint(16 + colour.astype(float) / 255 @ [65.481, 128.553, 24.966])
    np.testing.assert_array_equal(np.rint(255 * one.clean[0].numpy()), luma)


@pytest.mark.parametrize(("colour_columns", "crop_px", "crops"), [(0, None, 1), (8, None, 1), (8, 32, 4), (0, 32, 4)])
def test_jpeg_takes_gray_that_is_stored_as_colour_alike_for_both(tmp_path: Path, colour_columns: int,
                                                                 crop_px: int | None, crops: int) -> None:
    """A gray photo saved as RGB, and gray crops of a colour photo: what is luma is decided by the whole file, once."""
    rng = np.random.default_rng(0)
    stored = np.repeat(rng.integers(0, 256, (64, 64, 1), dtype=np.uint8), 3, axis=2)
    stored[:, :colour_columns] = rng.integers(0, 256, (64, colour_columns, 3), dtype=np.uint8)
    write_photo(tmp_path / "photo.png", Photo(stored))
    one, three = (load_validation_set(tmp_path, create_task("jpeg_q10"), channels=channels, crop_px=crop_px,
                                      crops_per_image=crops).images for channels in (1, 3))
    assert len(one) == len(three) == crops
    for gray, repeated in zip(one, three, strict=True):
        assert all(torch.equal(gray.clean[0], plane) for plane in repeated.clean)
        assert all(torch.equal(gray.degraded[0], plane) for plane in repeated.degraded)
    if colour_columns == 0 and crop_px is None:
        np.testing.assert_array_equal(np.rint(255 * one[0].clean[0].numpy()), stored[..., 0])


def test_blind_noise_draws_sigma_and_validates_at_a_stated_one() -> None:
    task = Denoise(sigma_255=(0.0, 50.0))
    flat = np.full((64, 64, 3), 0.5, np.float32)
    sigmas = [255 * (task.degrade(flat, np.random.default_rng(seed)) - flat).std() for seed in range(30)]
    assert min(sigmas) < 10 and max(sigmas) > 40 and max(sigmas) < 51
    for asked, expected in ((None, 25), (50.0, 50)):
        noisy = replace(task, validation_sigma_255=asked).degrade_for_validation(flat)
        assert 255 * (noisy - flat).std() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["sr_x3", "sr_x4", "csr_x4_q10", "jpeg_q10"])
def test_patch_degraded_in_its_context_equals_the_whole(name: str) -> None:
    task = create_task(name)
    clean = task.prepare(photo(300, 340))
    rng, grid, patch_px = np.random.default_rng(0), task.grid_px, 24
    start = (1 + task.margin_px // grid) * grid + 3 * task.scale
    low = (start - task.margin_px) // grid * grid
    high = -(-(start + patch_px * task.scale + task.margin_px) // grid) * grid
    assert 0 < low < start
    window, whole = task.degrade(clean[low:high], rng), task.degrade(clean, rng)
    inner, outer = (start - low) // task.scale, start // task.scale
    np.testing.assert_array_equal(window[inner:inner + patch_px], whole[outer:outer + patch_px])


def test_jpeg_reduces_colour_to_rounded_luma_and_leaves_gray_alone() -> None:
    task: Task = create_task("jpeg_q40")
    black_white = np.repeat(np.array([0, 1], np.float32), 8)[:, None, None] * np.ones((1, 8, 3), np.float32)
    np.testing.assert_array_equal(task.prepare(black_white), black_white)
    coloured = black_white.copy()
    coloured[0, 0] = (1, 0, 0)
    luma = task.prepare(coloured) * 255
    assert luma[0, 0].round().tolist() == [81, 81, 81] and luma[1, 1, 0].round() == 16 and luma[15, 7, 0].round() == 235


def load(folder: str, task: Task) -> list[FloatImage]:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    return [task.prepare(to_float(read_photo(path).pixels)) for path in list_images(SHARED / folder)]


def as_tensor(image: FloatImage) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def test_noisy_cbsd68_has_the_published_psnr() -> None:
    task = create_task("denoise_s25")
    images = load("cbsd68", task)
    noisy = [task.degrade_for_validation(clean) for clean in images]
    figures = [[psnr_db(stored(bad), 255.0 * clean.astype(float)) for bad, clean in zip(noisy, images, strict=True)]
               for stored in (lambda image: 255.0 * image.astype(float), lambda image: to_pixels(image).astype(float))]
    assert len(images) == 68 and np.mean(figures[0]) == pytest.approx(20.18, abs=0.005)
    # Clipping to 8 bits already removes error: an input scored like an output gains 0.36 dB.
    assert np.mean(figures[1]) == pytest.approx(20.54, abs=0.005)


@pytest.mark.parametrize(("scale", "psnr_db", "ssim"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_bicubic_set5_has_the_published_figures(scale: int, psnr_db: float, ssim: float) -> None:
    task = create_task(f"sr_x{scale}")
    scores = []
    for clean in load("set5", task):
        low = task.degrade_for_validation(clean)
        enlarged = resize_bicubic(low, height=clean.shape[0], width=clean.shape[1])
        scores.append(score(as_tensor(enlarged), as_tensor(clean), task_protocols(task)[0]))
    assert np.mean([s.psnr_db for s in scores]) == pytest.approx(psnr_db, abs=0.03)
    assert np.mean([s.ssim for s in scores]) == pytest.approx(ssim, abs=0.001)


def save_pair(folder: Path, *, scale: int, name: str = "a.png") -> None:
    rng = np.random.default_rng(1)
    for side, place in ((24, "input"), (24 * scale, "target")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_photo(folder / place / name, Photo(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_pairs_are_taken_as_they_are_at_any_scale_and_scored_as_the_study_says(tmp_path: Path, scale: int) -> None:
    save_pair(tmp_path, scale=scale)
    task = create_task("paired", {"upscale": scale, "protocol": "sr-y"})
    (image,) = load_validation_set(tmp_path, task).images
    given, wanted = (to_float(read_photo(tmp_path / place / "a.png").pixels).transpose(2, 0, 1)
                     for place in ("input", "target"))
    assert np.array_equal(image.degraded.numpy(), given) and np.array_equal(image.clean.numpy(), wanted)
    assert [protocol.name for protocol in task_protocols(task)] == ["sr-y"]
    degraded, clean = Patches(load_pairs(tmp_path, scale=scale), task).batch(0, 2, 8)
    assert degraded.shape == (2, 3, 8, 8) and clean.shape == (2, 3, 8 * scale, 8 * scale)


def test_pairs_are_never_made_here(tmp_path: Path) -> None:
    task = create_task("paired")
    with pytest.raises(DataError, match=r"builtin:photos holds clean images alone; .* input/ beside target/"):
        load_validation_set("builtin:photos", task)
    with pytest.raises(ValueError, match="paired degrades nothing"):
        task.degrade_for_validation(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="no protocol 'best'; there are denoise-color-awgn"):
        task_protocols(create_task("paired", {"protocol": "best"}))
    save_pair(tmp_path, scale=2)
    with pytest.raises(DataError, match="scale 1"):
        load_validation_set(tmp_path, task)
