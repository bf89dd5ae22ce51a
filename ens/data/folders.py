"""The images of a data set: decoded, with the channels a network takes, and built-in photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ens.data.images import FloatImage, ImageError, Pixels, read_photo, show_name, to_float, to_pixels
from ens.data.layouts import BUILTIN, PairPath, describe_paths, format_offenders, match_folder
from ens.data.layouts import DataError as DataError

BUILTIN_PHOTOS = "builtin:photos"
# Colour pictures that scikit-image ships: to train on, to choose by, to report on, or all five photographs.
_BUILTIN = {
    "builtin:train-photos": ("astronaut.png", "motorcycle_left.png"),
    "builtin:validation-photos": ("coffee.png", "rocket.jpg"),
    "builtin:report-photos": ("chelsea.png",),
    BUILTIN_PHOTOS: ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
}
_LUMA = np.array([0.299, 0.587, 0.114])
_STUDIO_LUMA = np.array([65.481, 128.553, 24.966])


@dataclass(frozen=True)
class Pair:
    """One decoded image: (H, W, C) pixels, and its degraded twin where the folder holds one.

    `unused` is what the files hold beside that, in words: "a.tif: frames 2 to 5".
    """

    name: str
    clean: Pixels
    degraded: Pixels | None = None
    unused: tuple[str, ...] = ()


def find_pairs(folder: str | Path, *, scale: int = 1) -> list[PairPath]:
    """Images of a folder by its layout (`match_folder`), or of `builtin:photos`.

    `builtin:photos`, `builtin:train-photos`, `builtin:validation-photos` and `builtin:report-photos` are pictures that
    scikit-image ships.
    """
    if str(folder).startswith(BUILTIN):
        return [PairPath(path.stem, path) for path in _builtin_photos(str(folder))]
    return match_folder(Path(folder), scale=scale)


def _builtin_photos(name: str) -> list[Path]:
    if name not in _BUILTIN:
        raise DataError(f"no photos {name!r}; there are {', '.join(_BUILTIN)}")
    try:
        import skimage
    except ImportError:
        raise ModuleNotFoundError(f"{name} are the photos of scikit-image, which is not installed") from None
    folder = Path(skimage.__file__).parent / "data"
    return [folder / file for file in _BUILTIN[name]]


def require_pairs(folder: str | Path, *, scale: int) -> None:
    """Raise DataError where a folder holds images without a degraded twin."""
    if any(path.degraded is None for path in find_pairs(folder, scale=scale)):
        raise DataError(f"{show_name(folder)} holds clean images alone; this task makes no degraded ones and takes "
                        "them from a folder input/ beside target/")


def describe_images(folder: str | Path, pairs: Sequence[Pair], *, scale: int, degradation: str) -> str:
    """One line for people: which images of a folder these are, how the degraded ones came about, what is not used.

    `degradation` says what makes degraded images where the folder holds none.
    """
    paths = find_pairs(folder, scale=scale)[:len(pairs)]
    unused = [item for pair in pairs for item in pair.unused]
    return describe_paths(folder, paths, degradation=degradation) + (
        f"; not used{format_offenders(unused)}" if unused else "")


def load_pairs(folder: str | Path, *, scale: int = 1, channels: int = 3, limit: int | None = None,
               studio: bool = False) -> list[Pair]:
    """Decode the first `limit` images of a folder (all of them by default) with 1 or 3 channels.

    Colour becomes one channel as BT.601 luma of full range; with `studio` it becomes gray as MATLAB's rgb2ycbcr has it,
    also where there are three channels.
    Raises DataError listing every unreadable image and every pair whose sizes do not fit, before anything is used.
    """
    if channels not in (1, 3):
        raise ValueError(f"images are loaded with 1 or 3 channels, got {channels}")
    pairs: list[Pair] = []
    offenders: list[str] = []
    paths = find_pairs(folder, scale=scale)[:limit]
    for path in paths:
        try:
            photos = [read_photo(file) for file in (path.clean, path.degraded) if file is not None]
        except ImageError as error:
            offenders.append(str(error))
            continue
        pixels = [with_channels(photo.pixels, channels, studio=studio) for photo in photos]
        unused = tuple(f"{path.name}: {item}" for photo in photos for item in photo.metadata.lost)
        pair = Pair(path.name, pixels[0], pixels[1] if path.degraded else None, unused)
        offenders += _size_mismatch(pair, scale)
        pairs.append(pair)
    if offenders:
        raise DataError(f"{len(offenders)} of {len(paths)} images of {show_name(folder)} cannot be used"
                        f"{format_offenders(offenders)}")
    return pairs


def with_channels(pixels: Pixels, channels: int, *, studio: bool = False) -> Pixels:
    """Gray repeated to three channels, or colour reduced to BT.601 luma of full range; the depth stays.

    With `studio`, colour becomes studio luma whatever the channels: networks of one and of three get the same pixels.
    """
    if pixels.shape[2] == 3 and (channels == 1 or studio):
        pixels = _reduce_to_gray(pixels, studio)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] < channels else pixels


def _reduce_to_gray(pixels: Pixels, studio: bool) -> Pixels:
    # Gray that a file stores as colour is gray already.
    if (pixels == pixels[..., :1]).all():
        return pixels[..., :1]
    colour = to_float(pixels)
    gray = studio_luma(colour) if studio else (colour.astype(np.float64) @ _LUMA)[..., None].astype(np.float32)
    return to_pixels(gray, np.uint16 if pixels.dtype == np.uint16 else np.uint8)


def studio_luma(colour: FloatImage) -> FloatImage:
    """(H, W, 3) in [0, 1] -> (H, W, 1): BT.601 luma in 16 to 235 of 255, rounded to 8 bits as MATLAB's rgb2ycbcr."""
    luma = 16 + colour.astype(np.float64) @ _STUDIO_LUMA
    return np.rint(luma).astype(np.float32)[..., None] / np.float32(255)


def _size_mismatch(pair: Pair, scale: int) -> list[str]:
    if pair.degraded is None:
        return []
    clean, degraded = pair.clean.shape[:2], pair.degraded.shape[:2]
    if (clean[0] // scale, clean[1] // scale) == degraded:
        return []
    return [f"{pair.name} is {clean[1]}×{clean[0]} clean and {degraded[1]}×{degraded[0]} degraded, scale {scale}"]
