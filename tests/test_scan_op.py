"""The operator below selective_scan: native kernel against the chunked PyTorch path, and what PyTorch sees of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ens.ops.scan_op
from ens.ops.native import ScanInputs, load_kernels, scan_backward, scan_forward
from ens.ops.scan_op import scan_flops
from ens.ops.scan_order import FOUR_DIRECTIONS, scan_order
from ens.ops.selective_scan import selective_scan, selective_scan_directions, selective_scan_loop

ROOT = Path(__file__).resolve().parents[1]
needs_kernel = pytest.mark.skipif(load_kernels() is None, reason="the native kernel is not built: not compared")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-30))


def directional(height: int = 5, width: int = 9, inner: int = 6, states: int = 4, batch: int = 2) -> dict[str, Tensor]:
    length = height * width
    order = torch.stack([scan_order(name, height, width) for name in FOUR_DIRECTIONS])
    return {"u": normal(batch, inner, length), "delta": normal(batch, 4 * inner, length),
            "A": -torch.exp(normal(4 * inner, states)), "B": normal(batch, 4, states, length, seed=1),
            "C": normal(batch, 4, states, length, seed=2), "D": normal(4 * inner),
            "delta_bias": normal(4 * inner, seed=1), "order": order}


def one_after_another(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor,
                      order: Tensor) -> Tensor:
    """The definition: reorder, scan with the loop, put back; (B, G·E, L)."""
    inner = u.shape[1]
    parts = []
    for g, index in enumerate(order):
        rows = slice(g * inner, (g + 1) * inner)
        scanned = selective_scan_loop(u[..., index], delta[:, rows][..., index], A[rows], B[:, g][..., index],
                                      C[:, g][..., index], D[rows], None, delta_bias[rows], delta_softplus=True)
        assert isinstance(scanned, Tensor)
        parts.append(torch.zeros_like(u).index_copy(2, index, scanned))
    return torch.cat(parts, 1)


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ens.ops.scan_op, "HAS_KERNEL", False)


@pytest.fixture(params=["kernel", "chunked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "chunked":
        without_kernel(monkeypatch)
    elif load_kernels() is None:
        pytest.skip("the native kernel is not built: not compared")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield request.param


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("inner", [6, 16, 35])
def test_directions_equal_reordering_by_hand_with_gradients(path: str, merge: bool, channels_last: bool,
                                                            inner: int) -> None:
    inputs = directional(inner=inner)
    order = inputs.pop("order")
    if channels_last:
        inputs = {name: m.transpose(1, -1).contiguous().transpose(1, -1) if m.ndim > 2 else m
                  for name, m in inputs.items()}
    outputs = []
    for scan in (selective_scan_directions, one_after_another):
        leaves = {name: m.detach().requires_grad_() for name, m in inputs.items()}
        y = scan(**leaves, order=order) if scan is one_after_another else scan(**leaves, order=order, merge=merge)
        if scan is one_after_another and merge:
            y = y.unflatten(1, (4, -1)).sum(1)
        weight = torch.cos(torch.arange(y.numel())).view(y.shape)
        outputs.append([y, *torch.autograd.grad((y * weight).sum(), list(leaves.values()))])
    for name, a, b in zip(("y", *inputs), *outputs, strict=True):
        assert error(a, b) < 1e-4, name


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(lanes=st.sampled_from([4, 8, 16]), length=st.sampled_from([1, 2, 3, 63, 64, 65, 130]), batch=st.integers(1, 2),
       per_group=st.sampled_from([1, 5, 16, 33]), groups=st.sampled_from([1, 2]),
       states=st.sampled_from([1, 4, 16, 64]), optional=st.booleans(), softplus=st.booleans())
def test_every_instruction_set_equals_the_loop_with_gradients(lanes: int, length: int, batch: int, per_group: int,
                                                              groups: int, states: int, optional: bool,
                                                              softplus: bool) -> None:
    channels = groups * per_group
    tensors = [normal(batch, channels, length, seed=1), normal(batch, channels, length, seed=2),
               -torch.exp(normal(channels, states)), normal(batch, groups, states, length, seed=3),
               normal(batch, groups, states, length, seed=4), normal(channels) if optional else None,
               normal(batch, channels, length, seed=5) if optional else None,
               normal(channels, seed=6).abs() if optional else None]
    if not softplus:
        tensors[1] = tensors[1].abs()  # type: ignore[union-attr]
    inputs = ScanInputs(*tensors, None, False, False, softplus)  # type: ignore[arg-type]
    y, last, kept = scan_forward(inputs, keep=True, lanes=lanes)
    dy, dlast = normal(batch, channels, length, seed=7), normal(batch, channels, states, seed=8)
    grads = scan_backward(inputs, kept, dy, dlast, lanes=lanes)
    leaves = [None if m is None else m.double().requires_grad_() for m in tensors]
    truth = selective_scan_loop(*leaves, delta_softplus=softplus, return_last_state=True)  # type: ignore[arg-type]
    present = [m for m in leaves if m is not None]
    true_grads = torch.autograd.grad(truth, present, (dy.double(), dlast.double()))
    assert error(y, truth[0]) < 1e-4 and error(last, truth[1]) < 1e-5
    mine = [grad for grad, m in zip(grads, tensors, strict=True) if m is not None]
    mine[3:5] = [m.transpose(2, 3) for m in mine[3:5]]
    for a, b in zip(mine, true_grads, strict=True):
        assert error(a, b) < 1e-4


@settings(max_examples=20, deadline=None)
@given(length=st.sampled_from([1, 2, 3, 63, 65]), per_group=st.sampled_from([1, 5]), groups=st.sampled_from([1, 2]),
       states=st.sampled_from([1, 4, 16, 64]))
def test_portable_path_equals_the_loop_with_gradients_in_float64(length: int, per_group: int, groups: int,
                                                                 states: int) -> None:
    channels = groups * per_group
    leaves = [m.double().requires_grad_() for m in (
        normal(1, channels, length), normal(1, channels, length, seed=1), -torch.exp(normal(channels, states)),
        normal(1, groups, states, length), normal(1, groups, states, length, seed=1), normal(channels),
        normal(1, channels, length, seed=2), normal(channels, seed=1))]
    weights = normal(1, channels, length, seed=3).double(), normal(1, channels, states, seed=4).double()
    results = []
    for scan in (selective_scan, selective_scan_loop):
        outputs = scan(*leaves, delta_softplus=True, return_last_state=True)
        assert isinstance(outputs, tuple)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@needs_kernel
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_nan_in_gives_nan_out_and_no_crash(lanes: int, name: str) -> None:
    tensors = {"u": normal(1, 19, 70), "delta": normal(1, 19, 70, seed=1), "A": -torch.exp(normal(19, 5)),
               "B": normal(1, 1, 5, 70), "C": normal(1, 1, 5, 70, seed=1), "D": normal(19),
               "z": normal(1, 19, 70, seed=2), "delta_bias": normal(19, seed=1)}
    tensors[name].view(-1)[-1] = float("nan")
    inputs = ScanInputs(**tensors, order=None, shared=False, summed=False, delta_softplus=True)
    y, _, kept = scan_forward(inputs, keep=True, lanes=lanes)
    assert y[..., -1].isnan().any(), "a NaN of the last step is not seen in the last step"
    assert any(grad.isnan().any() for grad in scan_backward(inputs, kept, torch.ones_like(y), None, lanes=lanes))


LAYOUTS = {
    "expanded": lambda m: m[:1].expand(m.shape),
    "expanded over the steps": lambda m: m[..., :1].expand(m.shape),
    "transposed": lambda m: m.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda m: m.repeat_interleave(2, -1).repeat_interleave(3, 0)[::3, ..., ::2] if m.ndim > 1
    else m.repeat_interleave(2)[::2],
    "lazily negated": lambda m: torch.complex(torch.zeros_like(m), -m).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "delta_bias", "order", "dy"])
def test_strides_of_an_input_change_nothing_with_gradients(path: str, name: str, layout: str) -> None:
    if name == "order" and layout in ("expanded over the steps", "lazily negated"):
        return  # no permutations
    inputs = directional()
    dy = normal(2, 6, 45, seed=9)
    given = LAYOUTS[layout](dy if name == "dy" else inputs[name])
    if name == "dy":
        dy = given
    else:
        inputs[name] = given
    results = []
    for scan in (selective_scan_directions, one_after_another):
        leaves = {n: (m if scan is selective_scan_directions else m.clone(memory_format=torch.contiguous_format))
                  .detach().requires_grad_(n != "order") for n, m in inputs.items()}
        y = scan(**leaves)
        y = y if scan is selective_scan_directions else y.unflatten(1, (4, -1)).sum(1)
        results.append([y, *torch.autograd.grad(y, [m for n, m in leaves.items() if n != "order"], dy)])
    for part, a, b in zip(("y", *inputs), *results, strict=False):
        assert error(a, b) < 1e-4, part


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_orders_of_any_integer_type_and_layout_are_read_alike(path: str, dtype: torch.dtype, layout: str) -> None:
    inputs = directional()
    order = LAYOUTS[layout](inputs.pop("order"))
    expected = selective_scan_directions(**inputs, order=order.contiguous().clone())
    assert error(selective_scan_directions(**inputs, order=LAYOUTS[layout](order.to(dtype))), expected) < 1e-6


@pytest.mark.parametrize("wrong", ["too large", "negative", "twice", "wraps around", "float", "bool", "one row"])
def test_what_is_no_order_is_refused_in_one_sentence(path: str, wrong: str) -> None:
    inputs = directional()
    order = inputs["order"].clone()
    if wrong in ("too large", "negative", "twice", "wraps around"):
        order[1, 7] = {"too large": 45, "negative": -1, "twice": int(order[1, 8]), "wraps around": 2**32}[wrong]
    else:
        order = {"float": order.float(), "bool": order > 3, "one row": order[0]}[wrong]
    with pytest.raises(ValueError, match="order"):
        selective_scan_directions(**{**inputs, "order": order})


@pytest.mark.parametrize("axis", ["batch", "inner", "width", "states"])
def test_empty_axes_are_refused_by_the_operator_and_its_functions(path: str, axis: str) -> None:
    size = {"batch": 2, "inner": 3, "width": 5, "states": 4, axis: 0}
    inner, length = size["inner"], 2 * size["width"]
    inputs = {"u": normal(size["batch"], inner, length), "delta": normal(size["batch"], 2 * inner, length),
              "A": normal(2 * inner, size["states"]), "B": normal(size["batch"], 2, size["states"], length),
              "C": normal(size["batch"], 2, size["states"], length), "D": normal(2 * inner)}
    order = torch.arange(length).repeat(2, 1)
    with pytest.raises(ValueError, match=r"empty axes|at least 1"):
        selective_scan_directions(**inputs, delta_bias=normal(2 * inner), order=order)
    if path == "kernel":
        with pytest.raises(ValueError, match="empty axes"):
            torch.ops.ens.selective_scan(*inputs.values(), None, None, order, True, True, True, True)


@needs_kernel
def test_nothing_that_does_not_fit_reaches_the_kernel() -> None:
    u, A, B, order = normal(2, 6, 30), -torch.ones(6, 4), normal(2, 2, 4, 30), torch.arange(30).repeat(2, 1)
    fits = ScanInputs(u, u.abs(), A, B, B, A[:, 0], None, None, order, False, False, False)
    _, last, kept = scan_forward(fits, keep=True)
    for wrong in (
        {"u": u[:1]}, {"u": u.double()}, {"u": u[..., :29]}, {"delta": u[:, :4]}, {"delta": u[..., :29]},
        {"A": A[:4]}, {"A": A[:, :3]}, {"A": A[0]}, {"B": B[:, :1]}, {"B": B.half()}, {"C": B[..., :29]}, {"C": B[:1]},
        {"D": A[:, :1]}, {"D": A[:5, 0]}, {"z": u[:, :3]}, {"z": u[0]}, {"delta_bias": u[0, 0]}, {"u": u.to("meta")},
        {"order": order[:1]}, {"order": order[:, :29]}, {"order": order.float()}, {"order": order + 1},
        {"order": order // 2}, {"summed": True}, {"shared": True}, {"u": u[:, :3], "delta": u[:, :3], "shared": True},
    ):
        inputs = fits._replace(**wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            scan_forward(inputs, keep=True)
        with pytest.raises(ValueError):
            scan_backward(inputs, kept, u, None)
    for checkpoints, dy, dlast in ((kept[:1], u, None), (kept.double(), u, None), (kept, u[:1], None),
                                   (kept, u.double(), None), (kept, u, last[:1]), (kept, u, last.double())):
        with pytest.raises(ValueError, match="float32"):
            scan_backward(fits, checkpoints, dy, dlast)
    with pytest.raises(ValueError, match="lanes"):
        scan_forward(fits, keep=False, lanes=5)


def op_arguments(*, keep: bool) -> tuple[object, ...]:
    inputs = directional()
    order = inputs.pop("order").to(torch.int32)
    u, delta, A, B, C, D, bias = (m.requires_grad_() for m in inputs.values())
    return u, delta, A, B, C, D, None, bias, order, True, True, True, keep


@needs_kernel
@pytest.mark.parametrize("keep", [True, False])
def test_operator_passes_opcheck(keep: bool) -> None:
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    results = torch.library.opcheck(torch.ops.ens.selective_scan, op_arguments(keep=keep), test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


@needs_kernel
def test_operator_returns_no_uninitialised_memory() -> None:
    arguments = op_arguments(keep=True)
    results = []
    for _ in range(5):
        torch.full((200, 200), float("nan"))  # what a new tensor may find in its memory
        results.append(torch.ops.ens.selective_scan(*arguments))
    for outputs in results:
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0], strict=True))


@needs_kernel
@pytest.mark.slow
def test_operator_passes_opcheck_with_dynamic_shapes_and_gradients() -> None:
    check = "test_aot_dispatch_dynamic"
    results = torch.library.opcheck(torch.ops.ens.selective_scan, op_arguments(keep=True), test_utils=check)
    assert results == {check: "SUCCESS"}


@needs_kernel
def test_compiled_scan_equals_the_eager_one() -> None:
    inputs = directional()
    compiled = torch.compile(selective_scan_directions, backend="aot_eager", fullgraph=True)
    results = []
    for scan in (selective_scan_directions, compiled):
        leaf = inputs["u"].clone().requires_grad_()
        y = scan(**{**inputs, "u": leaf})
        results.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_flop_counter_sees_the_scan(path: str) -> None:
    u, A, B = normal(2, 6, 30), -torch.ones(6, 4), normal(2, 4, 30)
    with FlopCounterMode(display=False) as counter:
        selective_scan(u, u.abs(), A, B, B, z=u)
    assert counter.get_total_flops() == scan_flops(2, 6, 30, 4, gated=True) == 2 * 6 * 30 * (9 * 4 + 2)
    meta = [m.to("meta") for m in (u, u, A, B, B)]
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(*meta)
    assert isinstance(y, Tensor) and y.shape == u.shape and counter.get_total_flops() == scan_flops(2, 6, 30, 4)


def test_missing_kernel_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernel(monkeypatch)
    ens.ops.scan_op._warn_about_the_slow_path.cache_clear()
    u, A, B = normal(1, 2, 5), -torch.ones(2, 3), normal(1, 3, 5)
    with pytest.warns(RuntimeWarning, match="compiler"):
        selective_scan(u, u.abs(), A, B, B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan(u, u.abs(), A, B, B)


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of this checkout, unpacked; built in a copy, so that no earlier build is found."""
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(ROOT / "ens", source / "ens", ignore=shutil.ignore_patterns("__pycache__", "*.so", "pretrained"))
    shutil.copytree(ROOT / "search_spaces", source / "search_spaces")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir",
                    str(wheels), str(source)], check=True, env={**os.environ, **environment})
    zipfile.ZipFile(next(wheels.glob("ens-*.whl"))).extractall(folder / "installed")
    return folder / "installed"


