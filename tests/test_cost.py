"""Counted cost: by hand, the same on every machine, and additive over the slots on the maps that really run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ens.ops.scan_op
from ens.blocks import FAMILIES, create_stack
from ens.evaluate.cost import build_cost_table, count_cost
from ens.networks import create_network, wrap
from ens.networks.slots import build_space
from ens.networks.steps import Network, create_filling
from ens.networks.wrap import wrap_network
from ens.ops.selective_scan import selective_scan
from ens.ops.ssd import ssd, ssd_noncausal, ssd_rows
from ens.space import Choice, parse_choice


@pytest.fixture(autouse=True)
def _forget_wrapped_modules() -> Iterator[None]:
    yield
    wrap._WRAPPED.clear()


class Scan(nn.Module):
    """x (B, C, H, W) as the sequence of its pixels, N = 5 states; or as rows and columns of one head each."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        sequence, A, B = x.flatten(2), x.new_empty(channels, 5), x.new_empty(batch, 5, height * width)
        if self.name == "selective_scan":
            y = selective_scan(sequence, sequence, A, B, B)
            assert isinstance(y, Tensor)
            return y
        if self.name == "ssd_rows":
            heads = x.unflatten(1, (2, -1))
            B = x.new_empty(batch, 5, height, width)
            return ssd_rows(heads, heads[:, :, 0], A[:2, 0], B, B, A[:2, 0])
        if self.name == "ssd_noncausal":
            heads = sequence.unflatten(1, (2, -1))
            return ssd_noncausal(heads, heads[:, :, 0], B, B)
        heads, B = sequence.transpose(1, 2).unflatten(2, (2, -1)), B.transpose(1, 2)[:, :, None]
        return ssd(heads, heads[..., 0], A[:2, 0], B, B, reverse=self.name == "ssd reversed")


@pytest.fixture(params=["kernel", "no kernel"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ens.ops.scan_op, "HAS_KERNEL", request.param == "kernel")
    return str(request.param)


SCAN_MACS = 2 * 6 * 7 * 9 * (9 * 5 + 1) // 2
"""VMamba's 9·B·L·D·N + B·D·L operations, halved, for B 2, D 6, L 7·9, N 5."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "macs"), [
    ("selective_scan", SCAN_MACS), ("ssd", SCAN_MACS), ("ssd reversed", SCAN_MACS), ("ssd_rows", 2 * SCAN_MACS),
    ("ssd_noncausal", 2 * 2 * 6 * 7 * 9 * 5),
])
def test_scans_count_as_by_hand_on_every_machine(machine: str, name: str, macs: int, dtype: torch.dtype) -> None:
    class Cast(Scan):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype))

    assert count_cost(Cast(name), (2, 6, 7, 9)).macs == macs


def test_ssd_block_counts_as_by_hand(machine: str) -> None:
    """Convolutions (1×1 in, 3×3 depth-wise, 1×1 out, twice) and four scans: rows and columns, there and back."""
    channels, states, heads, pixels = 16, 16, 4, 12 * 20
    mixed = channels + 4 * states
    mixer = channels * (mixed + channels + heads) + 9 * mixed + channels * channels
    ffn = channels * 2 * channels + 9 * 2 * channels + channels * channels
    scans = 2 * channels * (9 * states + 1) // 2
    assert count_cost(create_stack("ssd", channels, 1), (1, channels, 12, 20)).macs == pixels * (mixer + ffn + scans)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_cost_depends_on_whether_a_compiler_was_there(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = create_stack(family, 16, 1, heads=2)
    costs = []
    for kernel in (True, False):
        monkeypatch.setattr(ens.ops.scan_op, "HAS_KERNEL", kernel)
        costs.append(count_cost(stack, (1, 16, 16, 24)))
    assert costs[0] == costs[1]


def test_counting_copies_no_weight_and_leaves_the_module_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 8, 1))
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    monkeypatch.setattr(Tensor, "__deepcopy__", refuse)
    assert count_cost(module, (1, 3, 10, 10)).params == 8 * 27 + 8 + 2 * 8 + 8 * 8 + 8
    assert [part.training for part in module] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {p.device.type for p in module.parameters()} == {"cpu"} and not module[0]._forward_hooks


def test_tied_weights_are_counted_once() -> None:
    tied = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    tied[1].weight = tied[0].weight
    assert count_cost(tied, (1, 4, 8, 8)).params == 4 * 4 * 9 + 2 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_is_counted_in_its_own_precision(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    expected = count_cost(conv, (1, 3, 8, 8))
    cost = count_cost(conv.to(dtype), (1, 3, 8, 8))
    assert cost.macs == expected.macs and cost.peak_bytes == expected.peak_bytes * dtype.itemsize // 4


class Shrinking(nn.Module):
    """Two scales; sides must be multiples of 96."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=4)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
        self.up = nn.ConvTranspose2d(8, 3, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-1] % 96 == image.shape[-2] % 96 == 0
        return image + self.up(self.body(self.down(image)))


def padded_network(name: str) -> tuple[Network, list[str]]:
    if name == "wrapped":
        return wrap_network(Shrinking(), slots=["body"], name="s", size_multiple=96, probe_px=96), ["body"]
    return create_network("uformer", embed_dim=4, depths=[1] * 9, num_heads=[1] * 9, win_size=6), [
        "encoderlayer_1", "conv", "decoderlayer_3.0"]


@pytest.mark.parametrize(("height", "width"), [(256, 256), (64, 100), (192, 96)])
@pytest.mark.parametrize("name", ["wrapped", pytest.param("uformer", marks=pytest.mark.slow)])
def test_table_counts_what_runs_where_the_image_is_padded(name: str, height: int, width: int) -> None:
    """256 is no multiple of 96: the network runs on 288×288. Odd scans also make odd numbers of operations."""
    network, slots = padded_network(name)
    choices = [Choice("conv", 1), Choice("ssd", 1, (("num_heads", 2),)), Choice("mambair", 1, (("state", 3),))]
    space = build_space("s", network, slots={slot: choices for slot in slots})
    table = build_cost_table(network, space, height=height, width=width)
    genotypes = list(itertools.product(range(4), repeat=len(slots)))
    values = [table.costs(genotype) for genotype in genotypes]
    for genotype, costs in list(zip(genotypes, values, strict=True))[::7]:
        hybrid, _ = padded_network(name)
        for slot, index in zip(space.slots, genotype, strict=True):
            if index:
                hybrid.fill(slot.name, create_filling(hybrid.slot(slot.name), slot.choices[index]))
        whole = count_cost(hybrid, (1, 3, height, width))
        assert costs == {"params": whole.params, "macs": whole.macs}
    for objective in ("params", "macs"):
        column = [costs[objective] for costs in values]
        assert table.range(objective) == (min(column), max(column))


def test_a_table_is_counted_without_weights() -> None:
    with torch.device("meta"):
        network = create_network("restormer", dim=8, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1)
    space = build_space("s", network, choices=[parse_choice("vssd×1")])
    costs = build_cost_table(network, space).costs(space.teacher)
    assert costs["macs"] == count_cost(network, (1, 3, 256, 256)).macs
