"""Pixels and metadata -> the bytes of an image file, in bands: no copy of the whole image is made for PNG and TIFF.

Shapes: pixels (H, W, 1 or 3) uint8 or uint16, RGB; alpha (H, W) of the same type or None. Metadata are bytes, b"" where
there are none: `icc_profile`, `exif` (a TIFF structure), `xmp` (a packet).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import accumulate
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin, TiffTags

from ens.data.photo import Pixels

_BAND_SAMPLES = 2**20
_ZLIB_LEVEL = 3
_IFDS = (0x8769, 0x8825)  # EXIF and GPS, directories of their own
_JPEG_QUALITY = 95


def write_png(file: IO[bytes], pixels: Pixels, alpha: Pixels | None, *, icc_profile: bytes, exif: bytes,
              xmp: bytes) -> None:
    """PNG of 8 or 16 bits, gray or RGB, with or without alpha (PNG specification, third edition)."""
    height, width, colours = pixels.shape
    colour_type = (2 if colours == 3 else 0) + (4 if alpha is not None else 0)
    file.write(b"\x89PNG\r\n\x1a\n")
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour_type, 0, 0, 0))
    if icc_profile:
        _write_chunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile))
    if exif:
        _write_chunk(file, b"eXIf", exif)
    if xmp:
        _write_chunk(file, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    packer = zlib.compressobj(_ZLIB_LEVEL)
    for band in _bands(pixels, alpha):
        rows = np.ascontiguousarray(band.astype(band.dtype.newbyteorder(">"))).view(np.uint8).reshape(len(band), -1)
        filtered = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
        step = band.shape[2] * band.itemsize
        filtered[:, 0] = 1  # filter type "Sub": the difference to the pixel on the left
        filtered[:, 1:step + 1] = rows[:, :step]
        np.subtract(rows[:, step:], rows[:, :-step], out=filtered[:, step + 1:])
        _write_chunk(file, b"IDAT", packer.compress(filtered.data))
    _write_chunk(file, b"IDAT", packer.flush())
    _write_chunk(file, b"IEND", b"")


def _write_chunk(file: IO[bytes], name: bytes, data: bytes) -> None:
    if data or name == b"IEND":
        file.write(struct.pack(">I", len(data)) + name)
        file.write(data)
        file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))


def write_tiff(file: IO[bytes], pixels: Pixels, alpha: Pixels | None, *, icc_profile: bytes, exif: bytes,
               xmp: bytes) -> None:
    """TIFF of 8 or 16 bits, deflate with horizontal differencing. 16-bit gray with alpha is written as RGBA.

    Raises struct.error beyond 4 GB, which the format cannot address.
    """
    if alpha is not None and pixels.dtype == np.uint16:
        # libtiff's readers drop the alpha of 16-bit gray.
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    height, width, colours = pixels.shape
    samples = colours + (alpha is not None)
    strips = []
    for band in _bands(pixels, alpha):
        band[:, 1:] -= band[:, :-1].copy()
        strips.append(zlib.compress(band.astype(band.dtype.newbyteorder("<")).tobytes(), _ZLIB_LEVEL))
    sizes = tuple(map(len, strips))
    parsed = Image.Exif()
    parsed.load(exif)
    tags: dict[int, Any] = {tag: parsed.get_ifd(tag) if tag in _IFDS else parsed[tag] for tag in parsed}
    tags |= {256: width, 257: height, 258: (8 * pixels.itemsize,) * samples, 259: 8, 262: 2 if colours == 3 else 1,
             277: samples, 278: _band_rows(width, samples), 279: sizes, 284: 1, 317: 2,
             # From the end of the directory: Pillow adds where that is.
             273: tuple(accumulate(sizes[:-1], initial=0)),
             **({338: 2} if alpha is not None else {}), **({700: xmp} if xmp else {}),
             **({34675: icc_profile} if icc_profile else {})}
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    directory.tagtype.update({273: TiffTags.LONG, 279: TiffTags.LONG})
    for tag, value in tags.items():
        directory[tag] = value
    directory.save(file)
    file.writelines(strips)


def write_other(file: IO[bytes], pixels: Pixels, alpha: Pixels | None, *, form: str, icc_profile: bytes, exif: bytes,
                xmp: bytes) -> None:
    """JPEG (quality 95), BMP or lossless WebP, 8 bits, by Pillow; `form` is Pillow's name of the format."""
    if alpha is not None:
        pixels = np.dstack([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), alpha])
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    exif = b"Exif\0\0" + exif if exif else b""
    if form == "BMP":
        image.save(file, form)
    elif form == "JPEG":
        image.save(file, form, quality=_JPEG_QUALITY, icc_profile=icc_profile or None, exif=exif, xmp=xmp)
    else:
        image.save(file, form, lossless=True, exact=True, icc_profile=icc_profile, exif=exif, xmp=xmp)


def _band_rows(width: int, samples: int) -> int:
    return max(1, _BAND_SAMPLES // (width * samples))


def _bands(pixels: Pixels, alpha: Pixels | None) -> Iterator[Pixels]:
    """Copies of some rows after the others, (rows, W, C), alpha last."""
    samples = pixels.shape[2] + (alpha is not None)
    rows = _band_rows(pixels.shape[1], samples)
    for top in range(0, len(pixels), rows):
        part = pixels[top:top + rows]
        yield np.array(part) if alpha is None else np.dstack([part, alpha[top:top + rows]])
