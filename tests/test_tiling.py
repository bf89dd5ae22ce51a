"""Tiles: equal to the whole image away from seams, padding cut off exactly, smaller tiles when memory runs out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.networks.steps import pad_to_multiple
from ens.runtime.tiling import (
    Restore,
    fit_tiles,
    restore_bands,
    restore_padded,
    restore_tiled,
    restore_within_memory,
)


def local(upscale: int = 1) -> nn.Module:
    """Two 3×3 convolutions: a pixel depends on two neighbours each way."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3 * upscale**2, 3, padding=1),
                         nn.PixelShuffle(upscale)).requires_grad_(False)


def within_memory(restore: Restore, image: Tensor, *, tile_px: int | None = None, overlap_px: int | None = None,
                  size_multiple: int = 1, upscale: int = 1, said: list[str] | None = None) -> Tensor:
    """`restore_within_memory` from a tensor into a tensor, each row of which was written last at the last start."""
    height, width = image.shape[-2:]
    restored = torch.full((*image.shape[:2], height * upscale, width * upscale), torch.nan)
    tiles = None if tile_px is None else fit_tiles(tile_px, overlap_px=overlap_px, size_multiple=size_multiple)

    def write(top: int, rows: Tensor) -> None:
        restored[..., top:top + rows.shape[-2], :] = rows

    restore_within_memory(restore, lambda rows, columns: image[..., rows[:, None], columns], write, height=height,
                          width=width, tiles=tiles, size_multiple=size_multiple, upscale=upscale,
                          on_event=None if said is None else said.append)
    return restored


def blend_in_whole_buffers(restore: Restore, image: Tensor, *, tile: int, overlap: int, multiple: int,
                           upscale: int) -> Tensor:
    """Every tile of the padded image added into one buffer, divided by the sum of the weights, from the definition."""
    height, width = image.shape[-2:]
    padded = pad_to_multiple(image, multiple)
    tiles = fit_tiles(tile, overlap_px=overlap, size_multiple=multiple)
    rows, columns = (tiles.starts(side) for side in padded.shape[-2:])
    total = torch.zeros(*image.shape[:2], *(side * upscale for side in padded.shape[-2:]))
    weights = torch.zeros_like(total[0, 0])

    def ramp(side: int, first: bool, last: bool) -> Tensor:
        fall = ((torch.arange(side) + 0.5 - overlap * upscale / 4) / max(overlap * upscale / 2, 1)).clamp(1e-6, 1)
        return (torch.ones(side) if first else fall) * (torch.ones(side) if last else fall.flip(0))

    for top in rows:
        for left in columns:
            part = restore(padded[..., top:top + tiles.tile_px, left:left + tiles.tile_px])
            weight = (ramp(part.shape[-2], top == rows[0], top == rows[-1])[:, None]
                      * ramp(part.shape[-1], left == columns[0], left == columns[-1]))
            y, x = (slice(at * upscale, at * upscale + side)
                    for at, side in zip((top, left), part.shape[-2:], strict=True))
            total[..., y, x] += part * weight
            weights[y, x] += weight
    return (total / weights)[..., :height * upscale, :width * upscale]


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize(("multiple", "overlap"), [(1, 9), (8, 12), (8, 20), (16, 0)])
@pytest.mark.parametrize("size", [(70, 97), (33, 130), (131, 20), (2, 75)])
def test_bands_equal_whole_buffers_bit_for_bit(size: tuple[int, int], multiple: int, overlap: int,
                                               upscale: int) -> None:
    image, network = torch.rand(2, 3, *size), local(upscale)
    tiles = fit_tiles(32, overlap_px=overlap, size_multiple=multiple)
    bands = list(restore_bands(network, lambda rows, columns: image[..., rows[:, None], columns], height=size[0],
                               width=size[1], tiles=tiles, upscale=upscale))
    expected = blend_in_whole_buffers(network, image, tile=32, overlap=overlap, multiple=multiple, upscale=upscale)
    assert torch.equal(torch.cat([rows for _, rows in bands], -2), expected)
    heights = [rows.shape[-2] for _, rows in bands]
    assert [top for top, _ in bands] == [sum(heights[:index]) for index in range(len(bands))]
    assert max(heights) <= tiles.tile_px * upscale


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("size", [(70, 97), (64, 40), (33, 130)])
def test_tiled_equals_whole_away_from_seams(size: tuple[int, int], multiple: int, upscale: int) -> None:
    image, network = torch.rand(1, 3, *size), local(upscale)
    whole = restore_padded(network, image, size_multiple=multiple, upscale=upscale)
    tiled = restore_tiled(network, image, tile_px=32, overlap_px=8, size_multiple=multiple, upscale=upscale)
    assert tiled.shape == whole.shape == (1, 3, size[0] * upscale, size[1] * upscale)
    # Two pixels beside a tile's own edge are wrong there: the quarter of the overlap that the blend leaves out.
    assert torch.allclose(tiled, whole, atol=1e-5)
    narrow = restore_tiled(network, image, tile_px=32, overlap_px=2, size_multiple=multiple, upscale=upscale)
    assert not torch.allclose(narrow, whole, atol=1e-5)


