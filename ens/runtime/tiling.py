"""Overlapping tiles of an image, blended; padding to the size multiple, cut off again afterwards.

Shapes: image (B, C, H, W) of any size -> (B, C', H·upscale, W·upscale).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ens.networks.steps import pad_to_multiple

Restore = Callable[[Tensor], Tensor]
"""Image with sides that are multiples of `size_multiple` -> restored image."""

SMALLEST_TILE_PX = 64


def restore_padded(restore: Restore, image: Tensor, *, size_multiple: int, upscale: int) -> Tensor:
    """Pad on the right and bottom to the multiple, restore, cut back: any H and W in one piece."""
    height, width = image.shape[-2:]
    return restore(pad_to_multiple(image, size_multiple))[..., :height * upscale, :width * upscale]


def restore_tiled(restore: Restore, image: Tensor, *, tile_px: int, overlap_px: int = 32, size_multiple: int = 1,
                  upscale: int = 1) -> Tensor:
    """Restore tiles of `tile_px` that overlap by at least `overlap_px`, blended.

    Tiles lie on the grid of `size_multiple`, so a network that samples down sees the phase it would see in the whole
    image; `tile_px` is fitted to it (`fit_tile_px`). A tile that covers the image is the whole image. Raises ValueError
    for an overlap that is not smaller than `tile_px`.
    """
    tile = fit_tile_px(tile_px, overlap_px=overlap_px, size_multiple=size_multiple)
    height, width = image.shape[-2:]
    padded = pad_to_multiple(image, size_multiple)
    rows, columns = (_tile_starts(side, tile, overlap_px, size_multiple) for side in padded.shape[-2:])
    if len(rows) == len(columns) == 1:
        return restore(padded)[..., :height * upscale, :width * upscale]
    total, weights = torch.zeros(0), torch.zeros(0)
    for top in rows:
        for left in columns:
            part = restore(padded[..., top:top + tile, left:left + tile])
            if not total.numel():
                size = [side * upscale for side in padded.shape[-2:]]
                total, weights = part.new_zeros(*part.shape[:2], *size), part.new_zeros(*size)
            weight = (_ramp(part.shape[-2], overlap_px * upscale, first=top == rows[0], last=top == rows[-1])[:, None]
                      * _ramp(part.shape[-1], overlap_px * upscale, first=left == columns[0],
                              last=left == columns[-1])).to(part)
            window = (slice(top * upscale, top * upscale + part.shape[-2]),
                      slice(left * upscale, left * upscale + part.shape[-1]))
            total[..., window[0], window[1]] += part * weight
            weights[window] += weight
    return (total / weights)[..., :height * upscale, :width * upscale]


def fit_tile_px(tile_px: int, *, overlap_px: int, size_multiple: int) -> int:
    """`tile_px` rounded down to the size multiple, and enlarged where tiles that start on that grid would not overlap
    by `overlap_px`. Raises ValueError for an overlap that is not smaller than `tile_px`.
    """
    if not 0 <= overlap_px < tile_px:
        raise ValueError(f"the overlap must be at least 0 and smaller than the tile of {tile_px} px, got {overlap_px}")
    smallest = -(-overlap_px // size_multiple) * size_multiple + size_multiple
    return max(tile_px // size_multiple * size_multiple, smallest)


def _tile_starts(side: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Evenly spread starts on the grid, first at 0, last ending at `side`."""
    if side <= tile:
        return [0]
    stride = (tile - overlap) // multiple * multiple
    return [*range(0, side - tile, stride), side - tile]


def _ramp(side: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """1 in the middle, falling over the middle half of `overlap` at an end where another tile goes on.

    The outer quarter counts next to nothing, because a network sees the tile's edge there; not quite 0, because the
    weights are divided by.
    """
    distance = torch.arange(side) + 0.5
    fall = ((distance - overlap / 4) / max(overlap / 2, 1)).clamp(1e-6, 1)
    return (torch.ones(side) if first else fall) * (torch.ones(side) if last else fall.flip(0))


def restore_within_memory(restore: Restore, image: Tensor, *, tile_px: int | None = None, overlap_px: int = 32,
                          size_multiple: int = 1, upscale: int = 1,
                          on_event: Callable[[str], None] | None = None) -> Tensor:
    """Restore in one piece (`tile_px` None) or in tiles; where memory runs out, halve the tile, say so, try again.

    `on_event` gets one line each time, and one where a tile has to be larger than asked. Raises MemoryError when a tile
    of 64 px is still too much.
    """
    if tile_px is not None and on_event is not None:
        tile = fit_tile_px(tile_px, overlap_px=overlap_px, size_multiple=size_multiple)
        if tile > tile_px:
            on_event(f"tiles of {tile} px instead of {tile_px}: they start at multiples of {size_multiple} px and "
                     f"overlap by {overlap_px}")
    while True:
        reason = ""
        try:
            if tile_px is None:
                return restore_padded(restore, image, size_multiple=size_multiple, upscale=upscale)
            return restore_tiled(restore, image, tile_px=tile_px, overlap_px=overlap_px, size_multiple=size_multiple,
                                 upscale=upscale)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        # Outside the handler: the traceback held there keeps the tensors of the failed attempt alive.
        tile_px = (max(image.shape[-2:]) if tile_px is None else tile_px) // 2
        if tile_px < SMALLEST_TILE_PX:
            raise MemoryError(f"out of memory even with tiles of {2 * tile_px} px ({reason.splitlines()[0]})")
        overlap_px = min(overlap_px, tile_px // 2)
        if on_event is not None:
            on_event(f"out of memory: going on with tiles of {tile_px} px, overlapping by {overlap_px}")


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch on CPU and ONNX Runtime raise plain RuntimeErrors for it, told apart by their text only."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        piece in text for piece in ("can't allocate memory", "out of memory", "failed to allocate memory", "bad_alloc",
                                    "bad allocation"))
