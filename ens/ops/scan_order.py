"""Pixel orders of an image as index permutations, and their inverses.

An order is a (L,) int64 tensor: `order[t]` is the row-major number of the pixel visited at step t, L = height·width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def row_order(height: int, width: int) -> Tensor:
    """Row after row, left to right."""
    return torch.arange(height * width)


def column_order(height: int, width: int) -> Tensor:
    """Column after column, top to bottom."""
    return torch.arange(height * width).view(height, width).T.reshape(-1)


ORDERS: dict[str, Callable[[int, int], Tensor]] = {"row": row_order, "column": column_order}

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


def invert_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: `x[..., order][..., invert_order(order)]` is x."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse
