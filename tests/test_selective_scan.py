from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ens.ops.selective_scan import selective_scan, selective_scan_loop

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def make_inputs(batch: int = 2, channels: int = 6, length: int = 37, states: int = 4, groups: int = 1, *, seed: int = 0,
                dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {"u": normal(batch, channels, length), "delta": normal(batch, channels, length),
            "A": -torch.exp(normal(channels, states)), "B": normal(batch, groups, states, length),
            "C": normal(batch, groups, states, length), "D": normal(channels),
            "z": normal(batch, channels, length), "delta_bias": normal(channels)}


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def run_with_gradients(scan: object, inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y, state = scan(**leaves, delta_softplus=True, return_last_state=True)  # type: ignore[operator]
    weight = torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype)
    loss = (y * weight).sum() + state.sum()
    return [y, state, *torch.autograd.grad(loss, list(leaves.values()))]


@settings(max_examples=40, deadline=None)
@given(length=st.sampled_from([1, 2, 3, 17, 63, 65]), per_group=st.integers(1, 3), groups=st.sampled_from([1, 2]),
       states=st.sampled_from([1, 4, 16, 64]), batch=st.integers(1, 2), seed=st.integers(0, 9))
def test_fast_path_equals_the_loop_with_gradients(length: int, per_group: int, groups: int, states: int, batch: int,
                                                  seed: int) -> None:
    inputs = make_inputs(batch, per_group * groups, length, states, groups, seed=seed)
    truth = run_with_gradients(selective_scan_loop, {name: value.double() for name, value in inputs.items()})
    for name, a, b in zip(("y", "state", *NAMES), run_with_gradients(selective_scan, inputs), truth, strict=True):
        assert error(a, b) < 1e-4, name


def test_gradcheck_in_float64() -> None:
    inputs = make_inputs(1, 2, 5, 3, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, delta_softplus=True), leaves)


@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_arguments_may_be_left_out(missing: tuple[str, ...]) -> None:
    inputs = {name: value for name, value in make_inputs().items() if name not in missing}
    inputs["delta"] = inputs["delta"].abs()
    y, truth = selective_scan(**inputs), selective_scan_loop(**inputs)
    assert isinstance(y, Tensor) and isinstance(truth, Tensor)
    assert error(y, truth) < 1e-5


def test_scan_is_causal_and_linear_in_u() -> None:
    inputs = make_inputs(length=40)
    changed = {**inputs, "u": inputs["u"].clone()}
    changed["u"][..., 25:] += 1
    y, other = selective_scan(**inputs, delta_softplus=True), selective_scan(**changed, delta_softplus=True)
    assert torch.equal(y[..., :25], other[..., :25])  # type: ignore[index]
    assert not torch.allclose(y[..., 25:], other[..., 25:])  # type: ignore[index]
    doubled = selective_scan(**{**inputs, "u": 2 * inputs["u"]}, delta_softplus=True)
    assert error(doubled, 2 * y) < 1e-6  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_a_float32_state(dtype: torch.dtype) -> None:
    inputs = {name: value.to(dtype) for name, value in make_inputs(length=200).items()}
    y, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    truth = selective_scan_loop(**{name: value.double() for name, value in inputs.items()}, delta_softplus=True)
    assert isinstance(truth, Tensor)
    assert error(y, truth) < torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_gives_nan_out(name: str) -> None:
    inputs = make_inputs()
    inputs[name].view(-1)[0] = float("nan")
    y = selective_scan(**inputs, delta_softplus=True)
    assert isinstance(y, Tensor) and y.isnan().any()


def test_large_steps_forget_instead_of_overflowing() -> None:
    inputs = make_inputs(length=100)
    inputs["delta"] += 100.0
    y = selective_scan(**inputs, delta_softplus=True)
    truth = selective_scan_loop(**inputs, delta_softplus=True)
    assert isinstance(y, Tensor) and isinstance(truth, Tensor)
    assert y.isfinite().all() and error(y, truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_loop])
def test_complex_and_integer_input_is_refused(scan: object, name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs()
    inputs[name] = inputs[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} is {dtype}"):
        scan(**inputs)  # type: ignore[operator]


@pytest.mark.parametrize(("name", "shape"), [
    ("u", (2, 6, 0)), ("u", (0, 6, 37)), ("u", (2, 0, 37)), ("u", (6, 37)), ("delta", (2, 6, 36)), ("A", (5, 4)),
    ("A", (6, 0)), ("B", (2, 1, 3, 37)), ("B", (2, 4, 4, 37)), ("C", (2, 1, 4, 36)), ("C", (2, 2, 4, 37)), ("D", (1,)),
    ("z", (2, 6)), ("delta_bias", (6, 1)),
])
def test_wrong_shapes_raise_and_name_the_argument(name: str, shape: tuple[int, ...]) -> None:
    inputs = {**make_inputs(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=name):
        selective_scan(**inputs)
