from __future__ import annotations

import warnings

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ens.blocks import create_stack
from ens.export.graph import tidy_graph
from ens.ops.selective_scan import selective_scan_loop
from ens.ops.ssd import ssd, ssd_loop, ssd_noncausal, ssd_rows


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
       seed=st.integers(0, 9))
def test_chunks_equal_the_loop_with_gradients(length: int, groups: int, per_group: int, states: int, chunk_size: int,
                                              reverse: bool, seed: int) -> None:
    inputs = make_inputs(1, length, groups * per_group, 3, groups, states, seed=seed)
    fast = gradients(ssd, inputs, chunk_size=chunk_size, reverse=reverse)
    for a, b in zip(fast, gradients(ssd_loop, inputs, reverse=reverse), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(length=st.sampled_from([1, 2, 64, 65, 130]), groups=st.sampled_from([1, 2]), per_group=st.integers(1, 3),
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
    ("dt_bias", (2, 40, 4)),
])
def test_wrong_shapes_raise(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got"):
        ssd(**{**make_inputs(), name: torch.zeros(shape)})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D"])
def test_complex_and_integer_input_is_refused(name: str, dtype: torch.dtype) -> None:
    inputs = {key: m.float() for key, m in make_inputs().items()}
    inputs[name] = inputs[name].to(dtype)
    for scan in (ssd, ssd_loop):
        with pytest.raises(ValueError, match=f"{name} is {dtype}"):
            scan(**inputs)
    rows = {"x": torch.ones(1, 2, 3, 4, 5), "dt": torch.ones(1, 2, 4, 5), "A": -torch.ones(2),
            "B": torch.ones(1, 6, 4, 5), "C": torch.ones(1, 6, 4, 5), "D": torch.ones(2)}
    rows[name] = rows[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} is {dtype}"):
        ssd_rows(**rows)


def test_noncausal_refuses_complex_input() -> None:
    x, weight, B = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 5, 4)
    with pytest.raises(ValueError, match="B is torch"):
        ssd_noncausal(x, weight, B.to(torch.complex64), B)


