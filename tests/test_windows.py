"""Windows: split and joined, and the offsets between their pixels."""

from __future__ import annotations

import torch

from ens.blocks.windows import join_windows, relative_positions, separate_regions, split_windows


def test_windows_split_and_join() -> None:
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    windows = split_windows(x, (2, 3))
    assert torch.equal(windows[1], x[0, :2, 3:6].reshape(6, 3))
    assert torch.equal(join_windows(windows, (2, 3), x.shape), x)


def test_every_offset_has_a_number_of_its_own() -> None:
    rows, columns = 2, 3
    index = relative_positions((rows, columns))
    offsets = [(y, x) for y in range(1 - rows, rows) for x in range(1 - columns, columns)]
    for i in range(rows * columns):
        for j in range(rows * columns):
            assert offsets[int(index[i, j])] == (i // columns - j // columns, i % columns - j % columns)


def test_pixels_from_opposite_borders_are_kept_apart() -> None:
    """Apart are those of a window that lie elsewhere to each other than they did before the shift."""
    before = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij"), -1)[None]
    pixels = split_windows(before.roll((-1, -2), (1, 2)), (4, 4))
    places = split_windows(before, (4, 4))
    moved = (pixels[:, :, None] - pixels[:, None] != places[:, :, None] - places[:, None]).any(-1)
    mask = separate_regions(torch.zeros(1, 4, 8, 1), (4, 4), (1, 2))
    assert torch.equal(mask == -100, moved) and set(mask.unique().tolist()) == {-100, 0}
