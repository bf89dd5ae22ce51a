"""Tiles: equal to the whole image away from seams, padding cut off exactly, smaller tiles when memory runs out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.runtime.tiling import is_out_of_memory, restore_padded, restore_tiled, restore_within_memory


def local(upscale: int = 1) -> nn.Module:
    """Two 3×3 convolutions: a pixel depends on two neighbours each way."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3 * upscale**2, 3, padding=1),
                         nn.PixelShuffle(upscale)).requires_grad_(False)


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

    restored = restore_within_memory(triple, image, tile_px=tile, overlap_px=8, size_multiple=8, upscale=3)
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
    restored = restore_within_memory(Small(100 * 100), image, tile_px=tile, on_event=said.append)
    assert torch.allclose(restored, image, atol=1e-6)
    assert ["tiles of 150 px" in said[0], "tiles of 75 px" in said[1], len(said)] == [True, True, 2]


def test_too_little_memory_for_any_tile_is_an_error() -> None:
    with pytest.raises(MemoryError, match="even with tiles"):
        restore_within_memory(Small(10), torch.rand(1, 3, 200, 300))


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    def fail(image: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        restore_within_memory(fail, torch.rand(1, 3, 200, 300))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("Failed to allocate memory for requested buffer of size 9"))


@pytest.mark.parametrize(("tile", "overlap", "multiple"), [(128, 32, 128), (64, 32, 48), (40, 8, 64), (96, 95, 32)])
def test_tiles_overlap_as_asked_however_coarse_the_grid(tile: int, overlap: int, multiple: int) -> None:
    """Every inner border of a tile is covered by a neighbour over the whole overlap; the tile says that it grew."""
    seen: list[tuple[int, int]] = []
    said: list[str] = []
    image = torch.arange(20 * multiple, dtype=torch.float32).expand(1, 1, multiple, -1)

    def record(part: Tensor) -> Tensor:
        seen.append((int(part[0, 0, 0, 0]), int(part[0, 0, 0, -1]) + 1))
        return part

    restored = restore_within_memory(record, image, tile_px=tile, overlap_px=overlap, size_multiple=multiple,
                                     on_event=said.append)
    torch.testing.assert_close(restored, image)
    assert all(left[1] - right[0] >= overlap and right[0] % multiple == 0
               for left, right in itertools.pairwise(sorted(seen)))
    width = seen[0][1] - seen[0][0]
    assert said == ([f"tiles of {width} px instead of {tile}: they start at multiples of {multiple} px and overlap by "
                     f"{overlap}"] if width > tile else [])
