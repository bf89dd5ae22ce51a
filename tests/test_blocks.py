from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ens.blocks import FAMILIES, create_stack, family_options
from ens.blocks.norm import ChannelNorm, MapNorm
from ens.blocks.rep import RepConv, fold_blocks
from ens.blocks.restormer import unit_rows


def make_stack(family: str, channels: int = 32, depth: int = 1) -> nn.Sequential:
    # This seed leaves the only squeeze unit of MambaIR and MambaCSR (32 // 30 = 1, behind a ReLU) alive.
    torch.manual_seed(2)
    return create_stack(family, channels, depth)


def image(*size: int, channels: int = 32) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 5), (8, 13)])
def test_block_keeps_any_shape_and_its_input(family: str, size: tuple[int, int]) -> None:
    x = image(*size)
    before = x.clone()
    y = make_stack(family, depth=2)(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_evaluation_give_the_same_output(family: str) -> None:
    stack, x = make_stack(family), image(7, 5)
    assert torch.equal(stack.train()(x), stack.eval()(x))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "identity"])
def test_gradient_reaches_every_parameter_and_the_input(family: str) -> None:
    channels = 128 if family == "dat" else 32  # below, its network of positions normalises one number: a constant
    stack, x = make_stack(family, channels), image(7, 5, channels=channels).requires_grad_()
    (stack(x) * torch.cos(torch.arange(x.numel())).view_as(x)).sum().backward()
    silent = [name for name, parameter in stack.named_parameters() if parameter.grad is None or
              not parameter.grad.abs().max() > 0]
    assert not silent
    assert x.grad is not None and (x.grad != 0).all()


@pytest.mark.parametrize("family", ["ssd", "vssd", "conv", "half", "rep"])
def test_new_block_starts_near_identity(family: str) -> None:
    x = image(16, 16)
    assert float((make_stack(family)(x).detach() - x).norm() / x.norm()) < 0.3


@pytest.mark.parametrize("family", ["mambair", "ssd", "vssd", "rlmb", "serpent"])
def test_state_space_blocks_see_the_whole_row(family: str) -> None:
    stack, x = make_stack(family), image(3, 40).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x)[0, :, 1, 0].sum(), x)
    assert (gradient[0, :, 1, -1] != 0).any(), "the far end of the row has no influence"


@pytest.mark.parametrize(("family", "options"), [
    ("rep", {}), ("rep", {"width": 2.0, "activation": "silu"}), ("rep", {"width": 0.5}), ("half", {})])
def test_folded_blocks_give_the_same_without_branches(family: str, options: dict[str, Any]) -> None:
    stack, x = create_stack(family, 12, 2, options=options).double(), image(7, 9, channels=12).double()
    for parameter in stack.parameters():  # branches that start at zero or one have a say
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).double()
    folded = fold_blocks(stack)
    assert not any(isinstance(module, RepConv) for module in folded.modules())
    assert any(isinstance(module, RepConv) for module in stack.modules())
    assert torch.allclose(folded(x), stack(x), rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in stack.parameters())


def test_a_folded_kernel_is_the_sum_of_its_branches() -> None:
    conv, x = RepConv(5, 5, identity=0.25).double(), image(6, 4, channels=5).double()
    conv.scale.data.fill_(0.75)
    branches = 0.75 * (conv.conv3(x) + conv.conv1(x)) + 0.25 * x
    assert torch.allclose(conv.fold()(x), branches, rtol=1e-10, atol=1e-10)


def test_nothing_to_fold_returns_the_network_itself() -> None:
    stack = make_stack("conv")
    assert fold_blocks(stack) is stack


def test_identity_stack_returns_its_input_whatever_the_depth() -> None:
    stack, x = create_stack("identity", 4, 3), image(2, 3, channels=4)
    assert len(stack) == 1 and torch.equal(stack(x), x)


def test_create_stack_passes_options_and_heads() -> None:
    stack = create_stack("restormer", 32, 2, heads=4, options={"layer_norm": "BiasFree"})
    assert len(stack) == 2 and stack[0].attn.heads == 4 and stack[0].norm1.body.bias is None
    assert create_stack("vssd", 32, 1, heads=4, options={"state": 8})[0].mixer.states == 8
    assert family_options("mambair") == {"state": 16, "expand": 2.0}


