"""Tiles that share the statistics of the map: what the whole image gives, in every runtime, for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import OneSlot
from torch import Tensor, nn

from ens.blocks import FAMILIES
from ens.data.images import Photo
from ens.export.formats import write_checked
from ens.export.statistics import other_size, share_in_torch
from ens.runtime.session import Session, open_session, restore_photo

WITH_STATISTICS = ("restormer", "dat", "vssd", "conv", "half", "rlmb")


def two_scenes(height: int = 128, width: int = 256) -> Tensor:
    """Faint noise on the left, strong one on the right: no tile has the statistics of the image."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, height, width, generator=generator)
    return noise * torch.linspace(0.1, 1, width).square()


def in_torch(network: Callable[[Tensor], Tensor], multiple: int = 1) -> Session:
    def run(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(image)
    return Session(run, multiple, 1, 3, {}, share=share_in_torch(run, multiple, 3))


class Pointwise(nn.Module):
    """No reach but its statistics: a mean over the map, then the second moment of what that leaves."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean((2, 3), keepdim=True)
        flat = x.flatten(2)
        return x * 2 + (flat @ flat.mT / flat.shape[-1]).sum(-1)[..., None, None]


def test_tiles_that_share_give_what_the_whole_image_gives_where_nothing_else_reaches() -> None:
    """Means over tiles side by side are those over the image, the second statistic in the second pass."""
    image, session = two_scenes(), in_torch(Pointwise())
    whole = session.restore(image)
    assert torch.allclose(session.tiled(64, 16).restore(image), whole, atol=1e-6)
    own = replace(session, share=None)
    assert (own.tiled(64, 16).restore(image) - whole).abs().max() > 0.1
    parts = [session.tiled(32, overlap).restore(image) for overlap in (0, 8, 16)]  # sixteen of 32 tiles are read
    assert all(torch.allclose(part, parts[0], atol=1e-5) for part in parts)
    assert (parts[0] - whole).abs().max() < 0.2 * (own.tiled(32, 8).restore(image) - whole).abs().max()


@pytest.mark.parametrize("family", [pytest.param(family, marks=() if family in ("restormer", "conv", "rep") else
                                                 pytest.mark.slow) for family in FAMILIES])
def test_every_family_s_tiles_share_what_they_have(tmp_path: Path, family: str) -> None:
    """PyTorch and ONNX Runtime, in which statistics are found in different ways, restore the same; sharing changes
    those families alone that are known to have any, and brings them nearer to the whole image.
    """
    torch.manual_seed(0)
    network, image = OneSlot(family).eval(), two_scenes()
    session = in_torch(network.restore, 2)
    whole = session.restore(image)
    own, shared = (one.tiled(64, 24).restore(image) for one in (replace(session, share=None), session))
    assert torch.equal(own, shared) == (family not in WITH_STATISTICS)
    if family in (*WITH_STATISTICS, "rep"):  # an export takes seconds
        write_checked(network, tmp_path / "net.onnx", photo=image)
        exported = open_session(tmp_path / "net.onnx", threads=1).tiled(64, 24).restore(image)
        assert (exported - shared).norm() <= 1e-4 * shared.norm()
    if family in WITH_STATISTICS:
        # What a window of `dat` sees depends on where the tile begins, which is most of its difference.
        assert (shared - whole).norm() < (1 if family == "dat" else 0.5) * (own - whole).norm()


@pytest.mark.parametrize(("name", "runtime"), [("net.onnx", "openvino"), ("net.pt2", "")])
def test_the_other_runtimes_share_too(tmp_path: Path, name: str, runtime: str) -> None:
    torch.manual_seed(0)
    network, image = OneSlot("conv").eval(), two_scenes()
    write_checked(network, tmp_path / name, photo=image)
    got = open_session(tmp_path / name, runtime=runtime).tiled(64, 24).restore(image)
    expected = in_torch(network.restore, 2).tiled(64, 24).restore(image)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_files_of_a_fixed_size_and_networks_whose_steps_depend_on_the_size_keep_each_tile_s_own(tmp_path: Path) -> None:
    network, image = OneSlot("conv").eval(), two_scenes()
    write_checked(network, tmp_path / "net.onnx", photo=image, size=(64, 64))
    session = open_session(tmp_path / "net.onnx", threads=1)
    own = replace(in_torch(network.restore, 2), share=None).tiled(64, 24).restore(image)
    assert (session.restore(image) - own).norm() > 0 and session.share is None

    def by_rows(x: Tensor) -> Tensor:
        return torch.cat([row - row.mean() for row in x.split(8, -2)], -2)

    rows = in_torch(by_rows)
    assert torch.equal(rows.tiled(64, 24).restore(image), replace(rows, share=None).tiled(64, 24).restore(image))


def test_a_network_that_takes_the_tile_s_size_alone_still_restores_in_tiles() -> None:
    def picky(x: Tensor) -> Tensor:
        if x.shape[-1] != 96:
            raise RuntimeError("96 px, please")
        return x - x.mean((2, 3), keepdim=True)

    session, image = in_torch(picky), two_scenes()
    assert torch.equal(session.tiled(96, 8).restore(image), replace(session, share=None).tiled(96, 8).restore(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gray_network_shares_by_colour(channels: int) -> None:
    """Each colour is restored as a photo of that colour alone is."""
    def run(image: Tensor) -> Tensor:
        return (image - image.mean((2, 3), keepdim=True)).abs()

    session = Session(run, 1, 1, 1, {}, share=share_in_torch(run, 1, 1))
    pixels = (two_scenes()[0].permute(1, 2, 0).numpy() * 65535).astype(np.uint16)[..., :channels]
    together = restore_photo(session, Photo(pixels), tile_px=64).pixels
    alone = [restore_photo(session, Photo(pixels[..., [colour]]), tile_px=64).pixels for colour in range(channels)]
    whole = restore_photo(session, Photo(pixels)).pixels
    assert np.array_equal(together, np.concatenate(alone, -1)) and np.abs(together.astype(int) - whole).max() <= 1


@pytest.mark.parametrize(("tile", "multiple"), [((256, 64), 8), ((250, 32), 2), ((96, 97), 1), ((120, 192), 24)])
def test_the_other_size_is_padded_as_the_tile_is(tile: tuple[int, int], multiple: int) -> None:
    for side, other in zip(tile, other_size(tile, multiple), strict=True):
        assert other != side and other % multiple == 0 and (other - side) % 64 == 0
