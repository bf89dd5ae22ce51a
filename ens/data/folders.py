"""Data-set folders people have: flat clean images, `input/ target/`, `HR/ LR_bicubic/X4/`, and built-in photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ens.data.images import FloatImage, ImageError, Pixels, list_images, read_photo, to_float, to_pixels

BUILTIN_PHOTOS = "builtin:photos"
# Colour pictures that scikit-image ships: to train on, to choose by, to report on, or all five photographs.
_BUILTIN = {
    "builtin:train-photos": ("astronaut.png", "motorcycle_left.png"),
    "builtin:validation-photos": ("coffee.png", "rocket.jpg"),
    "builtin:report-photos": ("chelsea.png",),
    BUILTIN_PHOTOS: ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
}
_PAIR_FOLDERS = (("input", "target"), ("blur", "sharp"))
_MAX_SHOWN = 10
_LUMA = np.array([0.299, 0.587, 0.114])
_STUDIO_LUMA = np.array([65.481, 128.553, 24.966])


class DataError(ValueError):
    """A data set that cannot be used; the message lists the first ten offenders."""


@dataclass(frozen=True)
class PairPath:
    """One image of a data set; `degraded` is None where the task makes it from `clean`."""

    name: str
    clean: Path
    degraded: Path | None = None


@dataclass(frozen=True)
class Pair:
    """One decoded image: (H, W, C) pixels, and its degraded twin where the folder holds one."""

    name: str
    clean: Pixels
    degraded: Pixels | None = None


def find_pairs(folder: str | Path, *, scale: int = 1) -> list[PairPath]:
    """Images of a folder by its layout: `input/ target/` (or `blur/ sharp/`), `HR/ LR_bicubic/X4/`, or flat and clean.

    `builtin:photos`, `builtin:train-photos`, `builtin:validation-photos` and `builtin:report-photos` are pictures that
    scikit-image ships.
    Raises FileNotFoundError for a missing folder and DataError for images without partner, the first ten listed.
    """
    if str(folder).startswith("builtin:"):
        return _flat(_builtin_photos(str(folder)))
    root = Path(folder)
    for degraded, clean in _PAIR_FOLDERS:
        if scale == 1 and (root / degraded).is_dir() and (root / clean).is_dir():
            return _match(list_images(root / clean), list_images(root / degraded), suffix="")
    low = root / "LR_bicubic" / f"X{scale}"
    if scale > 1 and (root / "HR").is_dir():
        clean_paths = list_images(root / "HR")
        return _match(clean_paths, list_images(low), suffix=f"x{scale}") if low.is_dir() else _flat(clean_paths)
    return _flat(list_images(root))


def _flat(paths: Sequence[Path]) -> list[PairPath]:
    return [PairPath(path.stem, path) for path in paths]


def _builtin_photos(name: str) -> list[Path]:
    if name not in _BUILTIN:
        raise DataError(f"no photos {name!r}; there are {', '.join(_BUILTIN)}")
    try:
        import skimage
    except ImportError:
        raise ModuleNotFoundError(f"{name} are the photos of scikit-image, which is not installed") from None
    folder = Path(skimage.__file__).parent / "data"
    return [folder / file for file in _BUILTIN[name]]


def _match(clean: Sequence[Path], degraded: Sequence[Path], *, suffix: str) -> list[PairPath]:
    by_name = {path.stem.removesuffix(suffix): path for path in degraded}
    names = {path.stem for path in clean}
    alone = [f"{path.name} has no degraded partner" for path in clean if path.stem not in by_name]
    alone += [f"{by_name[name].name} has no clean partner" for name in sorted(by_name) if name not in names]
    if alone:
        raise DataError(f"{len(clean)} clean images in {clean[0].parent} and {len(degraded)} degraded in "
                        f"{degraded[0].parent} do not match{format_offenders(alone)}")
    return [PairPath(path.stem, path, by_name[path.stem]) for path in clean]


def format_offenders(offenders: Sequence[str]) -> str:
    """`: a; b; c and 7 more`, ten at most."""
    more = f" and {len(offenders) - _MAX_SHOWN} more" if len(offenders) > _MAX_SHOWN else ""
    return ": " + "; ".join(offenders[:_MAX_SHOWN]) + more


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
            pair = Pair(path.name, _read(path.clean, channels, studio),
                        None if path.degraded is None else _read(path.degraded, channels, studio))
        except ImageError as error:
            offenders.append(str(error))
            continue
        offenders += _size_mismatch(pair, scale)
        pairs.append(pair)
    if offenders:
        raise DataError(f"{len(offenders)} of {len(paths)} images of {folder} cannot be used"
                        f"{format_offenders(offenders)}")
    return pairs


def _read(path: Path, channels: int, studio: bool) -> Pixels:
    return with_channels(read_photo(path).pixels, channels, studio=studio)


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
