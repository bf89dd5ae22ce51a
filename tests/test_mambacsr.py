from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ens.blocks import create_stack
from ens.blocks.rlmb import CrossScaleFusion, RLMBBlock, WindowScan
from ens.networks import create_network
from ens.networks.mambacsr import MambaCSR, infer_options

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent: golden vectors not compared")


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs, and the weights, of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm().detach() / b.norm())


@pytest.mark.parametrize(("cross_scale_scan", "params", "tensors"), [(True, 22_051_842, 1532),
                                                                     (False, 18_372_603, 1288)])
def test_parameter_counts_are_the_published_ones(cross_scale_scan: bool, params: int, tensors: int) -> None:
    with torch.device("meta"):
        network = MambaCSR(cross_scale_scan=cross_scale_scan)
    assert sum(p.numel() for p in network.parameters()) == params
    assert len(network.state_dict()) == tensors
    assert [spec.name for spec in network.slots] == ["group1", *(["low_group1"] if cross_scale_scan else []), "group2",
                                                     "group3", "group4", "group5", "group6"]


@needs_golden
@pytest.mark.parametrize(("name", "window", "vertical"), [("w4", 4, False), ("cw4", 4, True), ("w8", 8, False)])
def test_window_scans_with_released_keys(name: str, window: int, vertical: bool) -> None:
    tensors, state = load(f"mambacsr_ss2d_{name}")
    scan = WindowScan(8, window=window, vertical=vertical, state=4)
    scan.load_state_dict(state)
    assert error(scan(tensors["input.x"]), tensors["output.y"]) < 1e-4


@needs_golden
def test_cross_scale_fusion_with_released_keys() -> None:
    tensors, state = load("mambacsr_cross")
    fusion = CrossScaleFusion(8, state=4)
    fusion.load_state_dict(state)
    high = tensors["input.x"].transpose(1, 2).unflatten(2, (16, 16))
    low = tensors["input.x_down"].transpose(1, 2).unflatten(2, (8, 8))
    assert error(fusion(high, low).flatten(2).transpose(1, 2), tensors["output.y"]) < 1e-4


@needs_golden
def test_network_with_released_keys() -> None:
    tensors, state = load("mambacsr")
    network = create_network("mambacsr", **infer_options(state))
    network.load_state_dict(state)
    with torch.no_grad():
        assert error(network(tensors["input.x"]), tensors["output.y"]) < 1e-4


def make_tiny(**options: bool) -> MambaCSR:
    torch.manual_seed(0)
    network = create_network("mambacsr", embed_dim=8, d_state=2, depths=(1, 1), depths2=(1,), upscale=4, **options)
    assert isinstance(network, MambaCSR)
    return network.eval()


@pytest.mark.parametrize("cross_scale_scan", [True, False])
def test_the_run_can_be_cut_anywhere_and_slots_can_be_filled(cross_scale_scan: bool) -> None:
    network = make_tiny(cross_scale_scan=cross_scale_scan)
    image = torch.rand(1, 3, 16, 32)  # not square: the released code undoes the vertical orders wrongly here
    with torch.no_grad():
        whole = network.restore(image)
        assert whole.shape == (1, 3, 64, 128)
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
        for spec, (given, out) in zip(network.slots, network.capture(
                image, [spec.name for spec in network.slots]).values(), strict=True):
            assert given.shape == out.shape == (1, 8, 16 // spec.downscale, 32 // spec.downscale)
            network.fill(spec.name, create_stack("conv", 8, 1))
        assert network(torch.rand(1, 3, 19, 7)).shape == (1, 3, 76, 28)


def test_blocks_of_a_row_alternate_between_four_scans() -> None:
    scans = [block.self_attention for block in create_stack("rlmb", 8, 6, options={"state": 2})]
    assert [(scan.window, scan.vertical) for scan in scans] == [
        (8, False), (8, True), (64, False), (64, True), (8, False), (8, True)]


def test_gradient_reaches_every_parameter_that_is_read() -> None:
    torch.manual_seed(1)
    fusion = CrossScaleFusion(8, state=2)
    high, low = torch.rand(1, 8, 16, 16, requires_grad=True), torch.rand(1, 8, 8, 8, requires_grad=True)
    before = high.detach().clone(), low.detach().clone()
    fusion(high, low).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    assert low.grad is not None and (low.grad != 0).any()
    assert torch.equal(high, before[0]) and torch.equal(low, before[1])


def test_wrong_sizes_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="1, 2, 3, 4 or 8"):
        MambaCSR(upscale=5)
    with pytest.raises(ValueError, match="depths2"):
        MambaCSR(depths=(1,), depths2=(1, 1))
    with pytest.raises(ValueError, match="multiples of the window 16"):
        CrossScaleFusion(8)(torch.rand(1, 8, 16, 24), torch.rand(1, 8, 8, 12))
    assert RLMBBlock(8).mlp.fc1.out_features == 16
