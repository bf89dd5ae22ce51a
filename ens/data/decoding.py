"""An image file -> Photo. No more than three times the decoded pixels is ever held."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from ens.data.photo import ImageError, Metadata, Photo, Pixels

# Pillow also knows formats that start other programs (EPS) or have no signature.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "AVIF")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_BAND_PIXELS = 2**20
_ORIENTATION = 0x0112
# TIFF tags that say how pixels lie in the file, or hold what is carried over elsewhere.
_LAYOUT_TAGS = (254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 318, 319, 320, 322, 323, 324, 325,
                330, 338, 339, 347, 529, 530, 531, 532, 700, 34675, _ORIENTATION)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _TIFF_EXTRA_SAMPLES, _TIFF_SAMPLE_FORMAT = 258, 262, 284, 338, 339
_HEADER_BYTES = 4096
_SRGB_GAMMA = 0.45455  # of a PNG; most of those that name one name this
FAULTS = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, AssertionError,
           AttributeError, RuntimeError, SystemError, struct.error, zlib.error, cv2.error)
# A sound PNG may hold megabytes of text, as image generators write; Pillow's bound on all text together stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# What is wrong with a file is raised; OpenCV would print it as well.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_photo(path: str | Path) -> Photo:
    """Read an image file upright (orientation applied), at its own bit depth, gray as one channel; the first frame.

    Never more than three times the decoded pixels are held. Raises ImageError for a file that is missing, no regular
    file, empty, truncated, corrupt or not an image.
    """
    path = Path(path)
    try:
        _check_regular(path)
        with _BoundedReader(io.FileIO(path)) as file:
            return _decode(path, file)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(path, _explain_unknown(path)) from None
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"is too large ({error})") from None
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno:
            raise ImageError(path, f"cannot be read ({error.strerror})") from None
        raise ImageError(path, f"is corrupt or truncated ({error})") from None


class _BoundedReader(io.BufferedReader):
    """Allocates no more than the file holds, however long a damaged chunk claims to be."""

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, or all that is left."""
        return super().read(min(size, os.fstat(self.fileno()).st_size) if size else size)


