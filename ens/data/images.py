"""Image files: reading, writing, listing, fingerprints. 8 and 16 bit, gray and colour, alpha, metadata; RGB order."""

from __future__ import annotations

import errno
import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ens.atomic import atomic_path
from ens.data.decoding import FAULTS
from ens.data.decoding import read_photo as read_photo
from ens.data.encoding import write_other, write_png, write_tiff
from ens.data.photo import FloatImage as FloatImage
from ens.data.photo import ImageError as ImageError
from ens.data.photo import Metadata as Metadata
from ens.data.photo import Photo as Photo
from ens.data.photo import Pixels as Pixels
from ens.data.photo import show_name as show_name

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp")
READ_SUFFIXES = (*SUFFIXES, ".gif", ".avif")
SIXTEEN_BIT_SUFFIXES = (".png", ".tif", ".tiff")
ALPHA_SUFFIXES = (".png", ".tif", ".tiff", ".webp")
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif")
_MAX_SIDE_PX = {**dict.fromkeys(_JPEG_SUFFIXES, 65_500), ".webp": 16_383}
_JPEG_SEGMENT_BYTES = 65_502  # what one EXIF or XMP segment holds


def check_writable(path: str | Path, photo: Photo, *, upscale: int = 1) -> None:
    """Raise ImageError where the format of `path` cannot hold a picture like `photo`, `upscale` times larger."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageError(path, f"cannot write {suffix or 'a file without suffix'}; use one of {', '.join(SUFFIXES)}")
    if photo.pixels.dtype == np.uint16 and suffix not in SIXTEEN_BIT_SUFFIXES:
        raise ImageError(path, f"{suffix} holds 8 bits but the picture has 16; use {', '.join(SIXTEEN_BIT_SUFFIXES)}")
    if photo.alpha is not None and suffix not in ALPHA_SUFFIXES:
        raise ImageError(path, f"{suffix} holds no alpha channel; use {', '.join(ALPHA_SUFFIXES)}")
    height, width = (side * upscale for side in photo.pixels.shape[:2])
    if max(height, width) > _MAX_SIDE_PX.get(suffix, 2**31 - 1):
        raise ImageError(path, f"{suffix} holds at most {_MAX_SIDE_PX[suffix]} pixels a side, the picture has "
                         f"{width}×{height}; use .png or .tif")


def write_photo(path: str | Path, photo: Photo) -> tuple[str, ...]:
    """Write by the suffix, to a temporary name first; return what of the metadata the format cannot hold, in words.

    Gray with alpha becomes RGBA in WebP and in 16-bit TIFF. JPEG quality is 95. Raises ImageError where the format
    cannot hold the picture, OSError where the disk is at fault.
    """
    path = Path(path)
    check_writable(path, photo)
    suffix = path.suffix.lower()
    metadata, lost = _keep_writable(photo.metadata, suffix)
    try:
        with atomic_path(path) as temporary, temporary.open("r+b") as file:
            _encode(file, suffix, replace(photo, metadata=metadata))
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EISDIR, errno.ENAMETOOLONG):
            raise
        raise ImageError(path, f"cannot be written ({error})") from None
    return lost


def encode_png(pixels: Pixels) -> bytes:
    """(H, W, 1 or 3) uint8 or uint16, RGB, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    _encode(buffer, ".png", Photo(pixels))
    return buffer.getvalue()


def _keep_writable(metadata: Metadata, suffix: str) -> tuple[Metadata, tuple[str, ...]]:
    """What of the metadata a format can hold, and in words what it cannot."""
    if suffix == ".bmp":
        kept = Metadata()
    elif suffix in _JPEG_SUFFIXES:  # a profile spans several segments, these two do not
        kept = replace(metadata, exif=_if_short(metadata.exif), xmp=_if_short(metadata.xmp))
    else:
        kept = metadata
    words = (("the colour profile", "icc_profile"), ("EXIF", "exif"), ("XMP", "xmp"))
    return kept, tuple(f"{word} ({suffix})" for word, name in words if getattr(kept, name) != getattr(metadata, name))


def _if_short(data: bytes) -> bytes:
    return data if len(data) <= _JPEG_SEGMENT_BYTES else b""


def _encode(file: IO[bytes], suffix: str, photo: Photo) -> None:
    metadata = photo.metadata
    facts = {"icc_profile": metadata.icc_profile, "exif": metadata.exif, "xmp": metadata.xmp}
    if suffix == ".png":
        write_png(file, photo.pixels, photo.alpha, **facts)
    elif suffix in (".tif", ".tiff"):
        write_tiff(file, photo.pixels, photo.alpha, **facts)
    else:
        form = "JPEG" if suffix in _JPEG_SUFFIXES else suffix[1:].upper()
        write_other(file, photo.pixels, photo.alpha, form=form, **facts)


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
        raise FileNotFoundError(f"{show_name(folder)} is not a folder")
    paths = sorted(path for path in folder.iterdir() if not _why_skipped(path))
    if not paths:
        raise ValueError(f"{show_name(folder)} holds no images ({', '.join(READ_SUFFIXES)})")
    return paths


def list_skipped(folder: str | Path) -> list[str]:
    """What `list_images` passes over in a folder, and why, sorted by name; hidden files are not mentioned."""
    return [f"{show_name(path.name)} ({reason})" for path in sorted(Path(folder).iterdir())
            if not path.name.startswith(".") and (reason := _why_skipped(path))]


def _why_skipped(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if path.is_symlink() and not path.exists():
        return "a broken link"
    if path.suffix.lower() not in READ_SUFFIXES:
        return "no image by its suffix"
    return "" if path.is_file() else "a pipe, device or socket"


def name_output(source: str | Path) -> str:
    """Name of the restored image in another folder: its own, with `.png` behind it where its kind is only read."""
    source = Path(source)
    return source.name if source.suffix.lower() in SUFFIXES else f"{source.name}.png"


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
