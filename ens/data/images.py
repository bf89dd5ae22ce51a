"""Reading and writing photographs: 8 and 16 bit, gray and colour, alpha, EXIF orientation. RGB order everywhere."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ens.atomic import write_atomic

Pixels = NDArray[np.uint8 | np.uint16]
FloatImage = NDArray[np.float32]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SIXTEEN_BIT_SUFFIXES = (".png", ".tif", ".tiff")
ALPHA_SUFFIXES = (".png", ".tif", ".tiff", ".webp")
_BITS_PER_SAMPLE = 258  # TIFF tag
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, zlib.error,
                  cv2.error)


class ImageError(ValueError):
    """A file that cannot be read or written as an image; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


@dataclass(frozen=True)
class Photo:
    """`pixels` (H, W, 1 or 3) uint8 or uint16, RGB; `alpha` (H, W) of the same type where the file has one."""

    pixels: Pixels
    alpha: Pixels | None = None


def read_photo(path: str | Path) -> Photo:
    """Read an image file upright (EXIF orientation applied), at its own bit depth, gray as one channel.

    Raises ImageError for a file that is missing, empty, truncated, corrupt or not an image.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror or error})") from None
    if not data:
        raise ImageError(path, "the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ImageError(path, "is a git-lfs pointer, not the image itself; fetch it with `git lfs pull`")
    try:
        return _decode(path, data)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(path, "is not an image, or is damaged beyond recognition") from None
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"is too large ({error})") from None
    except _DECODE_ERRORS as error:
        raise ImageError(path, f"is corrupt or truncated ({error})") from None


def _decode(path: str | Path, data: bytes) -> Photo:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata of pixels that can be read; photos above 89 megapixels
        with Image.open(io.BytesIO(data)) as image:
            # Pillow notices truncated files, which OpenCV decodes half gray without a word; OpenCV keeps 16 bits.
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            gray = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")
            if _is_sixteen_bit(image, data):
                return _split(_decode_sixteen_bit(data, orientation), gray=gray)
            if image.mode in ("I", "F"):
                raise ImageError(path, "has 32 bits a pixel; 8 and 16 bits are read")
            upright = ImageOps.exif_transpose(image)
    has_alpha = upright.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in upright.info
    mode = ("LA" if has_alpha else "L") if gray else ("RGBA" if has_alpha else "RGB")
    return _split(np.atleast_3d(np.asarray(upright.convert(mode), dtype=np.uint8)), gray=gray)


def _is_sixteen_bit(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24] == 16
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
        return 16 in (bits if isinstance(bits, tuple) else (bits,))
    return image.mode.startswith("I;16")


def _decode_sixteen_bit(data: bytes, orientation: int) -> Pixels:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16:
        raise ValueError("16-bit pixels in a layout that is not read")
    pixels = _swap_red_blue(np.atleast_3d(np.asarray(decoded, np.uint16)))
    return np.ascontiguousarray(_ORIENT[orientation](pixels) if orientation in _ORIENT else pixels)


_ORIENT = {
    2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1], 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def _swap_red_blue(pixels: Pixels) -> Pixels:
    """RGB <-> BGR, alpha kept last; one channel stays as it is."""
    return np.ascontiguousarray(pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]) if pixels.shape[2] >= 3 else pixels


def _split(pixels: Pixels, *, gray: bool) -> Photo:
    alpha = np.ascontiguousarray(pixels[..., -1]) if pixels.shape[2] in (2, 4) else None
    return Photo(np.ascontiguousarray(pixels[..., :1 if gray else 3]), alpha)


def write_photo(path: str | Path, photo: Photo) -> None:
    """Write by the suffix, to a temporary name first. Raises ImageError where the format cannot hold the picture.

    Gray with alpha becomes RGBA at 16 bits, for which PNG writers have no gray form here. JPEG quality is 95.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageError(path, f"cannot write {suffix or 'a file without suffix'}; use one of {', '.join(SUFFIXES)}")
    if photo.pixels.dtype == np.uint16 and suffix not in SIXTEEN_BIT_SUFFIXES:
        raise ImageError(path, f"{suffix} holds 8 bits but the picture has 16; use {', '.join(SIXTEEN_BIT_SUFFIXES)}")
    if photo.alpha is not None and suffix not in ALPHA_SUFFIXES:
        raise ImageError(path, f"{suffix} holds no alpha channel; use {', '.join(ALPHA_SUFFIXES)}")
    write_atomic(path, _encode(photo, suffix))


def encode_png(pixels: Pixels) -> bytes:
    """(H, W, 1 or 3) uint8 or uint16, RGB, as the bytes of a PNG file."""
    return _encode(Photo(pixels), ".png")


def _encode(photo: Photo, suffix: str) -> bytes:
    pixels = photo.pixels
    if photo.alpha is not None:
        if pixels.shape[2] == 1 and pixels.dtype == np.uint8 and suffix == ".png":
            buffer = io.BytesIO()
            Image.fromarray(np.dstack([pixels, photo.alpha]), mode="LA").save(buffer, "PNG")
            return buffer.getvalue()
        pixels = np.dstack([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), photo.alpha])
    quality = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []  # above 100 is lossless
    return bytes(cv2.imencode(suffix, _swap_red_blue(pixels), quality)[1].tobytes())


def to_float(pixels: Pixels) -> FloatImage:
    """uint8 or uint16 -> float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def to_pixels(image: FloatImage, dtype: type[np.uint8] | type[np.uint16] = np.uint8) -> Pixels:
    """float in [0, 1] -> uint8 or uint16, clipped and rounded to nearest. Raises ValueError on NaN."""
    if np.isnan(image).any():
        raise ValueError("the image holds NaN and cannot be written")
    pixels: Pixels = np.rint(np.clip(image.astype(np.float64), 0, 1) * np.iinfo(dtype).max).astype(dtype)
    return pixels


def list_images(folder: str | Path) -> list[Path]:
    """Image files directly in a folder, sorted by name. Raises FileNotFoundError or ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.iterdir()
                   if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return paths


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a data set: number of images or pairs, sizes W×H of the clean ones, hash of all pixels.

    `seeding` says what seeded the degradation, "" where nothing is drawn or the degraded images were there.
    """

    count: int
    sizes: tuple[tuple[str, int], ...]
    sha256: str
    paired: bool = False
    seeding: str = ""

    def __str__(self) -> str:
        shown = ", ".join(f"{number}×({size})" if number > 1 else size for size, number in self.sizes[:3])
        more = f" and {len(self.sizes) - 3} more sizes" if len(self.sizes) > 3 else ""
        seeding = f", {self.seeding}" if self.seeding else ""
        kind = "pairs" if self.paired else "images"
        return f"{self.count} {kind}, {shown}{more}{seeding}, sha256 {self.sha256[:12]}"


def fingerprint_images(images: Iterable[Pixels], contents: Iterable[NDArray[Any]], *,
                       paired: bool = False, seeding: str = "") -> Fingerprint:
    """Fingerprint of images (H, W, C), whatever their names, order and file format.

    `contents` are what is scored, one array an image: the degraded pixels belong to it as the clean ones do.
    """
    sizes = Counter(f"{pixels.shape[1]}×{pixels.shape[0]}" for pixels in images)
    digests = sorted(hashlib.sha256(f"{content.shape} {content.dtype}".encode()
                                    + np.ascontiguousarray(content).tobytes()).digest() for content in contents)
    ranked = tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))
    return Fingerprint(len(digests), ranked, hashlib.sha256(b"".join(digests)).hexdigest(), paired, seeding)
