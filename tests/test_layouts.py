"""Data-set folders as people have them: what is there is used and said, what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ens.data.images import Pixels, list_skipped, read_photo
from ens.data.layouts import DataError, match_folder
from ens.data.pairs import load_validation_set
from ens.data.tasks import create_task

RNG = np.random.default_rng(5)


def save(path: Path, *, side: int = 16) -> Pixels:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize(("high", "low"), [
    ("HR/0.png", "LR_bicubic/X4/0x4.png"), ("HR/0.png", "LR_bicubic/x4/0x4.png"), ("HR/0.png", "LR/X4/0.png"),
    ("hr/0.png", "lr/x4/0.png"), ("HR/0.png", "LRx4/0.png"), ("HR/0.png", "LRX4/0_X4.png"), ("HR/0.png", "LR_x4/0.png"),
    ("HR/0.png", "LR_bicubic_x4/0x4.png"), ("HR/0.png", "LR/0x4.png"), ("HR/0.png", "LR/0.png"),
    ("HR/max2.png", "LRx4/max2.png"), ("HR/max2.png", "LRx4/max2x4.png"), ("HR/0.png", "LR_bicubic/4/0.jpg"),
    ("DIV2K_valid_HR/0801.png", "DIV2K_valid_LR_bicubic/X4/0801x4.png"),
    ("GTmod12/0.png", "LRbicx4/0.png"), ("0.png", "LRx4/0.png"),
])
def test_low_resolution_of_the_user_is_taken_and_said(tmp_path: Path, high: str, low: str) -> None:
    save(tmp_path / high, side=64)
    Image.new("RGB", (16, 16)).save(tmp_path / "black.bmp")
    (tmp_path / low).parent.mkdir(parents=True)
    (tmp_path / "black.bmp").rename(tmp_path / low)
    images = load_validation_set(tmp_path, create_task("sr_x4"))
    assert not images.images[0].degraded.any() and images.fingerprint.paired
    assert images.origin == f"1 pairs of {tmp_path}: {high} with {low}"


@pytest.mark.parametrize(("low", "words"), [
    ("LR_bicubic/X2/0x2.png", "none of which fits scale 4"), ("LRx4/0x2.png", "none of which fits scale 4"),
    ("LR/0x3.png", "none of which fits scale 4"), ("LR/bicubic/X4/0.png", "no layout that is known"),
    ("small/0.png", "no layout that is known"), ("LR/deep/er/0x4.png", "no layout that is known"),
])
def test_low_resolution_that_does_not_fit_is_refused_and_never_replaced(tmp_path: Path, low: str, words: str) -> None:
    save(tmp_path / "HR/0.png", side=64)
    save(tmp_path / low)
    with pytest.raises(DataError, match=words) as caught:
        load_validation_set(tmp_path, create_task("sr_x4"))
    assert str(Path(low).parent) in str(caught.value) and "LR_bicubic/X4/" in str(caught.value)


def test_of_several_scales_and_kinds_the_right_one_is_taken_or_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "HR/0.png", side=48)
    for scale in (2, 3, 4):
        save(tmp_path / f"LR_bicubic/X{scale}/0x{scale}.png", side=48 // scale)
        save(tmp_path / f"LR_unknown/X{scale}/0x{scale}.png", side=48 // scale)
        (pair,) = match_folder(tmp_path, scale=scale)
        assert pair.degraded == tmp_path / f"LR_bicubic/X{scale}/0x{scale}.png"
    (tmp_path / "LR_bicubic").rename(tmp_path / "LR_wild")
    with pytest.raises(DataError, match=r"LR_unknown/X3, LR_wild/X3 fit scale 3"):
        match_folder(tmp_path, scale=3)


def test_low_resolution_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    save(tmp_path / "HR/0.png", side=64)
    save(tmp_path / "LR/0.png", side=32)
    with pytest.raises(DataError, match=r"0 is 64×64 clean and 32×32 degraded, scale 4"):
        load_validation_set(tmp_path, create_task("sr_x4"))


def test_where_low_resolution_is_made_here_it_is_said(tmp_path: Path) -> None:
    save(tmp_path / "HR/0.png", side=64)
    (tmp_path / "LR").mkdir()  # holds nothing
    images = load_validation_set(tmp_path, create_task("sr_x4"))
    assert images.origin == f"1 clean images of {tmp_path}; degraded here: low resolution by MATLAB-like bicubic"
    assert not images.fingerprint.paired
    noisy = load_validation_set("builtin:report-photos", create_task("denoise"), crop_px=64)
    assert noisy.origin == "1 clean images of builtin:report-photos; degraded here: white Gaussian noise"


@pytest.mark.parametrize(("degraded", "clean"), [("input", "target"), ("Blur", "SHARP")])
def test_pair_folders_are_found_in_any_case(tmp_path: Path, degraded: str, clean: str) -> None:
    save(tmp_path / degraded / "0.png")
    save(tmp_path / clean / "0.png")
    (pair,) = match_folder(tmp_path, scale=1)
    assert pair.degraded == tmp_path / degraded / "0.png" and pair.clean == tmp_path / clean / "0.png"


def test_a_folder_of_folders_without_a_known_layout_is_refused_with_those_that_are(tmp_path: Path) -> None:
    save(tmp_path / "rainy/0.png")
    with pytest.raises(DataError, match="input/ beside target/"):
        match_folder(tmp_path, scale=1)
    with pytest.raises(DataError, match="LR_bicubic/X2/"):
        match_folder(tmp_path, scale=2)


@pytest.mark.parametrize("twins", [("input/0.png", "input/0.jpg"), ("target/0.png", "target/0.jpg")])
def test_two_images_of_one_name_are_refused_with_their_names(tmp_path: Path, twins: tuple[str, str]) -> None:
    for name in {"input/0.png", "target/0.png", *twins}:
        save(tmp_path / name)
    with pytest.raises(DataError, match=r"0\.jpg and 0\.png in .*" + Path(twins[0]).parent.name):
        match_folder(tmp_path, scale=1)


def test_two_low_resolution_images_of_one_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "HR/0.png", side=64)
    save(tmp_path / "LRx4/0x4.png")
    save(tmp_path / "LRx4/0_x4.png")
    with pytest.raises(DataError, match=r"0_x4\.png and 0x4\.png"):
        match_folder(tmp_path, scale=4)


def test_what_a_folder_holds_beside_images_is_said(tmp_path: Path) -> None:
    save(tmp_path / "0.png", side=64)
    save(tmp_path / "more/1.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "odd\x1b[2J.txt").write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    skipped = ["a.heic (no image by its suffix)", "lost.png (a broken link)", "more (a folder)",
               r"odd\x1b[2J.txt (no image by its suffix)"]
    assert list_skipped(tmp_path) == skipped
    assert load_validation_set(tmp_path, create_task("denoise")).origin.endswith("skipped: " + "; ".join(skipped))


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jfif", ".JPG", ".webp", ".bmp"])
def test_a_folder_reads_what_a_single_file_reads(tmp_path: Path, suffix: str) -> None:
    form = {".jfif": "JPEG", ".JPG": "JPEG"}.get(suffix, suffix[1:].upper())
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"a{suffix}", form)
    assert read_photo(tmp_path / f"a{suffix}").pixels.shape == (64, 64, 3)
    assert [path.name for path in (pair.clean for pair in match_folder(tmp_path, scale=1))] == [f"a{suffix}"]


def test_further_frames_of_a_data_set_are_said(tmp_path: Path) -> None:
    frame = Image.new("RGB", (64, 64))
    frame.save(tmp_path / "a.tif", save_all=True, append_images=[frame, frame])
    assert "not used: a: frames 2 to 3" in load_validation_set(tmp_path, create_task("denoise")).origin


def test_a_crop_larger_than_an_image_is_refused_with_its_name(tmp_path: Path) -> None:
    save(tmp_path / "large.png", side=80)
    save(tmp_path / "small.png", side=68)
    task = create_task("denoise")
    # 70 is cut as 64, which would fit: what was asked for does not.
    with pytest.raises(DataError, match=r"crops of 70 px do not fit into 1 images: small is 68×68"):
        load_validation_set(tmp_path, task, crop_px=70)
    assert {image.clean.shape for image in load_validation_set(tmp_path, task, crop_px=68).images} == {(3, 64, 64)}
