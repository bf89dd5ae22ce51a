"""Writing image files: metadata survive, orientation is applied once, bands leave no seam."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from ens.data import encoding
from ens.data.images import ImageError, Metadata, Photo, Pixels, check_writable, name_output, read_photo, write_photo

RNG = np.random.default_rng(3)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="6" dc:title="x"/></x:xmpmeta>'


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x8827] = 400  # ISO
    exif.get_ifd(0x8825)[1] = "N"
    return exif


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_source(path: Path, pixels: Pixels) -> None:
    """A file of another writer, with everything that is to be kept; it lies on its side (orientation 6)."""
    if pixels.dtype == np.uint16:
        png = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
        path.write_bytes(png[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(PROFILE))
                         + chunk(b"eXIf", make_exif(6).tobytes()[6:])
                         + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + png[33:])
    elif path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        Image.fromarray(pixels).save(path, exif=make_exif(6), icc_profile=PROFILE, pnginfo=info)
    else:
        Image.fromarray(pixels).save(path, exif=make_exif(6), icc_profile=PROFILE, xmp=XMP, quality=95)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("target", ["b.png", "b.jpg", "b.tif", "b.webp"])
@pytest.mark.parametrize("source", ["a.png", "a.jpg", "a.webp"])
def test_profile_exif_and_xmp_survive_and_orientation_is_applied_once(
        tmp_path: Path, source: str, target: str, dtype: type[np.uint8] | type[np.uint16]) -> None:
    if dtype == np.uint16 and (source != "a.png" or target[1:] not in (".png", ".tif")):
        pytest.skip("holds 8 bits")
    pixels = RNG.integers(0, np.iinfo(dtype).max, (10, 14, 3), dtype, endpoint=True)
    write_source(tmp_path / source, pixels)
    photo = read_photo(tmp_path / source)
    assert photo.pixels.shape == (14, 10, 3)
    if source == "a.png":
        np.testing.assert_array_equal(photo.pixels, np.rot90(pixels, -1))
    assert write_photo(tmp_path / target, photo) == ()

    with Image.open(tmp_path / target) as image:
        exif, info = image.getexif(), image.info
        assert image.size == (10, 14) and info["icc_profile"] == PROFILE
        assert exif[0x010F] == "Maker" and exif.get(0x0112, 1) == 1
        assert exif.get_ifd(0x8769)[0x8827] == 400 and exif.get_ifd(0x8825)[1] == "N"
        packet = info.get("xmp") or info["XML:com.adobe.xmp"].encode()
        assert b"dc:title" in packet and b"Orientation" not in packet
    again = read_photo(tmp_path / target)
    assert again.pixels.shape == (14, 10, 3)
    # A TIFF has a byte order of its own.
    assert replace(again.metadata, exif=b"") == replace(photo.metadata, exif=b"")


def test_a_tiff_carries_its_metadata_over_without_its_layout(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RNG.integers(0, 65536, (9, 7, 3), np.uint16), photometric="rgb",
                     iccprofile=PROFILE, metadata=None, rowsperstrip=2, description="a view",
                     extratags=[(700, 1, len(XMP), XMP, True), (0x0112, 3, 1, 8, True)])
    photo = read_photo(tmp_path / "a.tif")
    assert photo.pixels.shape == (7, 9, 3) and photo.metadata.icc_profile == PROFILE
    for target in ("b.png", "b.tif"):
        write_photo(tmp_path / target, photo)
        with Image.open(tmp_path / target) as image:
            assert image.getexif()[270] == "a view" and image.info["icc_profile"] == PROFILE
        assert read_photo(tmp_path / target).metadata == photo.metadata
        np.testing.assert_array_equal(read_photo(tmp_path / target).pixels, photo.pixels)


def test_what_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    photo = Photo(np.zeros((8, 8, 3), np.uint8), metadata=Metadata(PROFILE, make_exif(1).tobytes()[6:], XMP))
    assert write_photo(tmp_path / "a.bmp", photo) == ("the colour profile (.bmp)", "EXIF (.bmp)", "XMP (.bmp)")
    long = Photo(photo.pixels, metadata=Metadata(PROFILE + bytes(200_000), b"", XMP + b" " * 70_000))
    assert write_photo(tmp_path / "a.jpg", long) == ("XMP (.jpg)",)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.info["icc_profile"] == long.metadata.icc_profile


@pytest.mark.parametrize("name", ["a.webp", "a.jpg"])
def test_an_image_too_large_for_its_format_is_an_image_error_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    photo = Photo(np.zeros((2, 66_000, 3), np.uint8))
    with pytest.raises(ImageError, match=rf"{name}: .*at most \d+ pixels a side, the picture has 66000×2"):
        write_photo(tmp_path / name, photo)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImageError, match="the picture has 16800×40"):
        check_writable(tmp_path / "a.webp", Photo(np.zeros((10, 4200, 3), np.uint8)), upscale=4)
    check_writable(tmp_path / "a.webp", Photo(np.zeros((10, 4200, 3), np.uint8)))


def test_any_fault_of_an_encoder_is_an_image_error_and_a_full_disk_is_not(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    photo = Photo(np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ImageError, match=r"taken\.png: cannot be written"):
        write_photo(tmp_path / "taken.png", photo)

    faults: list[Exception] = []

    def fail(*arguments: object, **options: object) -> None:
        raise faults[-1]
    monkeypatch.setattr(Image.Image, "save", fail)
    for fault in (ValueError("odd"), OSError("encoder error -2"), SystemError("odd")):
        faults.append(fault)
        with pytest.raises(ImageError, match=r"a\.jpg: cannot be written"):
            write_photo(tmp_path / "a.jpg", photo)
    faults.append(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        write_photo(tmp_path / "a.jpg", photo)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_bands_join_without_a_seam_in_other_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str,
                                                    channels: int, dtype: type[np.uint8] | type[np.uint16]) -> None:
    monkeypatch.setattr(encoding, "_BAND_SAMPLES", 100)
    samples = RNG.integers(0, np.iinfo(dtype).max, (23, 17, channels), dtype, endpoint=True)
    colours, alpha = samples[..., :channels - 1 if channels % 2 == 0 else channels], samples[..., -1]
    write_photo(tmp_path / f"a{suffix}", Photo(colours, alpha if channels % 2 == 0 else None))
    if dtype == np.uint8:
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.mode == ("L", "LA", "RGB", "RGBA")[channels - 1]
            found = np.asarray(image).reshape(samples.shape)
    else:
        found = np.atleast_3d(cv2.imread(str(tmp_path / f"a{suffix}"), cv2.IMREAD_UNCHANGED))
        if channels == 2:  # OpenCV knows no gray with alpha
            found = found[..., [0, 3]]
        elif channels > 2:
            found = found[..., [2, 1, 0, 3][:channels]]
    np.testing.assert_array_equal(found, samples)
    if suffix == ".png":
        assert (tmp_path / "a.png").read_bytes()[24:26] == bytes([8 * samples.itemsize, (0, 4, 2, 6)[channels - 1]])


def test_outputs_of_a_folder_have_names_of_their_own() -> None:
    assert [name_output(name) for name in ("a/x.JPG", "x.jfif", "x.gif", "x.avif", "x.png")] == [
        "x.JPG", "x.jfif", "x.gif.png", "x.avif.png", "x.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "deep.png", "deep.tif"])
def test_reading_and_writing_hold_at_most_three_times_the_decoded_pixels(tmp_path: Path, name: str) -> None:
    ramp = np.broadcast_to(np.arange(5000, dtype=np.uint16)[None, :, None] * 13, (3000, 5000, 3))
    noise = RNG.integers(0, 16, (3000, 5000, 1), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_photo(tmp_path / name, Photo(ramp + noise if "deep" in name else (ramp >> 8).astype(np.uint8) + noise.astype(
        np.uint8), metadata=Metadata(exif=exif.tobytes()[6:])))
    code = """if True:
        import sys
        from pathlib import Path
        from ens.data.images import read_photo, write_photo
        def kilobytes(key):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key))
        before = kilobytes("VmRSS")
        photo = read_photo(sys.argv[1])
        assert photo.pixels.shape == (5000, 3000, 3)
        write_photo(sys.argv[2], photo)
        print(1024 * (kilobytes("VmHWM") - before) / photo.pixels.nbytes)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name, tmp_path / f"b{name}"], capture_output=True,
                          text=True, encoding="utf-8", check=True, timeout=120)
    assert float(done.stdout) < 3
