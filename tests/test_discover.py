"""Discovery: what of a network may be a slot, and which set is proposed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ens.networks.discover import Candidate, discover_slots, propose_slots
from ens.networks.wrap import frame_network


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class UNet(nn.Module):
    """Stages of two blocks at two scales, one block alone below them, a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.encoder, self.decoder = (nn.Sequential(Block(8), Block(8)) for _ in range(2))
        self.down, self.up = nn.Conv2d(8, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.latent, self.shared, self.unused = Block(16), Block(16), Block(16)

    def forward(self, image: Tensor) -> tuple[int, Tensor]:
        skip = self.encoder(self.stem(image))
        x = self.shared(self.shared(self.latent(self.down(skip))))
        return 7, image + self.head(self.decoder(self.up(x) + skip))


class Enlarging(nn.Module):
    """Blocks in groups, which are the outermost that repeat; twice as large at the end, windows of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.groups = nn.ModuleList(nn.Sequential(Block(8), Block(8), nn.Conv2d(8, 8, 1)) for _ in range(3))
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.PixelShuffle(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x.unflatten(2, (-1, 8)).flatten(2, 3).unflatten(3, (-1, 8)).flatten(3, 4)
        for group in self.groups:
            x = group(x)
        return self.head(x)


def test_the_outermost_repeated_blocks_are_proposed_and_each_refusal_has_a_reason() -> None:
    found = discover_slots(UNet(), output=1, side_px=32)
    assert found.slots == ("encoder", "latent", "decoder") and (found.upscale, found.size_multiple) == (1, 2)
    by_name = {one.name: one for one in found.candidates}
    assert "unused" not in by_name and by_name["shared"].reason == "is called 2 times"
    assert by_name["down"].reason == "changes the shape, (1, 8, 32, 48) to (1, 16, 16, 24)"
    assert [(by_name[name].channels, by_name[name].downscale) for name in found.slots] == [(8, 1), (16, 2), (8, 1)]
    assert frame_network(UNet(), slots=found.slots, output=1, size_multiple=found.size_multiple).slots


def test_what_is_proposed_can_be_framed_and_sizes_are_found() -> None:
    found = discover_slots(Enlarging(), in_channels=1, side_px=32)
    assert found.slots == ("groups.0", "groups.1", "groups.2")
    assert (found.upscale, found.size_multiple) == (2, 8) and 0.5 < found.coverage < 1
    network = frame_network(Enlarging(), slots=found.slots, in_channels=1, upscale=2, size_multiple=8)
    assert network(torch.rand(1, 1, 11, 9)).shape == (1, 1, 22, 18)


def test_shares_of_multiply_adds_are_those_of_the_formulas() -> None:
    found = {one.name: one for one in discover_slots(UNet(), output=1, side_px=32).candidates}
    block = 8 * 8 * 9
    whole = 3 * 8 * 9 + 4 * block + 2 * (8 * 16) + 3 * 16 * 16 * 9 / 4 + 8 * 3
    assert found["encoder"].macs == pytest.approx(2 * block / whole)
    assert found["encoder"].params == 2 * (block + 8 + 16)
    assert found["encoder"].time >= found["encoder.0"].time


def candidate(name: str, kind: str, time: float, **others: bool | str) -> Candidate:
    known = {"is_layer": False, "reason": "", **others}
    return Candidate(name, kind, bool(known["is_layer"]), 1, "map", 8, 1, 1, time, time, str(known["reason"]))


@pytest.mark.parametrize(("candidates", "slots"), [
    ([candidate("a", "Group", 0.5), candidate("a.0", "Block", 0.5), candidate("b", "Group", 0.45)], ("a", "b")),
    ([candidate("a", "Group", 0.95), candidate("a.0", "Block", 0.45), candidate("a.1", "Block", 0.5)], ("a.0", "a.1")),
    ([candidate("a", "Group", 0.5), candidate("b", "Block", 0.2), candidate("c", "Block", 0.2)], ("a", "b", "c")),
    ([candidate("a", "Conv2d", 0.6, is_layer=True), candidate("b", "ReLU", 0.005, is_layer=True)], ("a",)),
    ([candidate("a", "Group", 0.5), candidate("b", "Group", 0.45, reason="is called 2 times"),
      candidate("b.0", "Block", 0.4)], ("a", "b.0"))])
def test_slots_never_overlap_and_cover_what_they_can(candidates: Sequence[Candidate], slots: tuple[str, ...]) -> None:
    assert propose_slots(candidates, [one.name for one in candidates]) == slots


def test_a_module_that_gives_no_image_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"no size of image runs .* a tuple of 2; say as `output`"):
        discover_slots(UNet())
    with pytest.raises(ValueError, match=r"no size of image runs .* it makes \d+×\d+ of"):
        discover_slots(nn.Sequential(nn.Conv2d(3, 3, 5)))
