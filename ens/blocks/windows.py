"""Windows of a map, plain or shifted, for attention inside them.

Shapes: x (B, H, W, C), windows (W·B, N, C) with N pixels each, those of one image row by row; sizes (height, width).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ens.blocks.sides import is_known

Size = tuple[int, int]


def split_windows(x: Tensor, window: Size) -> Tensor:
    """(B, H, W, C) -> (B·H·W/N, N, C), H and W multiples of the window."""
    batch, height, width, channels = x.shape
    rows, columns = window
    # Rank 4 all the way, which edge runtimes need: a row of windows is an image of its own.
    x = x.reshape(batch * (height // rows), rows, width // columns, columns * channels)
    return x.transpose(1, 2).reshape(-1, rows * columns, channels)


def join_windows(windows: Tensor, window: Size, shape: torch.Size) -> Tensor:
    """Inverse of split_windows for a map of this shape; the channels may be others than there."""
    (batch, height, width, _), channels = shape, windows.shape[-1]
    rows, columns = window
    x = windows.view(batch * (height // rows), width // columns, rows, columns * channels)
    return x.transpose(1, 2).reshape(batch, height, width, channels)


def separate_regions(x: Tensor, window: Size, offset: Size) -> Tensor:
    """−100 between pixels that a shift by `offset` has brought into one window from opposite borders: (W, N, N)."""
    regions = []
    for side, size, shift in zip(x.shape[1:3], window, offset, strict=True):
        at = torch.arange(side, device=x.device)
        regions.append((at >= side - size).int() + (at >= side - shift).int())
    region = split_windows((3 * regions[0][:, None] + regions[1])[None, ..., None], window)[..., 0]
    return (region[:, None] != region[:, :, None]).to(x.dtype) * -100.0


def add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """scores (W·B, heads, N, N) + mask (W, N, N), the same for every image and head."""
    return (scores.view(-1, *mask.shape[:1], *scores.shape[1:]) + mask[:, None]).view(scores.shape)


def relative_positions(window: Size, device: torch.device | None = None) -> Tensor:
    """Number of the offset between two pixels of a window, row by row from the smallest: (N, N) indices."""
    rows, columns = window
    at = torch.arange(rows * columns, device=device)
    y, x = at // columns, at % columns
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1


def run_padded(attend: Callable[[Tensor], Tensor], x: Tensor, multiple: int) -> Tensor:
    """`attend` on x (B, H, W, C) with zeros at the right and bottom up to multiples, cut back to H and W."""
    height, width = x.shape[1:3]
    if all(is_known(side % multiple == 0) for side in (height, width)):
        return attend(x)
    # Whole windows less the side, not a remainder: what a tracer then has is a multiple of the window in its eyes.
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in (height, width))
    return attend(F.pad(x, (0, 0, 0, right, 0, bottom)))[:, :height, :width]
