"""Mamba-1's selective scan (arXiv 2312.00752, algorithm 2): a readable loop and a chunked form of the same sums.

Shapes: B batch, D channels, G groups (channel d uses group d // (D/G)), N states, L length, K chunks, T steps of a
chunk. The state is kept in float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = ⟨C_t, h_t⟩ + D u_t, then y·SiLU(z): mamba-ssm's arguments.

    u and delta (B, D, L), A (D, N) negative, B and C (B, N, L) or (B, G, N, L), D and delta_bias (D), z (B, D, L) ->
    y (B, D, L) in u's dtype, and the last state (B, D, N) on request. float16 and bfloat16 input is accepted. NaN in
    gives NaN out. Raises ValueError for shapes that do not fit, zero length included.
    """
    raw = _check(u, delta, A, B, C, D, z, delta_bias)
    y, state = _scan_chunked(*_prepare(raw, delta_softplus=delta_softplus))
    return _finish(y, state, raw, return_last_state=return_last_state)


def selective_scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                        return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Readable twin of `selective_scan`, one step at a time; same arguments, same result, slow."""
    raw = _check(u, delta, A, B, C, D, z, delta_bias)
    u_BDL, delta_BDL, A_DN, B_BDNL, C_BDNL = _prepare(raw, delta_softplus=delta_softplus, expand=True)
    state = u_BDL.new_zeros(u.shape[0], *A.shape)
    steps = []
    for t in range(u.shape[2]):
        step_BD1 = delta_BDL[:, :, t, None]
        state = torch.exp(step_BD1 * A_DN) * state + step_BD1 * B_BDNL[..., t] * u_BDL[:, :, t, None]
        steps.append((state * C_BDNL[..., t]).sum(-1))
    return _finish(torch.stack(steps, -1), state, raw, return_last_state=return_last_state)


class _Inputs(NamedTuple):
    """Checked arguments, B and C as (B, G, N, L)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
           delta_bias: Tensor | None) -> _Inputs:
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u is (B, D, L) without empty axes, got {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A is (D, N) with D {channels} and N at least 1, got {tuple(A.shape)}")
    for name, value in (("delta", delta), ("z", z)):
        if value is not None and value.shape != u.shape:
            raise ValueError(f"{name} has the shape of u, {tuple(u.shape)}, got {tuple(value.shape)}")
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} is (D) with D {channels}, got {tuple(value.shape)}")
    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))
    for name, value in (("B", B), ("C", C)):
        if (value.ndim != 4 or (value.shape[0], value.shape[2], value.shape[3]) != (batch, A.shape[1], length)
                or not value.shape[1] or channels % value.shape[1]):
            raise ValueError(f"{name} is (B, N, L) or (B, G, N, L), G dividing D, with B {batch}, D {channels}, "
                             f"N {A.shape[1]}, L {length}; got {tuple(value.shape)}")
    if B.shape != C.shape:
        raise ValueError(f"B and C have the same number of groups, got {B.shape[1]} and {C.shape[1]}")
    return _Inputs(u, delta, A, B, C, D, z, delta_bias)


def _prepare(raw: _Inputs, *, delta_softplus: bool, expand: bool = False) -> tuple[Tensor, ...]:
    """(u, Δ, A, B, C) in the state's dtype, Δ with bias and softplus; B and C per channel where `expand`."""
    dtype = torch.promote_types(raw.u.dtype, torch.float32)
    u, delta, A, B, C = (m.to(dtype) for m in raw[:5])
    delta = delta if raw.delta_bias is None else delta + raw.delta_bias.to(dtype)[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    if expand:
        B, C = (m.repeat_interleave(u.shape[1] // m.shape[1], 1) for m in (B, C))
    return u, delta, A, B, C


def _finish(y: Tensor, state: Tensor, raw: _Inputs, *, return_last_state: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Skip, gate and the dtype of the input."""
    if raw.D is not None:
        y = y + raw.u.to(y.dtype) * raw.D.to(y.dtype)[:, None]
    if raw.z is not None:
        y = y * F.silu(raw.z.to(y.dtype))
    y = y.to(raw.u.dtype)
    return (y, state) if return_last_state else y


def _scan_chunked(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """All chunks step by step at once from a zero state, then the state that enters each chunk, then its effect.

    About 2·√L vectorised steps instead of L. Returns y (B, D, L) and the last state (B, D, N).
    """
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    chunk = math.isqrt(length - 1) + 1
    pad = -length % chunk
    # Padded steps have Δ = 0: the state passes them unchanged.
    # Steps first: each of the vectorised steps then reads one contiguous slab.
    u_, delta_ = (F.pad(m, (0, pad)).view(batch, groups, -1, 1, (length + pad) // chunk, chunk).movedim(-1, 0)
                  .contiguous() for m in (u, delta))
    B_, C_ = (F.pad(m, (0, pad)).view(batch, groups, 1, states, -1, chunk).movedim(-1, 0).contiguous() for m in (B, C))
    A_ = A.view(groups, -1, states, 1)
    state = A.new_zeros(batch, groups, channels // groups, states, u_.shape[-1])
    write = delta_ * u_
    inside = []
    for t in range(chunk):
        state = torch.addcmul(write[t] * B_[t], torch.exp(delta_[t] * A_), state)
        inside.append((state * C_[t]).sum(3))
    elapsed = delta_.cumsum(0)
    whole = torch.exp(elapsed[-1] * A_).movedim(-1, 0).contiguous()
    entering = [torch.zeros_like(whole[0])]
    for decay, left in zip(whole, state.movedim(-1, 0), strict=True):
        entering.append(decay * entering[-1] + left)
    entered = torch.stack(entering[:-1], -1)
    y = torch.stack([part + (torch.exp(elapsed[t] * A_) * entered * C_[t]).sum(3) for t, part in enumerate(inside)], -1)
    return y.reshape(batch, channels, -1)[..., :length], entering[-1].reshape(batch, channels, states)


def scan_flops(batch: int, channels: int, length: int, states: int, *, gated: bool = False) -> int:
    """Floating-point operations of one scan in VMamba's convention: 9·B·L·D·N + B·D·L (+ B·D·L with z)."""
    return batch * length * channels * (9 * states + 1 + gated)