def test_wrong_requests_name_what_is_allowed() -> None:
    with pytest.raises(KeyError, match="identity"):
        create_stack("transformer", 8, 1)
    with pytest.raises(ValueError, match="kernel_size"):
        create_stack("conv", 8, 1, options={"states": 8})
    with pytest.raises(ValueError, match="depth"):
        create_stack("conv", 8, 0)
    with pytest.raises(ValueError, match="odd"):
        create_stack("conv", 8, 1, options={"kernel_size": 4})
    with pytest.raises(ValueError, match="num_heads"):
        create_stack("vssd", 10, 1)


@pytest.mark.parametrize(("family", "depth", "options", "message"), [
    ("conv", 1_000_000_000, {}, "depth is 1 to 256"), ("conv", -1, {}, "depth is 1 to 256"),
    ("vssd", 1, {"state": 10**12}, "state is a whole number from 1 to 1024"), ("vssd", 1, {"state": -1}, "state is"),
    ("vssd", 1, {"state": 8.0}, "state is a whole number"), ("vssd", 1, {"state": True}, "state is a whole number"),
    ("conv", 1, {"expand": float("nan")}, "expand is a number above 0"), ("conv", 1, {"expand": 0}, "expand"),
    ("conv", 1, {"expand": 1e9}, "expand"), ("conv", 1, {"kernel_size": 10_001}, "kernel_size is"),
    ("uformer", 1, {"window": 10**6}, "window is a whole number from 1 to 64"), ("conv", 1, {"expand": (2,)}, "expand"),
    ("uformer", 1, {"shift": 1}, "shift is true or false"), ("restormer", 1, {"layer_norm": 3}, "layer_norm is text"),
    ("restormer", 1, {"heads": 10**4000}, "got a number of many digits"),
    ("plk", 256, {"kernel_size": 127, "max_large_channels": 512, "split_ratio": 1.0}, "allowed: 500,000,000"),
])
def test_a_size_that_nobody_can_mean_is_refused_before_it_is_built(
        family: str, depth: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_stack(family, 512, depth, options=options)


def flat_map(kind: str, side: int = 16) -> Tensor:
    """(1, 16, side, side) without texture: black, white, one value a channel, half of that black, very small, large."""
    colour = torch.linspace(-1, 1, 16).view(1, -1, 1, 1).expand(1, 16, side, side).clone()
    if kind == "half-black":
        colour[..., side // 2:] = 0
    return {"black": 0 * colour, "white": 0 * colour + 1, "constant": colour, "half-black": colour,
            "tiny": 1e-6 * colour, "large": 1000 * colour}[kind]


@pytest.mark.parametrize("kind", ["black", "white", "constant", "half-black", "tiny", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_without_texture_gives_in_half_precision_what_it_gives_in_float32(
        family: str, dtype: torch.dtype, kind: str) -> None:
    """An epsilon must be a number of the precision it is used in: 1e-24 is 0 in float16."""
    stack, x = make_stack(family, channels=16), flat_map(kind).to(dtype)
    for parameter in stack.parameters():  # representable in both, so that only the computation differs
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        truth = stack(x.float())
        y = stack.to(dtype)(x)
    assert y.dtype == dtype and y.isfinite().all()
    scale = max(float(truth.norm()), float(x.float().norm()), 1e-3)
    assert float((y.float() - truth).norm()) / scale < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 300.0, 30_000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalise", [ChannelNorm(16), ChannelNorm(16, layer_norm="BiasFree"), MapNorm(16),
                                       unit_rows], ids=["WithBias", "BiasFree", "map", "unit rows"])
def test_what_divides_by_a_root_does_not_leave_the_range_of_half_precision(
        normalise: Callable[[Tensor], Tensor], dtype: torch.dtype, factor: float) -> None:
    """256² is infinite in float16, and a root of infinity makes a norm return zeros without a word."""
    x = (factor * image(9, 7, channels=16).clamp(-2, 2)).to(dtype)
    with torch.no_grad():
        truth = normalise(x.float())
        y = (copy.deepcopy(normalise).to(dtype) if isinstance(normalise, nn.Module) else normalise)(x)
    assert y.dtype == dtype and float((y.float() - truth).norm() / truth.norm()) < (
        0.02 if dtype == torch.bfloat16 else 0.003)
