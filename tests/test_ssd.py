from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ens.ops.selective_scan import selective_scan_loop
from ens.ops.ssd import ssd, ssd_loop, ssd_noncausal


def make_inputs(batch: int = 2, length: int = 40, heads: int = 4, width: int = 3, groups: int = 1, states: int = 5, *,
                seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"x": normal(batch, length, heads, width), "dt": torch.nn.functional.softplus(normal(batch, length, heads)),
            "A": -torch.exp(normal(heads)), "B": normal(batch, length, groups, states),
            "C": normal(batch, length, groups, states), "D": normal(heads)}


def gradients(function: object, inputs: dict[str, Tensor], **options: object) -> list[Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = function(**leaves, **options)  # type: ignore[operator]
    weight = torch.cos(torch.arange(y.numel())).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), list(leaves.values()))]


@settings(max_examples=40, deadline=None)
@given(length=st.sampled_from([1, 2, 7, 40, 65, 130]), groups=st.sampled_from([1, 2]), per_group=st.integers(1, 2),
       states=st.sampled_from([1, 5]), chunk_size=st.sampled_from([1, 3, 8, 64]), reverse=st.booleans(),
       levels=st.sampled_from([None, 1, 2]), seed=st.integers(0, 9))
def test_chunks_equal_the_loop_with_gradients(length: int, groups: int, per_group: int, states: int, chunk_size: int,
                                              reverse: bool, levels: int | None, seed: int) -> None:
    inputs = make_inputs(1, length, groups * per_group, 3, groups, states, seed=seed)
    fast = gradients(ssd, inputs, chunk_size=chunk_size, reverse=reverse, levels=levels)
    for a, b in zip(fast, gradients(ssd_loop, inputs, reverse=reverse), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(length=st.sampled_from([1, 2, 64, 65, 200]), groups=st.sampled_from([1, 2]), per_group=st.integers(1, 3),
       width=st.sampled_from([1, 5, 16, 24]), states=st.sampled_from([1, 5, 16]), reverse=st.booleans(),
       batch=st.integers(1, 2))
def test_float32_equals_the_loop_with_gradients(length: int, groups: int, per_group: int, width: int, states: int,
                                                reverse: bool, batch: int) -> None:
    inputs = make_inputs(batch, length, groups * per_group, width, groups, states)
    fast = gradients(ssd, {name: value.float() for name, value in inputs.items()}, reverse=reverse)
    for a, b in zip(fast, gradients(ssd_loop, inputs, reverse=reverse), strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= 1e-4 * float(b.detach().norm())


def test_scalar_decay_is_the_selective_scan_with_equal_rows() -> None:
    inputs = make_inputs(heads=4, width=3)
    y = ssd(**inputs)
    per_channel = [inputs["x"].flatten(2).transpose(1, 2), inputs["dt"].repeat_interleave(3, 2).transpose(1, 2),
                   inputs["A"].repeat_interleave(3)[:, None].expand(12, 5), inputs["B"].permute(0, 2, 3, 1),
                   inputs["C"].permute(0, 2, 3, 1), inputs["D"].repeat_interleave(3)]
    scanned = selective_scan_loop(*per_channel)
    assert isinstance(scanned, Tensor)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), scanned)


def test_reverse_equals_flipping_in_and_out() -> None:
    inputs = make_inputs()
    flipped = {name: value if value.ndim == 1 else value.flip(1) for name, value in inputs.items()}
    torch.testing.assert_close(ssd(**inputs, reverse=True), ssd(**flipped).flip(1))


def test_steep_decay_neither_overflows_nor_underflows_to_nan() -> None:
    inputs = {name: value.float() for name, value in make_inputs(length=300).items()}
    inputs["dt"] += 60.0
    y = ssd(**inputs)
    assert y.isfinite().all()
    torch.testing.assert_close(y, ssd_loop(**inputs), rtol=1e-4, atol=1e-3)


def test_bias_and_softplus_are_applied_to_dt() -> None:
    inputs = make_inputs()
    bias = torch.linspace(-1, 1, 4, dtype=torch.float64)
    direct = ssd(**{**inputs, "dt": torch.nn.functional.softplus(inputs["dt"] + bias)})
    torch.testing.assert_close(ssd(**inputs, dt_bias=bias, dt_softplus=True), direct)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: value.to(dtype) for name, value in make_inputs(length=200).items()}
    y = ssd(**inputs)
    truth = ssd_loop(**{name: value.double() for name, value in inputs.items()})
    assert y.dtype == dtype
    assert float((y.double() - truth).norm() / truth.norm()) < torch.finfo(dtype).eps


def test_nan_in_gives_nan_out() -> None:
    for name in ("x", "dt", "A", "B", "C", "D"):
        inputs = make_inputs()
        inputs[name].view(-1)[0] = float("nan")
        assert ssd(**inputs).isnan().any(), name


@pytest.mark.parametrize(("name", "shape"), [
    ("x", (2, 0, 4, 3)), ("dt", (2, 40, 3)), ("A", (3,)), ("B", (2, 40, 3, 5)), ("C", (2, 40, 1, 4)), ("D", (1,)),
])
def test_wrong_shapes_raise(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got"):
        ssd(**{**make_inputs(), name: torch.zeros(shape)})


def test_noncausal_is_the_sum_over_all_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64)
    weight = torch.rand(2, 3, 11, generator=generator, dtype=torch.float64)
    B, C = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    state = torch.einsum("bhpl,bhl,bnl->bhpn", x, weight, B)
    y = ssd_noncausal(x, weight, B, C)
    torch.testing.assert_close(y, torch.einsum("bhpn,bnl->bhpl", state, C))
    order = torch.randperm(11, generator=generator)
    shuffled = ssd_noncausal(x[..., order], weight[..., order], B[..., order], C[..., order])
    torch.testing.assert_close(shuffled, y[..., order])
    with pytest.raises(ValueError, match="weight"):
        ssd_noncausal(x, weight[:, :2], B, C)
    with pytest.raises(ValueError, match="B and C"):
        ssd_noncausal(x, weight, B, C[..., :5])
