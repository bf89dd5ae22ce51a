from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ens.blocks import FAMILIES, create_stack, family_options

EXPORTED = ("restormer", "vssd", "ssd", "conv", "mambair")


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
    stack, x = make_stack(family), image(7, 5).requires_grad_()
    (stack(x) * torch.cos(torch.arange(x.numel())).view_as(x)).sum().backward()
    silent = [name for name, parameter in stack.named_parameters() if parameter.grad is None or
              not parameter.grad.abs().max() > 0]
    assert not silent
    assert x.grad is not None and (x.grad != 0).all()


@pytest.mark.parametrize("family", ["ssd", "vssd", "conv"])
def test_new_block_starts_near_identity(family: str) -> None:
    x = image(16, 16)
    assert float((make_stack(family)(x).detach() - x).norm() / x.norm()) < 0.3


@pytest.mark.parametrize("family", ["mambair", "ssd", "vssd", "rlmb", "serpent"])
def test_state_space_blocks_see_the_whole_row(family: str) -> None:
    stack, x = make_stack(family), image(3, 40).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x)[0, :, 1, 0].sum(), x)
    assert (gradient[0, :, 1, -1] != 0).any(), "the far end of the row has no influence"


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


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPORTED)
def test_block_exports_with_dynamic_height_and_width(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    stack = make_stack(family).eval()
    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(stack, (image(12, 20)[:1],), dynamo=True, dynamic_shapes=(free,))
    assert program is not None
    program.save(tmp_path / "block.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx")
    for size in [(1, 1), (7, 5), (33, 70)]:
        x = image(*size)[:1]
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        truth = stack(x).detach().numpy()
        assert np.linalg.norm(y - truth) < 1e-4 * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_black_map_stays_finite_in_every_precision(dtype: torch.dtype) -> None:
    """An epsilon under a root must be a number of the precision it is used in: 1e-24 is 0 in float16."""
    block = create_stack("restormer", 8, 1, heads=2).to(dtype)
    for value in (0.0, 1.0):
        assert torch.isfinite(block(torch.full((1, 8, 8, 8), value, dtype=dtype))).all()
