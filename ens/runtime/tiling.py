"""Overlapping tiles of an image, blended band by band; padding to the size multiple, cut off again afterwards.

A band is one row of tiles. Rows that no further tile reaches are finished and handed on, so that an image never exists
as floats in one piece. Shapes: image (B, C, H, W) of any size -> (B, C', H·upscale, W·upscale).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ens.export.failures import first_line, translating
from ens.export.statistics import Restore, Share
from ens.networks.steps import pad_to_multiple

Read = Callable[[Tensor, Tensor], Tensor]
"""Indices of rows (h,) and of columns (w,), int64 -> those pixels of the image, (B, C, h, w) float32."""
Write = Callable[[int, Tensor], None]
"""First row and finished rows (B, C', h, W·upscale) of the restored image."""

SMALLEST_TILE_PX = 64
OVERLAP_PX = 64
_SAMPLED_TILES = 16
"""How many tiles of an image the shared statistics are the mean of: 24 megapixels have 375 of 256 px side by side."""


@dataclass(frozen=True)
class Tiles:
    """Square tiles of `tile_px` that start at multiples of `size_multiple` and overlap by at least `overlap_px`."""

    tile_px: int
    overlap_px: int
    size_multiple: int

    def __str__(self) -> str:
        return f"tiles of {self.tile_px} px that overlap by {self.overlap_px} px"

    def starts(self, side: int) -> list[int]:
        """Evenly spread starts of the tiles along a side, first at 0, the last tile ending at `side`."""
        if side <= self.tile_px:
            return [0]
        stride = (self.tile_px - self.overlap_px) // self.size_multiple * self.size_multiple
        return [*range(0, side - self.tile_px, stride), side - self.tile_px]

    def halved(self) -> Tiles:
        """Tiles of half the side, or of the least that the grid and an overlap of at most a half allow."""
        half = self.tile_px // 2
        return fit_tiles(half, overlap_px=min(self.overlap_px, half // 2), size_multiple=self.size_multiple)


def fit_tiles(tile_px: int, *, overlap_px: int | None = None, size_multiple: int = 1) -> Tiles:
    """Tiles of `tile_px` rounded down to the size multiple, and enlarged where tiles that start on that grid would not
    overlap by `overlap_px` (64, or a quarter of a smaller tile, unless given).

    Raises ValueError for an overlap that is not smaller than `tile_px`.
    """
    overlap = min(OVERLAP_PX, tile_px // 4) if overlap_px is None else overlap_px
    if not 0 <= overlap < tile_px:
        raise ValueError(f"the overlap must be at least 0 and smaller than the tile of {tile_px} px, got {overlap}")
    smallest = -(-overlap // size_multiple) * size_multiple + size_multiple
    return Tiles(max(tile_px // size_multiple * size_multiple, smallest), overlap, size_multiple)


def restore_padded(restore: Restore, image: Tensor, *, size_multiple: int, upscale: int) -> Tensor:
    """Pad on the right and bottom to the multiple, restore, cut back: any H and W in one piece."""
    height, width = image.shape[-2:]
    return restore(pad_to_multiple(image, size_multiple))[..., :height * upscale, :width * upscale]


def restore_tiled(restore: Restore, image: Tensor, *, tile_px: int, overlap_px: int | None = None,
                  size_multiple: int = 1, upscale: int = 1, share: Share | None = None) -> Tensor:
    """Restore an image in the tiles of `fit_tiles`, blended; a tile that covers the image is the whole image. `share`
    gives the tiles the same statistics of the map.

    Tiles lie on the grid of `size_multiple`, so a network that samples down sees the phase it would see in the whole
    image.
    """
    tiles = fit_tiles(tile_px, overlap_px=overlap_px, size_multiple=size_multiple)
    bands = restore_bands(restore, lambda rows, columns: image[..., rows[:, None], columns], height=image.shape[-2],
                          width=image.shape[-1], tiles=tiles, upscale=upscale, share=share)
    return torch.cat([rows for _, rows in bands], -2)


def restore_bands(restore: Restore, read: Read, *, height: int, width: int, tiles: Tiles,
                  upscale: int = 1, share: Share | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield the restored image from top to bottom as (first row, rows); one row of tiles is in memory at a time."""
    rows, columns = (_padded_indices(side, tiles.size_multiple) for side in (height, width))
    tops, lefts = tiles.starts(len(rows)), tiles.starts(len(columns))
    if len(tops) == len(lefts) == 1:
        yield 0, restore(read(rows, columns))[..., :height * upscale, :width * upscale]
        return
    if share is not None:
        restore = share(_Sample(read, rows, columns, tiles.tile_px))
    total, weights = torch.zeros(0), torch.zeros(0)  # of the rows that the band above left unfinished
    for top, following in zip(tops, [*tops[1:], len(rows)], strict=True):
        band = rows[top:top + tiles.tile_px]
        ramp = _ramp(len(band) * upscale, tiles.overlap_px * upscale, first=top == tops[0], last=top == tops[-1])
        for left in lefts:
            part = restore(read(band, columns[left:left + tiles.tile_px]))
            if left == 0:
                size = (len(band) * upscale, len(columns) * upscale)
                total = _extend(total, part.new_zeros(*part.shape[:2], *size))
                weights = _extend(weights, part.new_zeros(size))
            weight = (ramp[:, None] * _ramp(part.shape[-1], tiles.overlap_px * upscale, first=left == lefts[0],
                                            last=left == lefts[-1])).to(part)
            window = slice(left * upscale, left * upscale + part.shape[-1])
            total[..., window] += part * weight
            weights[:, window] += weight
        finished = (following - top) * upscale
        blended = total[..., :finished, :] / weights[:finished]
        # Copies: a view would keep the whole band.
        total, weights = total[..., finished:, :].clone(), weights[finished:].clone()
        yield top * upscale, blended[..., :(height - top) * upscale, :width * upscale]


@dataclass(frozen=True)
class _Sample:
    """Some tiles of an image, side by side and spread over all of it, whatever the overlap of those that restore it."""

    read: Read
    rows: Tensor
    columns: Tensor
    tile_px: int

    def __iter__(self) -> Iterator[Tensor]:
        side_by_side = Tiles(self.tile_px, 0, 1)
        corners = [(top, left) for top in side_by_side.starts(len(self.rows))
                   for left in side_by_side.starts(len(self.columns))]
        count = min(len(corners), _SAMPLED_TILES)
        for top, left in (corners[index * len(corners) // count] for index in range(count)):
            yield self.read(self.rows[top:top + self.tile_px], self.columns[left:left + self.tile_px])


def _padded_indices(side: int, multiple: int) -> Tensor:
    """Which pixel each place of a padded side shows: `pad_to_multiple` on the numbers of the pixels."""
    numbers = torch.arange(side, dtype=torch.float64).expand(1, 1, multiple, side)
    return pad_to_multiple(numbers, multiple)[0, 0, 0].long()


def _extend(unfinished: Tensor, band: Tensor) -> Tensor:
    """The rows that are unfinished on top of an empty band."""
    if unfinished.numel():
        band[..., :unfinished.shape[-2], :] = unfinished
    return band


def _ramp(side: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """1 in the middle, falling over the middle half of `overlap` at an end where another tile goes on.

    The outer quarter counts next to nothing, because a network sees the tile's edge there; not quite 0, because the
    weights are divided by.
    """
    distance = torch.arange(side) + 0.5
    fall = ((distance - overlap / 4) / max(overlap / 2, 1)).clamp(1e-6, 1)
    return (torch.ones(side) if first else fall) * (torch.ones(side) if last else fall.flip(0))


def _quietly(release: Callable[[], None]) -> None:
    with suppress(Exception):  # which may itself find no memory
        release()


def restore_within_memory(restore: Restore, read: Read, write: Write, *, height: int, width: int,
                          tiles: Tiles | None = None, size_multiple: int = 1, upscale: int = 1,
                          share: Share | None = None, release: Callable[[], None] = lambda: None,
                          on_event: Callable[[str], None] | None = None) -> None:
    """Restore in one piece (`tiles` None) or in tiles; where memory runs out, halve the tile, say so, start again.

    `write` gets every row, from the first one again after a start. `release` is called after every try: what the
    runtime keeps is neither there for a smaller tile nor for the next image. `on_event` gets one line each time. Raises
    MemoryError when a tile of 64 px, or the smallest that the size multiple allows, is still too much.
    """
    whole_px = -(-max(height, width) // size_multiple) * size_multiple
    if tiles is None or tiles.tile_px > whole_px:
        tiles = Tiles(whole_px, OVERLAP_PX if tiles is None else tiles.overlap_px, size_multiple)
    while True:
        try:
            with translating():
                for top, rows in restore_bands(restore, read, height=height, width=width, tiles=tiles, upscale=upscale,
                                               share=share):
                    write(top, rows)
            return
        except MemoryError as error:
            reason = first_line(error)
        finally:
            _quietly(release)
        # Outside the handler: the traceback held there keeps the tensors of the failed attempt alive.
        failed, tiles = tiles, tiles.halved() if tiles.tile_px >= 2 * SMALLEST_TILE_PX else tiles
        if tiles.tile_px >= failed.tile_px:
            raise MemoryError(f"out of memory even with tiles of {failed.tile_px} px ({reason})")
        if on_event is not None:
            on_event(f"out of memory: going on with tiles of {tiles.tile_px} px, overlapping by {tiles.overlap_px}")
