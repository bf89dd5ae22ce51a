"""Patches are held against headers: no pixel is decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ens.data.folders import DataError
from ens.data.images import ImageError, Photo, read_photo, write_photo
from ens.data.sizes import check_patches_fit, read_size


def write(path: Path, height: int, width: int) -> None:
    write_photo(path, Photo(np.zeros((height, width, 3), np.uint8)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_the_size_is_that_of_the_decoded_picture(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"a{suffix}", 17, 31)
    assert read_size(tmp_path / f"a{suffix}") == read_photo(tmp_path / f"a{suffix}").pixels.shape[:2] == (17, 31)


def test_images_smaller_than_a_patch_are_named(tmp_path: Path) -> None:
    write(tmp_path / "low.png", 40, 90)
    write(tmp_path / "high.png", 90, 64)
    check_patches_fit(tmp_path, 40)
    with pytest.raises(DataError, match=r"patches of 41 px do not fit into 1 images of .*: low is 90×40$"):
        check_patches_fit(tmp_path, 41)


def test_patches_of_a_task_that_enlarges_are_counted_in_input_pixels(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 64, 67)
    check_patches_fit(tmp_path, 32, scale=2)
    with pytest.raises(DataError, match=r"patches of 66 px do not fit"):
        check_patches_fit(tmp_path, 33, scale=2)


@pytest.mark.parametrize(("content", "words"), [(b"", "not an image"), (b"<html>", "not an image")])
def test_a_file_without_a_header_is_named_also_among_the_degraded(tmp_path: Path, content: bytes, words: str) -> None:
    write(tmp_path / "target" / "a.png", 16, 16)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=f"a.png: is {words}"):
        check_patches_fit(tmp_path, 8)
