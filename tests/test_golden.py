"""Golden vectors computed with the released implementations (../shared/golden), through the public API."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ens.blocks import create_stack
from ens.ops.selective_scan import selective_scan, selective_scan_loop
from ens.ops.ssd import ssd, ssd_loop

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent: golden vectors not compared")


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and constructor arguments of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_loop])
def test_selective_scan_and_its_gradients(scan: object) -> None:
    tensors, _ = load("selective_scan")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = [tensors[f"input.{name}"].requires_grad_() for name in names]
    y = scan(*inputs, delta_softplus=True)  # type: ignore[operator]
    assert error(y, tensors["output.y"]) < 1e-4
    gradients = torch.autograd.grad((y * tensors["input.grad_y"]).sum(), inputs)
    for name, gradient in zip(names, gradients, strict=True):
        assert error(gradient, tensors[f"output.grad_{name}"]) < 1e-4, name


@pytest.mark.parametrize("function", [ssd, ssd_loop])
def test_ssd(function: object) -> None:
    tensors, _ = load("ssd")
    y = function(*(tensors[f"input.{name}"] for name in ("x", "dt", "A", "B", "C")))  # type: ignore[operator]
    assert error(y, tensors["output.y"]) < 1e-4


def test_mambair_block_with_released_weights() -> None:
    tensors, arguments = load("mambair_vssblock")
    height, width = (int(side) for side in arguments["size"].strip("()").split(","))
    options = {"state": int(arguments["d_state"]), "expand": float(arguments["expand"])}
    stack = create_stack("mambair", int(arguments["hidden_dim"]), 1, options=options)
    stack[0].load_state_dict({key.removeprefix("state."): value for key, value in tensors.items()
                              if key.startswith("state.")})
    x = tensors["input.x"].transpose(1, 2).unflatten(2, (height, width))
    assert error(stack(x).flatten(2).transpose(1, 2), tensors["output.y"]) < 1e-4