@pytest.mark.parametrize("axis", ["batch", "length", "heads", "width", "groups", "states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_axes_are_refused_as_by_the_loop(axis: str, dtype: torch.dtype) -> None:
    inputs = {name: m.to(dtype) for name, m in make_inputs(**{axis: 0}).items()}
    for scan in (ssd, ssd_loop):
        with pytest.raises(ValueError, match="empty axes"):
            scan(**inputs)


@pytest.mark.parametrize("axis", range(5))
def test_empty_axes_of_rows_are_refused(axis: int) -> None:
    size = [0 if i == axis else i + 1 for i in range(5)]
    x, dt, A = torch.ones(size), torch.ones(*size[:2], *size[3:]), torch.ones(size[1])
    B = torch.ones(size[0], 2, *size[3:])
    with pytest.raises(ValueError, match="empty axes"):
        ssd_rows(x, dt, A, B, B, A)
    with pytest.raises(ValueError, match="empty axes"):
        ssd_rows(torch.ones(1, 2, 3, 4, 5), torch.ones(1, 2, 4, 5), torch.ones(2), torch.ones(1, 0, 4, 5),
                 torch.ones(1, 0, 4, 5), torch.ones(2))


STRIDES = {
    "expanded": lambda m: m[..., :1].expand(m.shape),
    "expanded over the batch": lambda m: m[:1].expand(m.shape),
    "transposed": lambda m: m.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda m: m.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D"])
@pytest.mark.parametrize("reverse", [False, True])
def test_strides_of_an_input_change_nothing_with_gradients(name: str, layout: str, reverse: bool) -> None:
    inputs = {key: m.float() for key, m in make_inputs().items()}
    inputs[name] = STRIDES[layout](inputs[name])
    results = []
    for scan, arguments in ((ssd, inputs), (ssd_loop, {key: m.contiguous().double() for key, m in inputs.items()})):
        leaves = {key: m.detach().requires_grad_() for key, m in arguments.items()}
        y = scan(**leaves, reverse=reverse)
        results.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])  # an expanded gradient
    for a, b in zip(*results, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= 1e-4 * float(b.detach().norm())


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 2), heads=st.integers(1, 3), width=st.sampled_from([1, 5]), states=st.sampled_from([1, 4]),
       rows=st.integers(1, 3), length=st.sampled_from([1, 2, 15, 16, 17, 50]), chunk_size=st.sampled_from([1, 3, 16]),
       dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rows_equal_the_loop_both_ways_with_gradients(batch: int, heads: int, width: int, states: int, rows: int,
                                                      length: int, chunk_size: int, dtype: torch.dtype) -> None:
    """float64 takes the products, float32 the kernel where it is built."""
    inputs = make_inputs(batch * rows, length, heads, width, 1, states)
    B, C = inputs["B"][:, :, 0], inputs["C"][:, :, 0]

    def to_map(m: Tensor) -> Tensor:  # (B·R, L, …) -> (B, …, R, L)
        return m.unflatten(0, (batch, rows)).movedim((1, 2), (-2, -1))

    def by_the_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        back = [m.movedim((-2, -1), (1, 2)).flatten(0, 1) for m in (x, dt, B[:, None], C[:, None])]
        both = [ssd_loop(back[0], back[1], A, *back[2:], reverse=reverse) for reverse in (False, True)]
        return to_map(both[0] + both[1] + back[0] * D[:, None])

    maps = {"x": to_map(inputs["x"]), "dt": to_map(inputs["dt"]), "A": inputs["A"], "B": to_map(B), "C": to_map(C),
            "D": inputs["D"]}
    fast = gradients(ssd_rows, {name: m.to(dtype) for name, m in maps.items()}, chunk_size=chunk_size)
    for a, b in zip(fast, gradients(by_the_loop, maps), strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= (
            1e-4 if dtype == torch.float32 else 1e-9) * float(b.detach().norm())


def test_wrong_shapes_of_rows_raise() -> None:
    x, dt, A, B = torch.ones(1, 2, 3, 4, 5), torch.ones(1, 2, 4, 5), -torch.ones(2), torch.ones(1, 6, 4, 5)
    assert ssd_rows(x, dt, A, B, B, A).shape == x.shape
    for wrong in ((x, dt[:, :1], A, B, B, A), (x, dt, A[:1], B, B, A), (x, dt, A, B, B, A[:1]),
                  (x, dt, A, B[..., :4], B[..., :4], A), (x, dt, A, B, B[:, :1], A), (x[0], dt, A, B, B, A)):
        with pytest.raises(ValueError, match="got"):
            ssd_rows(*wrong)


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


CONTRACT = {"Conv", "MatMul", "Add", "Sub", "Mul", "Exp", "Sqrt", "Reciprocal", "Sigmoid", "Gelu", "Softmax",
            "ReduceMean", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Concat", "DepthToSpace"}
"""What edge runtimes delegate, in ONNX words: rsqrt is two operators, view is Reshape, Unsqueeze or Squeeze."""


class CausalScan(nn.Module):
    """`ssd` of one group as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return ssd(x, torch.sigmoid(x[..., :1]).flatten(2), -torch.ones(3), x[:, :, :1], x[:, :, 1:2], 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vssd", "ssd", "causal"])
def test_exported_form_keeps_the_edge_operator_contract(name: str) -> None:
    """Sides known, as edge runtimes want them; multiples of the chunk, else one Pad comes in."""
    torch.manual_seed(0)
    module = CausalScan() if name == "causal" else create_stack(name, 16, 1)
    x = torch.randn(1, 96, 3, 4) if name == "causal" else torch.randn(1, 16, 32, 48)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), (x,), dynamo=True, opset_version=20, verbose=False)
        expected = module(x)
    assert program is not None
    tidy_graph(program.model)
    assert {node.op_type for node in program.model.graph} <= CONTRACT
    assert max(len(value.shape) for node in program.model.graph for value in node.outputs if value.shape) <= 5
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)
