from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ens.blocks import create_stack
from ens.blocks.uformer import UformerBlock, WindowAttention
from ens.networks import create_network
from ens.networks.uformer import Uformer


@pytest.mark.parametrize(("options", "millions"), [
    ({"embed_dim": 16, "modulator": False}, 5.23), ({"embed_dim": 32, "modulator": False}, 20.63),
    ({"embed_dim": 32, "depths": (1, 2, 8, 8, 2, 8, 8, 2, 1), "modulator": True}, 50.88)])
def test_parameter_counts_are_the_published_ones(options: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        network = Uformer(**options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def make_tiny(**options: Any) -> Uformer:
    torch.manual_seed(0)
    network = create_network("uformer", embed_dim=4, depths=(1, 2, 1, 1, 1, 1, 1, 2, 1), num_heads=(1,) * 9, win_size=2,
                             **options)
    assert isinstance(network, Uformer)
    return network.eval()


@pytest.mark.parametrize("modulator", [True, False])
def test_the_run_can_be_cut_anywhere_and_slots_can_be_filled(modulator: bool) -> None:
    network, image = make_tiny(modulator=modulator), torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        whole = network.restore(image)
        assert whole.shape == image.shape
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
        captured = network.capture(image, [spec.name for spec in network.slots])
        for spec in network.slots:
            given, out = captured[spec.name]
            assert given.shape == out.shape == (1, spec.channels, 32 // spec.downscale, 64 // spec.downscale)
            network.fill(spec.name, create_stack("conv", spec.channels, 1))
        assert network(torch.rand(1, 3, 13, 7)).shape == (1, 3, 13, 7)


def attend_slowly(attention: WindowAttention, window: Tensor, size: int) -> Tensor:
    """One window, pixel by pixel, from the definition."""
    q, k, v = attention.qkv(window).chunk(3, -1)
    width = q.shape[-1] // attention.heads
    out = torch.zeros_like(window)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(size**2):
            scores = []
            for j in range(size**2):
                dy, dx = i // size - j // size + size - 1, i % size - j % size + size - 1
                bias = attention.relative_position_bias_table[dy * (2 * size - 1) + dx, head]
                scores.append(q[i, part] @ k[j, part] / width**0.5 + bias)
            out[i, part] = torch.softmax(torch.stack(scores), 0) @ v[:, part]
    return attention.proj(out)


def test_window_attention_equals_its_definition() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(6, heads=2, window=3)
    nn.init.normal_(attention.relative_position_bias_table)
    windows = torch.randn(2, 9, 6)
    expected = torch.stack([attend_slowly(attention, window, 3) for window in windows])
    assert torch.allclose(attention(windows, None), expected, atol=1e-5)


def reached(block: UformerBlock, pixel: tuple[int, int]) -> Tensor:
    """(H, W) bool: which pixels of the attention's output a change of this pixel moves."""
    x = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[(0, *pixel)] += torch.randn(4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (block._attend(x) - block._attend(changed)).abs().sum((0, 3)) > 1e-12


def test_shifted_windows_join_neighbours_but_not_opposite_borders() -> None:
    plain = reached(UformerBlock(4, window=4), (0, 0))
    assert plain[:4, :4].all() and plain.sum() == 16
    shifted = UformerBlock(4, window=4, index=1)
    corner, middle = reached(shifted, (0, 0)), reached(shifted, (3, 3))
    assert corner[:2, :2].all() and corner.sum() == 4
    assert middle[2:6, 2:6].all() and middle.sum() == 16


def test_a_row_alternates_between_plain_and_shifted_windows() -> None:
    assert [block.offset for block in create_stack("uformer", 8, 3, heads=2)] == [0, 4, 0]
    assert [block.offset for block in create_stack("uformer", 8, 2, options={"shift": False})] == [0, 0]


def test_modulator_tells_pixels_of_a_window_apart() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 4, 4, 4)
    with torch.no_grad():
        assert UformerBlock(4, window=4)._attend(x.permute(0, 2, 3, 1)).std((1, 2)).max() < 1e-6
        block = UformerBlock(4, window=4, modulator=True)
        nn.init.normal_(block.attn.relative_position_bias_table)
        assert block._attend(x.permute(0, 2, 3, 1)).std((1, 2)).max() > 1e-6


def test_wrong_sizes_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="nine entries"):
        Uformer(depths=(2, 2))
    with pytest.raises(ValueError, match="multiple of heads"):
        UformerBlock(6, heads=4)
