"""Reading image files: what is rare is kept, said or refused; nothing is misread in silence."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from ens.data.images import ImageError, Pixels, read_photo, show_name

RNG = np.random.default_rng(7)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png16(path: Path, samples: Pixels, *, colour_type: int, extra: bytes = b"") -> None:
    """A PNG written by hand from its specification: 16 bits, no filter."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def deep(*shape: int) -> Pixels:
    return RNG.integers(0, 65536, shape, np.uint16)


def test_sixteen_bit_gray_with_alpha_stays_gray(tmp_path: Path) -> None:
    samples = deep(11, 13, 2)
    write_png16(tmp_path / "la.png", samples, colour_type=4)
    photo = read_photo(tmp_path / "la.png")
    np.testing.assert_array_equal(photo.pixels, samples[..., :1])
    np.testing.assert_array_equal(photo.alpha, samples[..., 1])


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_a_transparent_colour_of_sixteen_bits_becomes_alpha(tmp_path: Path, colour_type: int, channels: int) -> None:
    samples = deep(11, 13, channels)
    samples[2:5, 3:7] = 1234
    # One byte of a sample is not enough to be transparent.
    samples[9, 9] = 1235
    write_png16(tmp_path / "t.png", samples, colour_type=colour_type,
                extra=chunk(b"tRNS", struct.pack(f">{channels}H", *[1234] * channels)))
    photo = read_photo(tmp_path / "t.png")
    expected = np.full((11, 13), 65535, np.uint16)
    expected[2:5, 3:7] = 0
    np.testing.assert_array_equal(photo.pixels, samples)
    np.testing.assert_array_equal(photo.alpha, expected)


@pytest.mark.parametrize("name", ["a.tif", "a.webp", "a.png", "a.gif"])
@pytest.mark.parametrize("count", [2, 5])
def test_further_frames_are_named(tmp_path: Path, name: str, count: int) -> None:
    frames = [Image.fromarray(RNG.integers(0, 256, (12, 10, 3), np.uint8)) for _ in range(count)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert read_photo(tmp_path / name).metadata.lost == (f"frames 2 to {count}" if count > 2 else "frame 2",)
    frames[0].save(tmp_path / f"one{name}")
    assert read_photo(tmp_path / f"one{name}").metadata.lost == ()


@pytest.mark.parametrize(("samples", "photometric", "words"), [
    (np.zeros((8, 9, 3), np.float32), "rgb", "3 float samples of 32 bits"),
    (np.zeros((8, 9, 3), np.uint32), "rgb", "3 unsigned samples of 32 bits"),
    (np.zeros((8, 9, 2), np.uint16), "minisblack", "2 unsigned samples of 16 bits"),
    (np.zeros((8, 9), np.int16), "minisblack", "layout that is not read"),
    (np.zeros((8, 9, 4), np.uint16), "separated", "no gray or interleaved RGB"),
    (np.zeros((8, 9), np.float32), "minisblack", "32 bits"),
])
def test_tiff_of_a_layout_that_is_not_read_is_named_as_such(tmp_path: Path, samples: Pixels, photometric: str,
                                                            words: str) -> None:
    extra = {"planarconfig": "contig", "extrasamples": ["unassalpha"]} if samples.shape[2:] == (2,) else {}
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric=photometric, metadata=None, **extra)
    with pytest.raises(ImageError, match=rf"a\.tif: .*{words}"):
        read_photo(tmp_path / "a.tif")


def test_sixteen_bit_tiff_in_planes_or_inverted_is_not_misread(tmp_path: Path) -> None:
    samples = deep(3, 9, 12)
    tifffile.imwrite(tmp_path / "planes.tif", samples, photometric="rgb", planarconfig="separate", metadata=None)
    with pytest.raises(ImageError, match="interleaved RGB"):
        read_photo(tmp_path / "planes.tif")
    tifffile.imwrite(tmp_path / "white.tif", samples[0], photometric="miniswhite", metadata=None)
    np.testing.assert_array_equal(read_photo(tmp_path / "white.tif").pixels[..., 0], 65535 - samples[0])


def test_premultiplied_colours_of_sixteen_bits_are_divided_by_alpha(tmp_path: Path) -> None:
    straight, alpha = deep(9, 7, 3), RNG.integers(1000, 65536, (9, 7, 1), np.uint16)
    stored = np.rint(straight.astype(np.float64) * alpha / 65535).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([stored, alpha]), photometric="rgb", extrasamples=["assocalpha"],
                     metadata=None)
    photo = read_photo(tmp_path / "a.tif")
    assert np.abs(photo.pixels.astype(int) - straight).max() <= 65535 / 1000
    np.testing.assert_array_equal(photo.alpha, alpha[..., 0])


