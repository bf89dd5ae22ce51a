"""The selective scan as one PyTorch operator, `torch.ops.ens.selective_scan`: native kernel or chunked PyTorch below.

Shapes: B batch, D channels, G groups, N states, L length, K chunks, T steps of a chunk. As one operator it is seen by
FlopCounterMode, torch.compile and torch.export, and the backward pass keeps no state sequence in memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ens.ops.native import (
    ScanInputs,
    checkpoint_shape,
    like_output,
    load_kernels,
    scan_backward,
    scan_forward,
    why_no_kernels,
)
from ens.ops.scan_order import invert_order, reorder, to_indices

HAS_KERNEL = load_kernels() is not None


@functools.cache
def _warn_about_the_slow_path() -> None:
    warnings.warn(f"the native scan kernel {why_no_kernels()}, so scans run as PyTorch operators, selective scans more "
                  "than ten times slower; install a C++ compiler and reinstall ens", RuntimeWarning, stacklevel=4)


def uses_kernel(u: Tensor) -> bool:
    """Whether a scan of u runs in the native kernel: float32 on the CPU, kernel built; says once why there is none.

    On the meta device every scan is the kernel's: what is counted there must not depend on the machine.
    """
    if u.is_meta or u.device.type != "cpu" or u.dtype != torch.float32:
        return u.is_meta
    if not HAS_KERNEL and not torch.compiler.is_compiling():
        _warn_about_the_slow_path()
    return HAS_KERNEL


@torch.library.custom_op("ens::selective_scan", mutates_args=())
def scan_op(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
            delta_bias: Tensor | None, order: Tensor | None, shared: bool, summed: bool, delta_softplus: bool,
            keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (`like_output`), last state (B, D, N), and what the backward pass needs (empty unless `keep`)."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, order, shared, summed, delta_softplus)
    if uses_kernel(u):
        return scan_forward(inputs, keep=keep)
    y, last = scan_chunked(inputs)
    return torch.empty_like(like_output(inputs)).copy_(y), last, u.new_empty(0)


@scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
      delta_bias: Tensor | None, order: Tensor | None, shared: bool, summed: bool, delta_softplus: bool,
      keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, order, shared, summed, delta_softplus)
    kept = checkpoint_shape(inputs) if keep and uses_kernel(u) else (0,)
    return torch.empty_like(like_output(inputs)), u.new_empty(u.shape[0], A.shape[0], B.shape[2]), u.new_empty(kept)


@torch.library.custom_op("ens::selective_scan_backward", mutates_args=())
def scan_backward_op(dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, u: Tensor, delta: Tensor, A: Tensor,
                     B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
                     order: Tensor | None, shared: bool, summed: bool, delta_softplus: bool) -> list[Tensor]:
    """Gradients in the order of the inputs; those of B and C as (B, G, L, N); z's is empty without z. Kernel only."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, order, shared, summed, delta_softplus)
    return list(scan_backward(inputs, checkpoints, dy, dlast))


@scan_backward_op.register_fake
def _(dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
      D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, order: Tensor | None, shared: bool, summed: bool,
      delta_softplus: bool) -> list[Tensor]:
    batch, groups, states, length = B.shape
    dB, dC = (u.new_empty(batch, groups, length, states) for _ in range(2))
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    channels, decays = A.shape
    return [torch.empty_like(u), torch.empty_like(delta), u.new_empty(channels, decays), dB, dC, u.new_empty(channels),
            dz, u.new_empty(channels)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.flags = inputs[9:12]
    ctx.save_for_backward(output[2], *inputs[:9])


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    checkpoints, *tensors = ctx.saved_tensors
    if uses_kernel(tensors[0]):
        grads = scan_backward_op(dy, dlast, checkpoints, *tensors, *ctx.flags)
        grads[3:5] = [m.transpose(2, 3) for m in grads[3:5]]
    else:
        grads = _chunked_gradients(ScanInputs(*tensors, *ctx.flags), dy, dlast)
    kept: list[Tensor | None] = [None if m is None else grad for m, grad in zip(tensors[:8], grads, strict=True)]
    return (*kept, None, None, None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup_context)


def scan_flops(batch: int, channels: int, length: int, states: int, *, gated: bool = False) -> int:
    """Floating-point operations of one scan in VMamba's convention: 9·B·L·D·N + B·D·L (+ B·D·L with z)."""
    return batch * length * channels * (9 * states + 1 + gated)


@register_flop_formula(torch.ops.ens.selective_scan)
def _count_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *args: Any, **kwargs: Any) -> int:
    return scan_flops(delta[0], A[0], delta[2], B[2], gated=z is not None)


@register_flop_formula(torch.ops.ens.selective_scan_backward)
def _count_scan_backward(dy: Any, dlast: Any, checkpoints: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any,
                         z: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * scan_flops(delta[0], A[0], delta[2], B[2], gated=z is not None)


def _chunked_gradients(inputs: ScanInputs, dy: Tensor, dlast: Tensor) -> list[Tensor | None]:
    """Gradients of the chunked path by running it again: the states of one scan live at a time."""
    with torch.enable_grad():
        leaves: list[Any] = [None if m is None else m.detach().requires_grad_() for m in inputs[:8]]
        rest: tuple[Any, ...] = inputs[8:]
        outputs = scan_chunked(ScanInputs(*leaves, *rest))
        given = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(outputs, given, (dy, dlast)))
    return [None if leaf is None else next(grads) for leaf in leaves]


