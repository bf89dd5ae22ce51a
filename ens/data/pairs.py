"""(degraded, clean) training patches and validation images; every batch is rebuilt from (seed, index) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ens.data.folders import Pair, describe_images, load_pairs, require_pairs
from ens.data.images import (
    Fingerprint,
    FloatImage,
    Photo,
    Pixels,
    fingerprint_images,
    read_photo,
    to_float,
    to_pixels,
    write_photo,
)
from ens.data.layouts import DataError, format_offenders
from ens.data.tasks import Task

Bytes = NDArray[np.uint8]


def derive_seed(*parts: int | str) -> int:
    """A seed for one use of random numbers: the same for the same parts, another for any other."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Patches:
    """Random training patches of images held in memory as uint8 (three bytes a pixel).

    `batch` depends on (seed, purpose, index) and nothing else, sample by sample, so that a resumed run, or several
    processes that share a batch, see exactly the patches of one uninterrupted process.
    """

    def __init__(self, pairs: Sequence[Pair], task: Task, *, seed: int = 0, purpose: str = "") -> None:
        if not pairs:
            raise DataError("no images to cut patches from")
        self._task = task
        self._seed = derive_seed(seed, purpose)
        self._images = [_prepare_bytes(pair, task) for pair in pairs]
        self._names = [pair.name for pair in pairs]

    @property
    def max_patch_px(self) -> int:
        """Largest input patch that fits into every image."""
        return min(int(min(clean.shape[:2])) for clean, _ in self._images) // self._task.scale

    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
        """Batch number `index`: degraded (B, C, patch_px, patch_px) and clean, `scale` times larger; float32.

        Of a batch shared by several processes, `first` is the position of this process's first sample. Raises
        DataError where a patch does not fit into every image.
        """
        if patch_px > self.max_patch_px:
            side = patch_px * self._task.scale
            small = [f"{name} is {clean.shape[1]}×{clean.shape[0]}"
                     for name, (clean, _) in zip(self._names, self._images, strict=True) if min(clean.shape[:2]) < side]
            raise DataError(f"patches of {side} px do not fit into {len(small)} images{format_offenders(small)}")
        samples = [self._sample(np.random.default_rng((self._seed, index, first + position)), patch_px)
                   for position in range(batch_size)]
        degraded, clean = (torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
                           for images in zip(*samples, strict=True))
        return degraded, clean

    def _sample(self, rng: np.random.Generator, patch_px: int) -> tuple[FloatImage, FloatImage]:
        clean, degraded = self._images[rng.integers(len(self._images))]
        symmetry = int(rng.integers(8))
        # The image is turned before it is degraded: rain must not fall sideways.
        clean = _turn(clean, symmetry)
        scale = self._task.scale
        top, left = (int(rng.integers(size // scale - patch_px + 1)) for size in clean.shape[:2])
        if degraded is None:
            return _degrade_patch(clean, self._task, rng, top=top, left=left, patch_px=patch_px)
        return (to_float(_cut(_turn(degraded, symmetry), top, left, patch_px)),
                to_float(_cut(clean, top * scale, left * scale, patch_px * scale)))


def _prepare_bytes(pair: Pair, task: Task) -> tuple[Bytes, Bytes | None]:
    clean = to_pixels(task.prepare(to_float(pair.clean)))
    if pair.degraded is None:
        return np.asarray(clean, np.uint8), None
    degraded = to_float(pair.degraded)
    return np.asarray(clean, np.uint8), np.asarray(to_pixels(task.prepare(degraded) if task.scale == 1 else degraded))


def _turn(image: Bytes, symmetry: int) -> Bytes:
    """One of the eight symmetries of the square, as a view."""
    turned = image[::-1] if symmetry & 1 else image
    turned = turned[:, ::-1] if symmetry & 2 else turned
    return turned.swapaxes(0, 1) if symmetry & 4 else turned


def _cut(image: Pixels, top: int, left: int, side: int) -> Pixels:
    return image[top:top + side, left:left + side]


def _degrade_patch(clean: Bytes, task: Task, rng: np.random.Generator, *, top: int, left: int,
                   patch_px: int) -> tuple[FloatImage, FloatImage]:
    """Degrade a patch in the context the task asks for, so that blur and resampling see no patch border."""
    scale = task.scale
    rows, columns = (_window(start * scale, patch_px * scale, size, task)
                     for start, size in zip((top, left), clean.shape[:2], strict=True))
    window = to_float(np.ascontiguousarray(clean[rows, columns]))
    degraded = task.degrade(window, rng)
    inner_top, inner_left = top - rows.start // scale, left - columns.start // scale
    return (degraded[inner_top:inner_top + patch_px, inner_left:inner_left + patch_px],
            to_float(_cut(clean, top * scale, left * scale, patch_px * scale)))


def _window(start: int, length: int, size: int, task: Task) -> slice:
    grid = task.grid_px
    low = max(0, start - task.margin_px) // grid * grid
    high = -(-(start + length + task.margin_px) // grid) * grid
    return slice(low, min(size, high))


@dataclass(frozen=True)
class ValidationImage:
    """`degraded` (C, H, W) and `clean` (C, scale·H, scale·W), float32; noise may leave [0, 1]."""

    name: str
    degraded: Tensor
    clean: Tensor


class ValidationImages(Sequence[ValidationImage]):
    """Images that are degraded anew, to the same pixels, whenever one is asked for: a set costs its bytes as decoded,
    however many are looked at.
    """

    def __init__(self, pairs: Sequence[Pair], task: Task) -> None:
        self._pairs, self._task = pairs, task

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> ValidationImage: ...

    @overload
    def __getitem__(self, index: slice) -> ValidationImages: ...

    def __getitem__(self, index: int | slice) -> ValidationImage | ValidationImages:
        if isinstance(index, slice):
            return ValidationImages(self._pairs[index], self._task)
        return _degrade_whole(self._pairs[index], self._task)

    def sorted_by_content(self) -> ValidationImages:
        """The same images in an order that no file name has a part in: figures are paired by position."""
        digests = [hashlib.sha256(image.clean.numpy().tobytes() + image.degraded.numpy().tobytes()).digest()
                   for image in self]
        order = sorted(range(len(self)), key=digests.__getitem__)
        return ValidationImages([self._pairs[place] for place in order], self._task)


@dataclass(frozen=True)
class ValidationSet:
    """Images in a fixed order, the fingerprint of the pixels they were made of, and in words where they are from."""

    images: Sequence[ValidationImage]
    fingerprint: Fingerprint
    origin: str = ""


def load_validation_set(folder: str | Path, task: Task, *, channels: int = 3, crop_px: int | None = None,
                        limit: int | None = None, crops_per_image: int = 1,
                        by_content: bool = False) -> ValidationSet:
    """Validation images of a folder (or `builtin:photos`), degraded as the task's protocol says where it is clean.

    `crop_px`, rounded down to a multiple of 8 inputs' pixels, cuts up to `crops_per_image` squares of that side out of
    every target, spread over it without overlap: one is the centre. Without it images stay whole. The same arguments
    give the same pixels, whatever the files are called, and with `by_content` in the same order. Raises as
    `load_pairs` does, and DataError naming the images that are smaller than a crop.
    """
    if crops_per_image < 1:
        raise ValueError(f"crops_per_image is at least 1, got {crops_per_image}")
    if crop_px is None and crops_per_image > 1:
        raise ValueError(f"crops_per_image is {crops_per_image}, but there is no crop_px; say how large the crops are")
    if task.needs_pairs:
        require_pairs(folder, scale=task.scale)
    pairs = load_pairs(folder, scale=task.scale, channels=channels, limit=limit, studio=task.studio)
    origin = describe_images(folder, pairs, scale=task.scale, degradation=task.degradation)
    if crop_px is not None:
        if crop_px < 8 * task.scale:
            raise ValueError(f"crop_px is at least {8 * task.scale}, got {crop_px}")
        pairs = _crop_all(pairs, crop_px, task.scale, crops_per_image)
    images = ValidationImages(pairs, task)
    pixels = (np.concatenate([image.clean.numpy().ravel(), image.degraded.numpy().ravel()]) for image in images)
    paired = any(pair.degraded is not None for pair in pairs)
    return ValidationSet(images.sorted_by_content() if by_content else images,
                         fingerprint_images([pair.clean for pair in pairs], pixels, paired=paired,
                                            seeding="" if paired else task.seeding), origin)


def _crop_all(pairs: Sequence[Pair], crop_px: int, scale: int, count: int) -> list[Pair]:
    small = [f"{pair.name} is {pair.clean.shape[1]}×{pair.clean.shape[0]}" for pair in pairs
             if min(pair.clean.shape[:2]) < crop_px]
    if small:
        raise DataError(f"crops of {crop_px} px do not fit into {len(small)} images{format_offenders(small)}")
    side = crop_px // (8 * scale) * 8 * scale
    return [crop for pair in pairs for crop in _crop_grid(pair, side, scale, count)]


def _crop_grid(pair: Pair, side: int, scale: int, count: int) -> list[Pair]:
    """Squares in the middle of the cells of a grid over the image: the one of most cells, `count` at most."""
    height, width = pair.clean.shape[:2]
    grids = [(rows, columns) for rows in range(1, height // side + 1) for columns in range(1, width // side + 1)
             if rows * columns <= count]
    # Of two grids with as many cells the one whose cells are squarer.
    rows, columns = max(grids, key=lambda grid: (grid[0] * grid[1], -abs(height * grid[1] - width * grid[0])))
    crops = []
    for number, (row, column) in enumerate(np.ndindex(rows, columns), 1):
        top = (height * (2 * row + 1) // (2 * rows) - side // 2) // scale
        left = (width * (2 * column + 1) // (2 * columns) - side // 2) // scale
        crops.append(Pair(f"{pair.name}#{number}" if count > 1 else pair.name,
                          _cut(pair.clean, top * scale, left * scale, side).copy(),  # a view would keep the photo
                          None if pair.degraded is None else _cut(pair.degraded, top, left, side // scale).copy()))
    return crops


def _degrade_whole(pair: Pair, task: Task) -> ValidationImage:
    clean = task.prepare(to_float(pair.clean))
    if pair.degraded is None:
        degraded = task.degrade_for_validation(clean)
    else:
        degraded = to_float(pair.degraded)
        degraded = task.prepare(degraded) if task.scale == 1 else degraded
    return ValidationImage(pair.name, _as_tensor(degraded), _as_tensor(clean))


def degrade_photo(source: Path, target: Path, task: Task) -> Photo:
    """Write the degraded version of one clean photo as the task's validation would have it; returns it as written."""
    photo = read_photo(source)
    clean = task.prepare(to_float(photo.pixels))
    photo = Photo(to_pixels(task.degrade_for_validation(clean).clip(0, 1)), metadata=photo.metadata)
    write_photo(target, photo)
    return photo


def _as_tensor(image: FloatImage) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C"))
