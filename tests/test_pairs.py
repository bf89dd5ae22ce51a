"""Training patches and validation sets: rebuilt from (seed, index), aligned, and bad data named before use."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageCms

from ens.data.folders import BUILTIN_PHOTOS, DataError, Pair, find_pairs, load_pairs
from ens.data.images import Metadata, Photo, Pixels, read_photo, to_pixels, write_photo
from ens.data.pairs import Patches, degrade_photo, load_validation_set
from ens.data.tasks import Denoise, Derain, create_task

EVERY_TASK = ["denoise", "derain", "deblur", "sr_x2", "sr_x4", "csr_x4_q10", "jpeg_q10"]


def pixels(height: int = 96, width: int = 112, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 160, width: int = 192) -> Pixels:
    rows, columns = np.mgrid[:height, :width]
    waves = [0.5 + 0.4 * np.sin(rows / 9 + k) * np.cos(columns / (11 + k)) for k in range(3)]
    return to_pixels(np.stack(waves, axis=2).astype(np.float32))


def synthetic(count: int = 3) -> list[Pair]:
    return [Pair(f"image{index}", pixels(seed=index)) for index in range(count)]


def write(folder: Path, name: str, image: Pixels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_photo(folder / name, Photo(image))


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_batch_is_rebuilt_from_seed_and_index_alone(name: str) -> None:
    task = create_task(name)
    first, again = Patches(synthetic(), task, seed=1), Patches(synthetic(), task, seed=1)
    first.batch(0, 2, 16)
    degraded, clean = first.batch(7, 4, 16)
    assert degraded.shape == (4, 3, 16, 16) and clean.shape == (4, 3, 16 * task.scale, 16 * task.scale)
    assert degraded.dtype == clean.dtype == torch.float32 and degraded.is_contiguous() and clean.is_contiguous()
    for mine, other in zip((degraded, clean), again.batch(7, 4, 16), strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(clean, first.batch(8, 4, 16)[1])
    assert not torch.equal(clean, Patches(synthetic(), task, seed=2).batch(7, 4, 16)[1])


def test_processes_sharing_a_batch_see_its_parts() -> None:
    patches = Patches(synthetic(), Denoise(), seed=3)
    whole = patches.batch(5, 6, 16)
    parts = [patches.batch(5, 3, 16, first=first) for first in (0, 3)]
    for position in (0, 1):
        assert torch.equal(whole[position], torch.cat([part[position] for part in parts]))


def test_all_eight_symmetries_and_all_images_occur_and_noise_is_fresh() -> None:
    one = pixels(16, 16)
    degraded, clean = Patches([Pair("square", one)], Denoise(sigma_255=10), seed=0).batch(0, 80, 16)
    assert len({patch.numpy().tobytes() for patch in clean}) == 8
    views = {np.rot90(base, turns).tobytes() for base in (one, one[::-1]) for turns in range(4)}
    assert {to_pixels(patch.permute(1, 2, 0).numpy()).tobytes() for patch in clean} == views
    noise = (degraded - clean) * 255
    assert noise.std().item() == pytest.approx(10, rel=0.03) and len({p.numpy().tobytes() for p in noise}) == 80


def test_positions_reach_every_corner() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 40, 3))
    _, clean = Patches([Pair("ramp", ramp)], Denoise(), seed=0).batch(0, 400, 32)
    values = (clean * 255).round()
    assert values.min() == 0 and values.max() == 39


@pytest.mark.parametrize("scale", [1, 2])
def test_folder_pairs_stay_aligned(tmp_path: Path, scale: int) -> None:
    names = ("input", "target") if scale == 1 else ("LR_bicubic/X2", "HR")
    for index in range(2):
        low = pixels(48, 40, seed=index)
        write(tmp_path / names[0], f"p{index}{'x2' if scale == 2 else ''}.png", 255 - low)
        write(tmp_path / names[1], f"p{index}.png", low.repeat(scale, 0).repeat(scale, 1))
    task = create_task("derain" if scale == 1 else "sr_x2")
    degraded, clean = Patches(load_pairs(tmp_path, scale=scale), task, seed=0).batch(0, 30, 12)
    torch.testing.assert_close(degraded, 1 - clean[..., ::scale, ::scale])
    validation = load_validation_set(tmp_path, task, crop_px=32)
    for image in validation.images:
        torch.testing.assert_close(image.degraded, 1 - image.clean[..., ::scale, ::scale])


@pytest.mark.parametrize("name", ["sr_x2", "sr_x4"])
def test_synthetic_patches_equal_patches_of_the_whole_degraded_image(name: str) -> None:
    task = create_task(name)
    image = smooth()
    low = load_whole(image, name)
    degraded, _ = Patches([Pair("a", image)], task, seed=0).batch(0, 20, 12)
    views = [np.rot90(base, turns) for base in (low, low[::-1]) for turns in range(4)]
    windows = {np.ascontiguousarray(view[y:y + 12, x:x + 12]).tobytes() for view in views
               for y in range(view.shape[0] - 11) for x in range(view.shape[1] - 11)}
    # Summation order may differ by one level in the turned image; almost all patches are the same to the bit.
    found = [to_pixels(patch.permute(1, 2, 0).numpy()).tobytes() in windows for patch in degraded]
    assert np.mean(found) > 0.8


def load_whole(image: Pixels, name: str) -> Pixels:
    task = create_task(name)
    return to_pixels(task.degrade_for_validation(task.prepare(image.astype(np.float32) / np.float32(255))))


def test_augmentation_does_not_turn_the_rain() -> None:
    flat = np.full((128, 128, 3), 60, np.uint8)
    vertical = Derain(angle_deg=(0.0, 0.0), length_px=(30.0, 40.0))
    degraded, clean = Patches([Pair("flat", flat)], vertical, seed=0).batch(0, 16, 96)
    rain = (degraded - clean)[:, 0]
    down, right = rain.diff(dim=1).abs().mean(dim=(1, 2)), rain.diff(dim=2).abs().mean(dim=(1, 2))
    assert (right > 2 * down).all()


def test_too_large_a_patch_names_the_small_images() -> None:
    patches = Patches([Pair("small", pixels(20, 50)), Pair("big", pixels(90, 90))], create_task("sr_x2"))
    assert patches.max_patch_px == 10
    with pytest.raises(DataError, match=r"24 px do not fit into 1 images: small is 50×20"):
        patches.batch(0, 1, 12)
    with pytest.raises(DataError, match="no images"):
        Patches([], Denoise())


def test_mismatched_names_list_the_first_ten(tmp_path: Path) -> None:
    for index in range(14):
        write(tmp_path / "target", f"t{index:02}.png", pixels(16, 16))
    write(tmp_path / "input", "t00.png", pixels(16, 16))
    write(tmp_path / "input", "extra.png", pixels(16, 16))
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    message = str(caught.value)
    assert "14 clean images" in message and "2 degraded" in message and "and 4 more" in message
    assert "t01.png has no degraded partner" in message and "t10.png" in message and "t11.png" not in message


def test_mismatched_sizes_and_corrupt_files_are_all_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / "target", name, pixels(16, 24))
        write(tmp_path / "input", name, pixels(16, 16) if name == "b.png" else pixels(16, 24))
    (tmp_path / "input" / "c.png").write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path)
    message = str(caught.value)
    assert "2 of 3 images" in message and "c.png: is not" in message
    assert "b is 24×16 clean and 16×16 degraded" in message


def test_flat_folder_depth_channels_and_limit(tmp_path: Path) -> None:
    write(tmp_path, "gray.png", pixels()[..., :1])
    write(tmp_path, "rgb16.png", pixels().astype(np.uint16) * 257)
    pairs = load_pairs(tmp_path)
    assert [pair.clean.shape[2] for pair in pairs] == [3, 3] and pairs[1].clean.dtype == np.uint16
    assert Patches(pairs, Denoise()).batch(0, 2, 16)[0].shape == (2, 3, 16, 16)
    assert [pair.clean.shape[2] for pair in load_pairs(tmp_path, channels=1)] == [1, 1]
    assert len(load_pairs(tmp_path, limit=1)) == 1
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        load_pairs(tmp_path, channels=4)


def test_clean_hr_folder_without_low_resolution_is_degraded_by_the_task(tmp_path: Path) -> None:
    write(tmp_path / "HR", "a.png", smooth(50, 70))
    (image,) = load_validation_set(tmp_path, create_task("sr_x4")).images
    assert image.clean.shape == (3, 48, 68) and image.degraded.shape == (3, 12, 17)


def test_validation_set_is_the_same_every_time_and_fingerprinted(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path, f"{index}.png", pixels(seed=index))
    for name in ("denoise", "derain", "jpeg_q10"):
        first, again = (load_validation_set(tmp_path, create_task(name), crop_px=64) for _ in range(2))
        assert first.fingerprint == again.fingerprint and first.fingerprint.count == 3
        for mine, other in zip(first.images, again.images, strict=True):
            assert mine.name == other.name and torch.equal(mine.degraded, other.degraded)
            assert mine.clean.shape == (3, 64, 64) and mine.clean.is_contiguous() and mine.degraded.is_contiguous()
    assert load_validation_set(tmp_path, Denoise()).fingerprint != first.fingerprint


def test_builtin_photos_are_colour_photos_in_crops_of_even_size() -> None:
    validation = load_validation_set(BUILTIN_PHOTOS, Denoise(), crop_px=128)
    assert [image.name for image in validation.images] == ["astronaut", "chelsea", "coffee", "motorcycle_left",
                                                           "rocket"]
    for image in validation.images:
        assert image.clean.shape == image.degraded.shape == (3, 128, 128) and image.clean.std() > 0.05
        assert not torch.equal(image.clean[0], image.clean[1])


def test_missing_folder_and_tiny_crop_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="crop_px is at least 32, got 16"):
        load_validation_set(BUILTIN_PHOTOS, create_task("sr_x4"), crop_px=16)


def test_purposes_and_seeds_never_share_patches() -> None:
    drawn = [Patches(synthetic(), Denoise(), seed=seed, purpose=purpose).batch(0, 4, 16)
             for seed in (0, 1) for purpose in ("", "train", "distill", "finetune")]
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one[1], other[1])
        assert not torch.equal(one[0] - one[1], other[0] - other[1])


def write_ramp(folder: Path, scale: int, *, height: int = 200, width: int = 240) -> None:
    """An image whose red and green are row and column, with its low-resolution twin where the task enlarges."""
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8)
    write(folder / "HR" if scale > 1 else folder, "ramp.png", ramp)
    if scale > 1:
        write(folder / "LR_bicubic" / f"X{scale}", f"rampx{scale}.png", ramp[::scale, ::scale])


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (5, 4), (9, 9), (50, 9)])
def test_crops_lie_apart_inside_the_image_and_beside_their_twins(tmp_path: Path, scale: int, asked: int,
                                                                 given: int) -> None:
    write_ramp(tmp_path, scale)
    images = load_validation_set(tmp_path, create_task(f"sr_x{scale}") if scale > 1 else Denoise(sigma_255=0),
                                 crop_px=64, crops_per_image=asked).images
    assert [image.name for image in images] == (["ramp"] if asked == 1 else [f"ramp#{i + 1}" for i in range(given)])
    taken = np.zeros((200, 240), int)
    for image in images:
        top, left = (round(float(plane[0, 0]) * 255) for plane in image.clean[:2])
        assert image.clean.shape == (3, 64, 64) and image.degraded.shape == (3, 64 // scale, 64 // scale)
        taken[top:top + 64, left:left + 64] += 1
        torch.testing.assert_close(image.degraded, image.clean[:, ::scale, ::scale], rtol=0, atol=1e-6)
    assert taken.max() == 1 and taken.sum() == given * 64 * 64
    if asked == 1:
        assert (taken[68:132, 88:152] == 1).all()
    if asked in (5, 9):  # spread: every quarter of the image has its crop
        assert all(part.any() for half in np.array_split(taken, 2) for part in np.array_split(half, 2, axis=1))


@pytest.mark.parametrize("asked", range(1, 13))
def test_crops_lean_to_no_side_of_the_image(tmp_path: Path, asked: int) -> None:
    write_ramp(tmp_path, 1)
    images = load_validation_set(tmp_path, Denoise(sigma_255=0), crop_px=48, crops_per_image=asked).images
    assert 0.7 * asked <= len(images) <= asked
    centres = np.mean([255 * image.clean[:2].mean(dim=(1, 2)).numpy() for image in images], axis=0)
    np.testing.assert_allclose(centres, (99.5, 119.5), atol=1)


def test_crops_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "small.png", pixels(60, 200))
    write(tmp_path, "large.png", pixels(200, 200))
    with pytest.raises(DataError, match="crops of 64 px do not fit into 1 images: small is 200×60"):
        load_validation_set(tmp_path, Denoise(), crop_px=64)
    with pytest.raises(ValueError, match="crops_per_image is at least 1, got 0"):
        load_validation_set(tmp_path, Denoise(), crop_px=32, crops_per_image=0)
    with pytest.raises(ValueError, match="crops_per_image is 4, but there is no crop_px"):
        load_validation_set(tmp_path, Denoise(), crops_per_image=4)


def test_builtin_sets_are_colour_and_share_no_scene() -> None:
    sets = [{path.clean.name for path in find_pairs(f"builtin:{name}-photos")}
            for name in ("train", "validation", "report")]
    for one, other in itertools.combinations(sets, 2):
        assert not {file.partition("_")[0] for file in one} & {file.partition("_")[0] for file in other}
    for name in ("train", "validation", "report"):
        for pair in load_pairs(f"builtin:{name}-photos"):
            assert np.ptp(pair.clean.astype(int), axis=2).mean() > 3
    chosen = load_validation_set("builtin:validation-photos", Denoise(), crop_px=128, crops_per_image=8).images
    assert len(chosen) >= 16 and {image.clean.shape for image in chosen} == {(3, 128, 128)}
    assert load_validation_set("builtin:report-photos", Denoise(), crop_px=128, crops_per_image=8).images


@pytest.mark.parametrize("name", ["denoise", "derain", "deblur", "jpeg_q10"])
def test_renaming_files_changes_nothing_and_changing_a_pixel_does(tmp_path: Path, name: str) -> None:
    task, shots = create_task(name), [pixels(seed=seed) for seed in range(3)]
    for folder, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        for position, index in enumerate(order):
            write(tmp_path / folder, f"{position}.png", shots[index])
    first, renamed = (load_validation_set(tmp_path / folder, task) for folder in ("a", "b"))
    assert first.fingerprint == renamed.fingerprint and str(first.fingerprint).startswith("3 images")
    assert ("seeded by content" in str(first.fingerprint)) == (name in ("derain", "deblur"))
    assert ("seed 0 for each" in str(first.fingerprint)) == (name == "denoise")
    assert torch.equal(first.images[0].degraded, renamed.images[1].degraded)
    shots[1][5, 5] ^= 64
    write(tmp_path / "b", "2.png", shots[1])
    assert load_validation_set(tmp_path / "b", task).fingerprint != first.fingerprint


def test_the_fingerprint_covers_degraded_pixels_and_counts_pairs(tmp_path: Path) -> None:
    for index in range(8):
        write(tmp_path / "paired" / "input", f"{index}.png", pixels(24, 32, seed=50 + index))
        write(tmp_path / "paired" / "target", f"{index}.png", pixels(24, 32, seed=index))
        write(tmp_path / "clean", f"{index}.png", pixels(24, 32, seed=index))
    before = load_validation_set(tmp_path / "paired", Derain()).fingerprint
    assert str(before).startswith("8 pairs, 8×(32×24), sha256") and len(str(before)) < 80 and "\n" not in str(before)
    write(tmp_path / "paired" / "input", "3.png", pixels(24, 32, seed=99))
    assert load_validation_set(tmp_path / "paired", Derain()).fingerprint.sha256 != before.sha256
    clean = [load_validation_set(tmp_path / "clean", create_task(name)).fingerprint
             for name in ("denoise_s25", "denoise_s50", "derain", "jpeg_q10")]
    assert str(clean[0]).startswith("8 images") and len({one.sha256 for one in clean}) == 4


def test_a_degraded_photo_keeps_the_metadata_of_the_clean_one(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_photo(tmp_path / "clean.png", Photo(pixels(40, 40), metadata=Metadata(icc_profile=profile)))
    degrade_photo(tmp_path / "clean.png", tmp_path / "noisy.png", create_task("denoise"))
    assert read_photo(tmp_path / "noisy.png").metadata.icc_profile == profile
