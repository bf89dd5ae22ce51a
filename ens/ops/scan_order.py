"""Pixel orders of an image as index permutations, and their inverses.

An order is a (L,) int64 tensor: `order[t]` is the row-major number of the pixel visited at step t, L = height·width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def row_order(height: int, width: int) -> Tensor:
    """Row after row, left to right."""
    return torch.arange(height * width)


def column_order(height: int, width: int) -> Tensor:
    """Column after column, top to bottom."""
    return torch.arange(height * width).view(height, width).T.reshape(-1)


ORDERS: dict[str, Callable[[int, int], Tensor]] = {"row": row_order, "column": column_order}

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

FOUR_DIRECTIONS = ("row", "column", "row_reversed", "column_reversed")
"""VMamba's order of the four directions (arXiv 2401.10166)."""


def scan_order(name: str, height: int, width: int) -> Tensor:
    """The named order; `_reversed` behind a name runs it backwards.

    Raises KeyError for an unknown name and ValueError for an empty image, saying what is allowed.
    """
    base = name.removesuffix("_reversed")
    if base not in ORDERS:
        raise KeyError(f"no scan order {name!r}; allowed: {', '.join(ORDERS)}, each also with _reversed")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    order = ORDERS[base](height, width)
    return order if base == name else order.flip(0)


def to_indices(order: Tensor) -> Tensor:
    """The order as int64, which PyTorch indexes with; raises ValueError where it does not hold integers."""
    if order.ndim == 0 or order.dtype not in _INTEGERS:
        raise ValueError(f"an order holds integers, L a row, got {order.dtype} of shape {tuple(order.shape)}")
    return order if order.dtype == torch.int64 else order.long()


def check_order(order: Tensor) -> None:
    """Raise ValueError unless every row of an integer (…, L) tensor is a permutation of 0 to L - 1.

    While PyTorch traces there are no values, so only the type is looked at.
    """
    order = to_indices(order)
    if torch.compiler.is_compiling() or order.is_meta or order.numel() == 0:
        return
    rule = f"every row of an order is a permutation of 0 to {order.shape[-1] - 1}"
    # On the CPU, where an index out of range is an error like others.
    try:
        seen = torch.zeros(order.shape, dtype=torch.uint8).scatter_(-1, order.cpu(), 1)
    except RuntimeError:
        raise ValueError(f"{rule}, got numbers from {int(order.min())} to {int(order.max())}") from None
    if not seen.all():
        raise ValueError(f"{rule}, got a row without {int((seen == 0).nonzero()[0, -1])}")


def invert_order(order: Tensor) -> Tensor:
    """The int64 permutations that undo those in the rows of `order` (…, L): `x[..., row][..., inverse]` is x.

    Raises ValueError for what is no permutation.
    """
    check_order(order)
    index = to_indices(order)
    steps = torch.arange(order.shape[-1], device=order.device).expand_as(index)
    return torch.empty_like(index).scatter(-1, index, steps)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """x (B, G, D, L) with the tokens of each group g in the order of row g of `order`, int64 (G, L)."""
    return x.gather(-1, order[:, None].expand_as(x))


def window_order(height: int, width: int, window: int, *, vertical: bool = False) -> Tensor:
    """Window after window, row-major inside; `vertical`: windows column after column, column-major inside.

    Windows at the right and bottom border may be cut off. Source: MambaCSR, arXiv 2408.11758 (`w8`, `c_w8`, …).
    """
    rows, columns = -(-height // window), -(-width // window)
    grid = torch.arange(height * width).view(height, width)
    if (rows * window, columns * window) != (height, width):
        grid = F.pad(grid, (0, columns * window - width, 0, rows * window - height), value=-1)
    grid = grid.view(rows, window, columns, window)
    order = grid.permute(2, 0, 3, 1).reshape(-1) if vertical else grid.permute(0, 2, 1, 3).reshape(-1)
    return order if order.numel() == height * width else order[order >= 0]


def cross_scale_order(height: int, width: int, window: int, *, vertical: bool = False,
                      reverse: bool = False) -> Tensor:
    """Order over the pixels of an image and of its half-size image: each small pixel, then the four under it.

    Numbers below height·width are image pixels, those above are small pixels, both row-major. The image is visited in
    windows, in 2×2 cells inside a window, row-major at every level, or column-major where `vertical`. `reverse` turns
    both streams round before they are interleaved, so a small pixel still precedes its four (MambaCSR, section 3.3).
    Raises ValueError where height or width is not a multiple of the window, or the window is odd.
    """
    if window % 2 or height % window or width % window:
        raise ValueError(f"height {height} and width {width} must be multiples of the window {window}, which is even")
    half = window // 2
    cells = torch.arange(height * width).view(height // window, half, 2, width // window, half, 2)
    # Height and width trade places at every level. The released code keeps the outer grid's height first when it
    # undoes the vertical orders, so it is wrong for images that are not square; an index has no such inverse.
    fine = cells.permute(3, 0, 4, 1, 5, 2) if vertical else cells.permute(0, 3, 1, 4, 2, 5)
    coarse = height * width + window_order(height // 2, width // 2, half, vertical=vertical)
    fine = fine.reshape(-1)
    if reverse:
        fine, coarse = fine.flip(0), coarse.flip(0)
    return torch.cat([coarse[:, None], fine.view(-1, 4)], 1).reshape(-1)
