"""Image files: depth, channels, alpha and orientation survive; every kind of bad file is named."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ens.data import images
from ens.data.images import (
    ImageError,
    Photo,
    Pixels,
    fingerprint_images,
    list_images,
    read_photo,
    to_float,
    to_pixels,
    write_photo,
)


def pixels(channels: int, dtype: type[np.uint8] | type[np.uint16] = np.uint8,
           size: tuple[int, int] = (13, 17)) -> Pixels:
    rng = np.random.default_rng(channels)
    return rng.integers(0, np.iinfo(dtype).max, (*size, channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_return_the_same_pixels(tmp_path: Path, suffix: str, channels: int) -> None:
    photo = Photo(pixels(channels))
    write_photo(tmp_path / f"a{suffix}", photo)
    back = read_photo(tmp_path / f"a{suffix}")
    if suffix == ".webp":  # knows no gray
        np.testing.assert_array_equal(back.pixels, np.broadcast_to(photo.pixels, (13, 17, 3)))
    else:
        np.testing.assert_array_equal(back.pixels, photo.pixels)
    assert back.alpha is None


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, suffix: str, channels: int, alpha: bool) -> None:
    photo = Photo(pixels(channels, np.uint16), pixels(1, np.uint16)[..., 0] if alpha else None)
    write_photo(tmp_path / f"a{suffix}", photo)
    back = read_photo(tmp_path / f"a{suffix}")
    assert back.pixels.dtype == np.uint16
    np.testing.assert_array_equal(back.pixels, np.broadcast_to(photo.pixels, back.pixels.shape))
    if alpha:
        np.testing.assert_array_equal(back.alpha, photo.alpha)
    else:
        assert back.alpha is None and back.pixels.shape == photo.pixels.shape


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_carried_over(tmp_path: Path, suffix: str) -> None:
    photo = Photo(pixels(3), np.full((13, 17), 128, np.uint8))
    write_photo(tmp_path / f"a{suffix}", photo)
    back = read_photo(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(back.pixels, photo.pixels)
    np.testing.assert_array_equal(back.alpha, photo.alpha)


def test_gray_png_with_alpha_stays_gray(tmp_path: Path) -> None:
    photo = Photo(pixels(1), pixels(2)[..., 1])
    write_photo(tmp_path / "a.png", photo)
    back = read_photo(tmp_path / "a.png")
    np.testing.assert_array_equal(back.pixels, photo.pixels)
    np.testing.assert_array_equal(back.alpha, photo.alpha)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "LA", "PA"])
def test_other_modes_are_read_as_gray_or_rgb(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(pixels(3), "RGB")
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        source.convert("P").save(path, "TIFF")
    else:
        source.convert(mode).save(path)
    photo = read_photo(path)
    assert photo.pixels.shape == (13, 17, 1 if mode in ("1", "LA") else 3)
    assert (photo.alpha is not None) == (mode == "LA")


def test_red_is_the_first_channel_in_every_format(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 250
    for suffix in images.SUFFIXES:
        write_photo(tmp_path / f"a{suffix}", Photo(red))
        assert np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB"))[8, 8, 0] > 240
        assert read_photo(tmp_path / f"a{suffix}").pixels[8, 8].tolist()[0] > 240


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels(3))
    stored.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    np.testing.assert_array_equal(read_photo(tmp_path / "a.png").pixels, upright)

    deep = pixels(3).astype(np.uint16) * 257
    write_photo(tmp_path / "deep.png", Photo(deep))
    (tmp_path / "deep.png").write_bytes(with_exif_chunk((tmp_path / "deep.png").read_bytes(), orientation))
    np.testing.assert_array_equal(read_photo(tmp_path / "deep.png").pixels, upright.astype(np.uint16) * 257)


def with_exif_chunk(png: bytes, orientation: int) -> bytes:
    body = b"eXIfMM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + b"\0\0\0\0\0\0"
    after_header = 33
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:after_header] + chunk + png[after_header:]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "deep.png", "deep.tif"])
def test_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_photo(path, Photo(pixels(3, np.uint16 if "deep" in name else np.uint8, (64, 64))))
    data = path.read_bytes()
    for part in (0.3, 0.9):
        path.write_bytes(data[:int(part * len(data))])
        with pytest.raises(ImageError, match=rf"{name}: is (corrupt|not an image)"):
            read_photo(path)


def test_random_bytes_inside_a_file_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.tif", "deep.png", "deep.tif"):
        write_photo(tmp_path / name, Photo(pixels(3, np.uint16 if "deep" in name else np.uint8, (32, 32))))
        data = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(25):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=20)] = rng.integers(256, size=20)
            (tmp_path / name).write_bytes(damaged.tobytes())
            try:
                assert read_photo(tmp_path / name).pixels.ndim == 3
            except ImageError as error:
                assert name in str(error) and error.reason


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "empty"), (b"<!DOCTYPE html><html>", "not an image"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.png: .*{reason}"):
        read_photo(tmp_path / "x.png")


def test_missing_file_folder_and_float_pixels_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png: cannot be read"):
        read_photo(tmp_path / "no.png")
    with pytest.raises(ImageError, match="cannot be read"):
        read_photo(tmp_path)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match="32 bits"):
        read_photo(tmp_path / "f.tif")


def test_formats_that_cannot_hold_the_picture_are_refused(tmp_path: Path) -> None:
    deep, clear = Photo(pixels(3, np.uint16)), Photo(pixels(3), pixels(1)[..., 0])
    for name, photo, reason in (("a.jpg", deep, "16"), ("a.jpg", clear, "alpha"), ("a.gif", clear, "write .gif")):
        with pytest.raises(ImageError, match=reason):
            write_photo(tmp_path / name, photo)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photo(tmp_path / "a.png", Photo(pixels(3)))
    before = (tmp_path / "a.png").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_photo(tmp_path / "a.png", Photo(pixels(1)))
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_float_conversion_round_trips_and_rounds_to_nearest() -> None:
    for dtype in (np.uint8, np.uint16):
        every: Pixels = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(-1, 1, 1)
        np.testing.assert_array_equal(to_pixels(to_float(every), dtype), every)
    assert to_pixels(np.array([-1, 0.4 / 255, 0.6 / 255, 2], np.float32)).tolist() == [0, 0, 1, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_pixels(np.array([np.nan], np.float32))


def test_listing_is_sorted_and_skips_what_is_no_image(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"any")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG"]
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        list_images(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        list_images(tmp_path / "empty")


def test_fingerprint_knows_pixels_not_order() -> None:
    first, second = pixels(3), pixels(3, size=(17, 13))
    print_a = fingerprint_images([first, second, first], [first, second, first])
    assert print_a == fingerprint_images([second, first, first], [second, first, first]) and print_a.count == 3
    assert print_a.sizes == (("17×13", 2), ("13×17", 1)) and "3 images, 2×(17×13), 13×17" in str(print_a)
    changed = first.copy()
    changed[0, 0, 0] ^= 1
    assert fingerprint_images([first, second, first], [changed, second, first]).sha256 != print_a.sha256
    assert "3 pairs" in str(fingerprint_images([first, second, first], [first, second, first], paired=True))
    turned = first.swapaxes(0, 1)
    assert fingerprint_images([turned], [turned]).sha256 != fingerprint_images([first], [first]).sha256