@pytest.mark.parametrize("overlap", [0, 1, 8, 31])
def test_blending_a_pointwise_network_changes_nothing(overlap: int) -> None:
    image = torch.rand(1, 3, 75, 50)
    tiled = restore_tiled(lambda x: 2 * x, image, tile_px=32, overlap_px=overlap)
    assert torch.allclose(tiled, 2 * image, atol=1e-6)


def test_every_tile_has_the_asked_size_and_lies_on_the_grid() -> None:
    rows, columns = torch.meshgrid(torch.arange(104.0), torch.arange(88.0), indexing="ij")
    seen: list[tuple[int, ...]] = []

    def note(tile: Tensor) -> Tensor:
        seen.append((*tile.shape[-2:], int(tile[0, 0, 0, 0]) % 8, int(tile[0, 1, 0, 0]) % 8))
        return tile

    restore_tiled(note, torch.stack([rows, columns])[None], tile_px=45, overlap_px=10, size_multiple=8)
    assert set(seen) == {(40, 40, 0, 0)} and len(seen) == 12


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 7), (17, 64)])
@pytest.mark.parametrize("tile", [None, 16])
def test_padding_is_removed_exactly(size: tuple[int, int], tile: int | None) -> None:
    image = torch.rand(1, 3, *size)

    def triple(x: Tensor) -> Tensor:
        assert x.shape[-2] % 8 == x.shape[-1] % 8 == 0
        return F.interpolate(x, scale_factor=3, mode="nearest")

    restored = within_memory(triple, image, tile_px=tile, overlap_px=8, size_multiple=8, upscale=3)
    assert torch.allclose(restored, F.interpolate(image, scale_factor=3, mode="nearest"), atol=1e-6)


def test_an_overlap_as_large_as_the_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than the tile of 32 px, got 32"):
        restore_tiled(nn.Identity(), torch.rand(1, 3, 64, 64), tile_px=32, overlap_px=32)


class Small:
    """Memory for images of so many pixels; beyond that it fails as PyTorch's CPU allocator does."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, image: Tensor) -> Tensor:
        if image.shape[-1] * image.shape[-2] > self.pixels:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return image


@pytest.mark.parametrize("tile", [None, 300])
def test_tiles_are_halved_until_they_fit_and_it_is_said(tile: int | None) -> None:
    image, said = torch.rand(1, 3, 200, 300), list[str]()
    restored = within_memory(Small(100 * 100), image, tile_px=tile, said=said)
    assert torch.allclose(restored, image, atol=1e-6)
    assert ["tiles of 150 px" in said[0], "tiles of 75 px" in said[1], len(said)] == [True, True, 2]


def test_too_little_memory_for_any_tile_is_an_error() -> None:
    with pytest.raises(MemoryError, match="even with tiles"):
        within_memory(Small(10), torch.rand(1, 3, 200, 300))


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    def fail(image: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(fail, torch.rand(1, 3, 200, 300))


@pytest.mark.parametrize(("tile", "overlap", "multiple"), [(128, 32, 128), (64, 32, 48), (40, 8, 64), (96, 95, 32)])
def test_tiles_overlap_as_asked_however_coarse_the_grid(tile: int, overlap: int, multiple: int) -> None:
    """Every inner border of a tile is covered by a neighbour over the whole overlap."""
    seen: list[tuple[int, int]] = []
    image = torch.arange(20 * multiple, dtype=torch.float32).expand(1, 1, multiple, -1)

    def record(part: Tensor) -> Tensor:
        seen.append((int(part[0, 0, 0, 0]), int(part[0, 0, 0, -1]) + 1))
        return part

    restored = within_memory(record, image, tile_px=tile, overlap_px=overlap, size_multiple=multiple)
    torch.testing.assert_close(restored, image)
    assert all(left[1] - right[0] >= overlap and right[0] % multiple == 0
               for left, right in itertools.pairwise(sorted(seen)))


@pytest.mark.parametrize(("multiple", "tile"), [(1, 300), (48, 150), (128, 2000), (100, 700), (128, None)])
def test_every_try_has_a_smaller_tile_than_the_one_that_failed(multiple: int, tile: int | None) -> None:
    """On a coarse grid half a tile grows again to let tiles overlap: what does not shrink is not tried."""
    tried, said, image = list[int](), list[str](), torch.rand(1, 3, 1000, 1100)

    def fail(part: Tensor) -> Tensor:
        tried.append(max(part.shape[-2:]))
        raise MemoryError

    with pytest.raises(MemoryError, match=r"even with tiles of \d+ px") as failure:
        within_memory(fail, image, tile_px=tile, size_multiple=multiple, said=said)
    assert tried == sorted(set(tried), reverse=True) and all(side % multiple == 0 for side in tried)
    assert [f"tiles of {side} px" in line for side, line in zip(tried[1:], said, strict=True)] == [True] * len(said)
    assert f"tiles of {tried[-1]} px" in str(failure.value)


@pytest.mark.parametrize(("tile", "overlap"), [(16, 4), (63, 15), (64, 16), (256, 64), (512, 64)])
def test_a_small_tile_has_a_smaller_overlap_unless_one_is_given(tile: int, overlap: int) -> None:
    assert fit_tiles(tile).overlap_px == overlap and fit_tiles(tile, overlap_px=3).overlap_px == 3