def scan_for_export(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan as one loop over the steps: `torch.scan`, or what `tracing_steps` puts in its place.

    Correct for any length, and slow: some ten small operators a step. No gradients. y, last state (B, D, N).
    """
    return _scan_with(_scan_steps, inputs)


def scan_chunked(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan in PyTorch operators: every device and float type, differentiable. y, last state (B, D, N)."""
    return _scan_with(_scan_groups, inputs)


def _scan_with(scan: Callable[..., tuple[Tensor, Tensor]], inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Everything around the recurrence: Δ, orders, skip, sum over the groups, gate."""
    u, delta, A, B, C, D, z, delta_bias, order, shared, summed, delta_softplus = inputs
    groups = B.shape[1]
    grouped = u[:, None].expand(-1, groups, -1, -1) if shared else u.unflatten(1, (groups, -1))
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    steps = (F.softplus(steps) if delta_softplus else steps).unflatten(1, (groups, -1))
    if order is None:
        y, last = scan(grouped, steps, A, B, C)
    else:
        back = invert_order(order)  # first, because it refuses what is no permutation
        index = to_indices(order)
        ordered = [reorder(m, index) for m in (grouped, steps, B, C)]
        y, last = scan(ordered[0], ordered[1], A, ordered[2], ordered[3])
        y = reorder(y, back)
    if D is not None:
        y = y + grouped * D.view(groups, -1, 1)
    y = y.sum(1) if summed else y.flatten(1, 2)
    return (y if z is None else y * F.silu(z)), last


def _scan_steps(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step after the other; shapes as for `_scan_groups`."""
    first = u.new_zeros(*u.shape[:3], A.shape[1])
    last, y = _run_steps.get()(first, A.view(*u.shape[1:3], -1), tuple(m.movedim(-1, 0) for m in (u, delta, B, C)))
    return y.movedim(0, -1), last.flatten(1, 2)


def _call_scan(state: Tensor, A: Tensor, steps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """PyTorch's own loop operator: state (B, G, P, N), A (G, P, N), steps (L, …) -> last state, y (L, B, G, P)."""
    from torch._higher_order_ops.scan import scan as torch_scan  # not public yet, so needed by exports alone

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u_t, delta_t, B_t, C_t = now
        state = torch.exp(delta_t[..., None] * A) * state + (delta_t * u_t)[..., None] * B_t[:, :, None]
        return state, (state * C_t[:, :, None]).sum(-1)

    last, y = torch_scan(step, state, steps)
    return last, y


_run_steps: ContextVar[Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]] = ContextVar(
    "run_steps", default=_call_scan)


@contextlib.contextmanager
def tracing_steps(call: Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While it is open, exported scans run their steps by `call(state, A, steps)` (see `_call_scan`)."""
    token = _run_steps.set(call)
    try:
        yield
    finally:
        _run_steps.reset(token)


def _scan_groups(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """All chunks step by step at once from a zero state, then the state that enters each chunk, then its effect.

    u, delta (B, G, D/G, L), Δ ready -> y likewise, last state (B, D, N). About 2·√L vectorised steps instead of L.
    """
    batch, groups, per_group, length = u.shape
    states = A.shape[1]
    chunk = math.isqrt(length - 1) + 1
    pad = -length % chunk
    chunks = (length + pad) // chunk
    # Padded steps have Δ = 0: the state passes them unchanged. Steps first: each step then reads one contiguous slab.
    u_, delta_ = (F.pad(m, (0, pad)).reshape(batch, groups, per_group, 1, chunks, chunk).movedim(-1, 0).contiguous()
                  for m in (u, delta))
    B_, C_ = (F.pad(m, (0, pad)).reshape(batch, groups, 1, states, chunks, chunk).movedim(-1, 0).contiguous().unbind()
              for m in (B, C))
    A_ = A.view(groups, per_group, states, 1)
    state = A.new_zeros(batch, groups, per_group, states, chunks)
    elapsed = [torch.zeros_like(delta_[0])]
    inside = []
    for step, write, B_t, C_t in zip(delta_.unbind(), (delta_ * u_).unbind(), B_, C_, strict=True):
        state = torch.addcmul(write * B_t, torch.exp(step * A_), state)
        inside.append((state * C_t).sum(3))
        elapsed.append(elapsed[-1] + step)
    whole = torch.exp(elapsed[-1] * A_).movedim(-1, 0).contiguous()
    entering = [torch.zeros_like(whole[0])]
    for decay, left in zip(whole.unbind(), state.unbind(-1), strict=True):
        entering.append(decay * entering[-1] + left)
    entered = torch.stack(entering[:-1], -1)
    y = torch.stack([part + (torch.exp(since * A_) * entered * C_t).sum(3)
                     for part, since, C_t in zip(inside, elapsed[1:], C_, strict=True)], -1)
    return y.flatten(3)[..., :length], entering[-1].flatten(1, 2)