@pytest.mark.parametrize(("gamma", "lost"), [(45455, ()), (100_000, ("the gamma of 1",))])
def test_a_gamma_that_changes_how_a_png_looks_is_said_to_be_lost(tmp_path: Path, gamma: int,
                                                                 lost: tuple[str, ...]) -> None:
    write_png16(tmp_path / "a.png", deep(5, 5, 3), colour_type=2, extra=chunk(b"gAMA", struct.pack(">I", gamma)))
    assert read_photo(tmp_path / "a.png").metadata.lost == lost


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_tiff_of_either_byte_order_is_read(tmp_path: Path, order: str, channels: int) -> None:
    samples = deep(9, 7, channels)
    tifffile.imwrite(tmp_path / "a.tif", samples.squeeze(), photometric="rgb" if channels == 3 else "minisblack",
                     byteorder=order, compression="zlib", predictor=True, metadata=None)
    np.testing.assert_array_equal(read_photo(tmp_path / "a.tif").pixels, samples)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_of_eight_bits_becomes_alpha(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (6, 5), (10, 10, 10))
    image.paste((200, 200, 200), (0, 0, 3, 5))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    photo = read_photo(tmp_path / "a.png")
    assert photo.pixels.shape[2] == (1 if mode == "L" else 3) and photo.alpha is not None
    assert (photo.alpha[:, :3] == 0).all() and (photo.alpha[:, 3:] == 255).all()


def test_avif_of_more_than_eight_bits_says_what_is_lost(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (9, 99, 199)).save(tmp_path / "a.avif")
    assert read_photo(tmp_path / "a.avif").metadata.lost == ()
    data = cv2.imencode(".avif", np.full((16, 16, 3), 700, np.uint16), [cv2.IMWRITE_AVIF_DEPTH, 10])[1]
    (tmp_path / "deep.avif").write_bytes(data.tobytes())
    assert read_photo(tmp_path / "deep.avif").metadata.lost == ("the bits beyond 8",)


def test_text_of_megabytes_in_a_sound_png_is_no_fault(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 600_000, zip=True)
    pixels = RNG.integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "big.png", pnginfo=info)
    np.testing.assert_array_equal(read_photo(tmp_path / "big.png").pixels, pixels)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_chunk_that_claims_gigabytes_costs_no_memory(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    png = bytearray(data.getvalue())
    place = png.index(b"IDAT")
    png[place - 4:place] = b"\xff\xff\xff\x00"
    (tmp_path / "a.png").write_bytes(png)
    code = f"""if True:
        import resource
        from ens.data.images import ImageError, read_photo
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        try:
            read_photo({str(tmp_path / "a.png")!r})
        except ImageError:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8",
                          timeout=60, check=True)
    assert done.stdout in ("", "refused\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, words in ((tmp_path / "pipe.png", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        code = f"from ens.data.images import read_photo; read_photo({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8",
                              timeout=60, check=False)
        assert f"cannot be read (is {words}" in done.stderr


def test_a_profile_that_does_not_fit_the_pixels_is_dropped_and_named(tmp_path: Path) -> None:
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("L", (8, 8), 99).save(tmp_path / "gray.jpg", icc_profile=rgb)
    metadata = read_photo(tmp_path / "gray.jpg").metadata
    assert metadata.icc_profile == b"" and metadata.lost == ("the colour profile, which is for RGB",)
    Image.new("CMYK", (8, 8)).save(tmp_path / "ink.jpg", icc_profile=rgb[:16] + b"CMYK" + rgb[20:])
    assert read_photo(tmp_path / "ink.jpg").metadata.lost == ("the colour profile, which is for CMYK",)


def test_damaged_exif_does_not_keep_pixels_from_being_read(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    damaged = data.getvalue()[:33] + chunk(b"eXIf", b"MM\0*\0\0\xff\xff") + data.getvalue()[33:]
    (tmp_path / "a.png").write_bytes(damaged)
    assert read_photo(tmp_path / "a.png").pixels.shape == (8, 8, 3)


def test_formats_that_start_programs_or_have_no_signature_are_not_opened(tmp_path: Path) -> None:
    for kind in ("EPS", "TGA", "PPM"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", kind)
        with pytest.raises(ImageError, match="not an image of a kind that is read"):
            read_photo(tmp_path / "a.png")


def test_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb\u202egnp.png"
    with pytest.raises(ImageError) as caught:
        read_photo(path)
    assert r"a\x1b[31m\nb\u202egnp.png" in str(caught.value) and "\x1b" not in str(caught.value)
    assert show_name("größe 猫 [red].png") == "größe 猫 [red].png"
    assert show_name(os.fsdecode(b"\xff.png")) == r"\udcff.png"