SCAN_TWICE = """
import warnings
import torch
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    from ens.ops.selective_scan import scan_backends, selective_scan
    u, A, B = torch.ones(1, 2, 5), -torch.ones(2, 3), torch.ones(1, 3, 5)
    results = [selective_scan(u, u, A, B, B) for _ in range(2)]
print(scan_backends()["cpu"], sum("compiler" in str(entry.message) for entry in said), sep="|", end="")
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_wheel_holds_the_kernel_and_without_a_compiler_says_once_that_it_does_not(tmp_path: Path,
                                                                                  compiler: bool) -> None:
    if compiler and shutil.which("g++") is None:
        pytest.skip("no C++ compiler: the wheel with the kernel was not built")
    installed = build_wheel(tmp_path, **({} if compiler else {"CC": "/no/compiler", "CXX": "/no/compiler"}))
    assert bool(list(installed.glob("ens/ops/native/kernels*"))) == compiler
    output = subprocess.run([sys.executable, "-c", SCAN_TWICE], check=True, capture_output=True, encoding="utf-8",
                            cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)}).stdout
    path, warned = output.split("|")
    assert path.startswith("native kernel" if compiler else "chunked PyTorch path") and warned == str(int(not compiler))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None,
                    reason="no g++ on Linux: the kernel was not run with sanitizers")
def test_sanitizers_find_nothing() -> None:
    """scripts/sanitize builds the kernel with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests."""
    result = subprocess.run(["scripts/sanitize"], cwd=ROOT, capture_output=True, encoding="utf-8",
                            env={**os.environ, "PYTHON": sys.executable})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_bad_orders_raise(path: str) -> None:
    inputs = directional()
    with pytest.raises(ValueError, match="order"):
        selective_scan_directions(**{**inputs, "order": inputs["order"][:3]})
    with pytest.raises((ValueError, IndexError)):
        selective_scan_directions(**{**inputs, "order": inputs["order"] + 1})


@needs_kernel
def test_threads_change_nothing_but_rounding() -> None:
    inputs = ScanInputs(normal(1, 48, 2000), normal(1, 48, 2000).abs(), -torch.exp(normal(48, 16)),
                        normal(1, 1, 16, 2000), normal(1, 1, 16, 2000, seed=1), None, None, None, None, False, False,
                        False)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, last, kept = scan_forward(inputs, keep=True)
            results.append([y, last, *scan_backward(inputs, kept, normal(1, 48, 2000, seed=2), None)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand: CUDA agreement was not checked")
def test_cuda_agrees_with_the_cpu() -> None:
    inputs = directional()
    y = selective_scan_directions(**inputs)
    other = selective_scan_directions(**{name: m.cuda() for name, m in inputs.items()})
    assert error(other.cpu(), y) < 1e-4