def _check_regular(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ImageError(path, f"cannot be read (is {kind}, not a file)")
    with path.open("rb") as file:
        start = file.read(24)
    if not start:
        raise ImageError(path, "the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ImageError(path, "is a git-lfs pointer, not the image itself; fetch it with `git lfs pull`")


def _explain_unknown(path: Path) -> str:
    """Why Pillow does not know a file: TIFF has layouts that nobody else writes either."""
    with path.open("rb") as file, suppress(*FAULTS), warnings.catch_warnings(action="ignore"):
        directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
        bits = directory.get(_TIFF_BITS, (1,))
        kind = {2: "signed", 3: "float"}.get(directory.get(_TIFF_SAMPLE_FORMAT, (1,))[0], "unsigned")
        return f"is a TIFF of {len(bits)} {kind} samples of {bits[0]} bits; gray and RGB of 8 and 16 bits are read"
    return f"is not an image of a kind that is read ({', '.join(_FORMATS)}), or is damaged beyond recognition"


def _decode(path: Path, file: IO[bytes]) -> Photo:
    header = file.read(_HEADER_BYTES)
    # Ignored: damaged metadata of pixels that can be read; photos above 89 megapixels.
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=_FORMATS) as image:
        lost = (*_name_other_frames(image), *_name_lost_bits(header))
        # Pillow notices truncated files, which OpenCV decodes half gray without a word; OpenCV keeps 16 bits.
        image.load()
        if image.format == "PNG":
            deep, gray = header[24] == 16, header[25] in (0, 4)
        else:
            deep, gray = _is_deep_tiff(image), image.mode in _GRAY_MODES
        metadata, orientation = _read_metadata(image, gray=gray)
        pixels, alpha = (_decode_sixteen_bit if deep else _copy_eight_bit)(path, image, gray=gray)
        image.close()  # frees Pillow's own pixels
    if orientation in _ORIENT:
        pixels = np.ascontiguousarray(_ORIENT[orientation](pixels))
        alpha = None if alpha is None else np.ascontiguousarray(_ORIENT[orientation](alpha))
    return Photo(pixels, alpha, replace(metadata, lost=(*lost, *metadata.lost)))


def _is_deep_tiff(image: Image.Image) -> bool:
    bits = image.tag_v2.get(_TIFF_BITS, (8,)) if isinstance(image, TiffImagePlugin.TiffImageFile) else ()
    return 16 in (bits if isinstance(bits, tuple) else (bits,))


def _name_other_frames(image: Image.Image) -> tuple[str, ...]:
    try:
        count = getattr(image, "n_frames", 1)
    except FAULTS:
        return ("further frames, which are damaged",)
    return (f"frames 2 to {count}" if count > 2 else "frame 2",) if count > 1 else ()


def _name_lost_bits(header: bytes) -> tuple[str, ...]:
    """AVIF of 10 and 12 bits comes as 8: the flag `high_bitdepth` of its configuration (AV1 in ISOBMFF, 2.3.3)."""
    place = header.find(b"av1C")
    return ("the bits beyond 8",) if 0 <= place < len(header) - 6 and header[place + 6] & 0x40 else ()


def _copy_eight_bit(path: Path, image: Image.Image, *, gray: bool) -> tuple[Pixels, Pixels | None]:
    """Pillow's pixels in bands, because a conversion of the whole would be two copies more."""
    if image.mode not in _MODES:
        depth = "32 bits a pixel" if image.mode in ("I", "F") else f"{image.mode} pixels"
        raise ImageError(path, f"has {depth}; gray, palette, RGB and CMYK of 8 bits, gray and RGB of 16 bits are read")
    colours = 1 if gray else 3
    has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
    pixels = np.empty((image.height, image.width, colours), np.uint8)
    alpha = np.empty(pixels.shape[:2], np.uint8) if has_alpha else None
    mode = ("L" if colours == 1 else "RGB") + ("A" if has_alpha else "")
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert(mode)
        band = np.atleast_3d(np.asarray(part, np.uint8))
        pixels[top:top + rows] = band[..., :colours]
        if alpha is not None:
            alpha[top:top + rows] = band[..., -1]
    return pixels, alpha


def _decode_sixteen_bit(path: Path, image: Image.Image, *, gray: bool) -> tuple[Pixels, Pixels | None]:
    tags, transparent = getattr(image, "tag_v2", {}), image.info.get("transparency")
    if tags.get(_TIFF_PHOTOMETRIC, 1) > 2 or (tags.get(_TIFF_PLANAR) == 2 and not gray):
        raise ImageError(path, "holds 16-bit pixels that are no gray or interleaved RGB, which are read")
    image.close()  # frees Pillow's 8-bit copy before the next one is made
    decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16:
        raise ImageError(path, "holds 16-bit pixels in a layout that is not read; unsigned gray and RGB are")
    samples = np.atleast_3d(np.asarray(decoded, np.uint16))
    alpha = np.ascontiguousarray(samples[..., 3]) if samples.shape[2] == 4 else None
    pixels = np.ascontiguousarray(samples[..., :1] if gray else samples[..., 2::-1])
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        np.invert(pixels, out=pixels)
    if alpha is not None and tags.get(_TIFF_EXTRA_SAMPLES) == (1,):
        _divide_by_alpha(pixels, alpha)
    if alpha is None and transparent is not None:
        alpha = np.where((pixels == np.asarray(transparent)).all(2), 0, 65535).astype(np.uint16)
    return pixels, alpha


def _divide_by_alpha(pixels: Pixels, alpha: Pixels) -> None:
    """Undo, in place, the premultiplication of 16-bit samples: transparent black in the file becomes black."""
    for row, row_alpha in zip(pixels, alpha, strict=True):
        opaque = np.maximum(row_alpha, 1).astype(np.uint32)[:, None]
        row[:] = np.minimum((row.astype(np.uint32) * 65535 + opaque // 2) // opaque, 65535)


_ORIENT = {
    2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1], 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def _read_metadata(image: Image.Image, *, gray: bool) -> tuple[Metadata, int]:
    """Profile, EXIF and XMP without their orientation, and the orientation."""
    lost: list[str] = []
    orientation, exif = 1, b""
    try:
        tags = image.getexif()
        orientation = tags.get(_ORIENTATION, 1)
        for tag in _LAYOUT_TAGS:
            tags.pop(tag, None)
        exif = tags.tobytes()[6:] if len(tags) else b""
    except FAULTS:
        lost.append("EXIF, which is damaged")
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    xmp = packet.encode() if isinstance(packet, str) else bytes(packet)
    xmp = re.sub(rb'tiff:Orientation="\d"|<tiff:Orientation>\d</tiff:Orientation>', b"", xmp)
    profile = image.info.get("icc_profile") or b""
    if profile and profile[16:20] != (b"GRAY" if gray else b"RGB "):
        lost.append(f"the colour profile, which is for {profile[16:20].decode('ascii', 'replace').strip()}")
        profile = b""
    gamma = image.info.get("gamma", _SRGB_GAMMA)
    if not profile and abs(gamma - _SRGB_GAMMA) > 0.01:
        lost.append(f"the gamma of {gamma:g}")
    return Metadata(profile, exif, xmp, tuple(lost)), orientation
