"""Mamba-1's selective scan (arXiv 2312.00752, algorithm 2) in one direction, and in several directions of an image.

Shapes: B batch, D channels, G groups (channel d uses group d // (D/G)), N states, L length. The state is kept in
float32 (float64 for float64 input). CPU: the native kernel, or a chunked PyTorch path where it is not built. CUDA:
mamba-ssm where installed, else the chunked path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ens.ops.checks import check_real
from ens.ops.native import ScanInputs, load_kernels, why_no_kernels
from ens.ops.scan_op import scan_chunked, scan_for_export, scan_op, uses_kernel
from ens.ops.scan_order import invert_order, reorder, to_indices


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = ⟨C_t, h_t⟩ + D u_t, then y·SiLU(z): mamba-ssm's arguments.

    u and delta (B, D, L), A (D, N) negative, B and C (B, N, L) or (B, G, N, L), D and delta_bias (D), z (B, D, L) ->
    y (B, D, L) in u's dtype, and the last state (B, D, N) on request. float16 and bfloat16 input is accepted. NaN in
    gives NaN out. Raises ValueError for shapes that do not fit, empty axes included, and for complex or integer input.
    """
    given = _check(u, delta, A, B, C, D, z, delta_bias)
    y, last = _run(given, delta_softplus=delta_softplus)
    return (y, last) if return_last_state else y


def selective_scan_directions(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor,
                              order: Tensor, *, merge: bool = True) -> Tensor:
    """G scans of one u, each in its own order, Δ with softplus: VMamba's four-direction scan without reordered copies.

    u (B, E, L) in pixel order, delta (B, G·E, L) direction-major, A (G·E, N), B and C (B, G, N, L), D and delta_bias
    (G·E), order (G, L) with a permutation of the pixels in every row (`scan_order`) -> the sum of the scans (B, E, L),
    or each of them (B, G·E, L) without `merge`, in pixel order. The kernel reads and writes through `order`, fastest
    where the channels are innermost in memory (channels-last). Raises ValueError for shapes that do not fit, and for
    an order that is no permutation.
    """
    if order.ndim != 2 or B.ndim != 4 or order.shape != (B.shape[1], B.shape[3]):
        raise ValueError(f"order is (G, L) and B (B, G, N, L), got {tuple(order.shape)} and {tuple(B.shape)}")
    groups = order.shape[0]
    given = _check(u, delta, A, B, C, D, None, delta_bias, directions=groups)
    if cuda_scan(u) is None:
        return _run(given, delta_softplus=True, order=order, merge=merge)[0]
    back = invert_order(order)  # first, because it refuses what is no permutation
    index = to_indices(order)
    ordered = [reorder(m, index) for m in
               (u[:, None].expand(-1, groups, -1, -1), delta.unflatten(1, (groups, -1)), B, C)]
    y, _ = _run(_Inputs(ordered[0].flatten(1, 2), ordered[1].flatten(1, 2), A, ordered[2], ordered[3], D, None,
                        delta_bias), delta_softplus=True)
    parts = reorder(y.unflatten(1, (groups, -1)), back)
    return parts.sum(1) if merge else parts.flatten(1, 2)


def selective_scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                        return_last_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Readable twin of `selective_scan`, one step at a time; same arguments, same result, slow."""
    given = _check(u, delta, A, B, C, D, z, delta_bias)
    u_BDL, delta_BDL, A_DN, B_BGNL, C_BGNL, D, z, delta_bias = _to_state_dtype(given)
    delta_BDL = delta_BDL if delta_bias is None else delta_BDL + delta_bias[:, None]
    delta_BDL = F.softplus(delta_BDL) if delta_softplus else delta_BDL
    B_BDNL, C_BDNL = (m.repeat_interleave(u.shape[1] // m.shape[1], 1) for m in (B_BGNL, C_BGNL))
    state = u_BDL.new_zeros(u.shape[0], *A.shape)
    steps = []
    # unbind, not an index a step: the gradient of an index is as large as what it indexes.
    for u_BD, delta_BD, B_BDN, C_BDN in zip(*(m.unbind(-1) for m in (u_BDL, delta_BDL, B_BDNL, C_BDNL)), strict=True):
        step_BD1 = delta_BD[..., None]
        state = torch.exp(step_BD1 * A_DN) * state + step_BD1 * B_BDN * u_BD[..., None]
        steps.append((state * C_BDN).sum(-1))
    y = torch.stack(steps, -1)
    y = y if D is None else y + u_BDL * D[:, None]
    y = (y if z is None else y * F.silu(z)).to(u.dtype)
    return (y, state) if return_last_state else y


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
           delta_bias: Tensor | None, *, directions: int = 1) -> _Inputs:
    """`directions` groups share u, which then has D / directions channels."""
    check_real("selective_scan", {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z,
                                  "delta_bias": delta_bias})
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u is (B, D, L) without empty axes, got {tuple(u.shape)}")
    batch, channels, length = u.shape[0], u.shape[1] * directions, u.shape[2]
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A is (D, N) with D {channels} and N at least 1, got {tuple(A.shape)}")
    if delta.shape != (batch, channels, length):
        raise ValueError(f"delta is (B, D, L), {(batch, channels, length)} beside this u, got {tuple(delta.shape)}")
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z has the shape of u, {tuple(u.shape)}, got {tuple(z.shape)}")
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


def _to_state_dtype(given: _Inputs) -> _Inputs:
    dtype = torch.promote_types(given.u.dtype, torch.float32)
    # A cast that changes nothing is still a node of an exported graph.
    return _Inputs(*(m if m is None or m.dtype == dtype else m.to(dtype) for m in given))  # type: ignore[arg-type]


def _run(given: _Inputs, *, delta_softplus: bool, order: Tensor | None = None,
         merge: bool = False) -> tuple[Tensor, Tensor]:
    """(y in u's dtype, last state); with `order` the groups share u, and y is their sum where `merge`."""
    fused = cuda_scan(given.u)
    if fused is not None and order is None:
        return fused(*given, delta_softplus, True)
    u, delta, A, B, C, D, z, delta_bias = _to_state_dtype(given)
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, order, order is not None, merge, delta_softplus)
    if torch.compiler.is_exporting():
        y, last = scan_for_export(inputs)
    elif torch.compiler.is_compiling() and not uses_kernel(u):
        y, last = scan_chunked(inputs)
    else:
        keep = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in given)
        y, last, _ = scan_op(*inputs, keep)
    return y if y.dtype == given.u.dtype else y.to(given.u.dtype), last


def cuda_scan(u: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """mamba-ssm's fused scan for a CUDA tensor, None for others and where mamba-ssm is not installed."""
    return _load_mamba_ssm() if u.is_cuda and u.dtype != torch.float64 else None


@functools.cache
def _load_mamba_ssm() -> Callable[..., tuple[Tensor, Tensor]] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:  # also what it raises without its CUDA extension
        return None
    return selective_scan_fn


def scan_backends() -> dict[str, str]:
    """What a selective scan runs in on each device, for people to read."""
    library = load_kernels()
    widths = {16: "AVX-512", 8: "AVX2", 4: "portable"}
    native = f"native kernel ({widths[library.ens_scan_lanes()]})" if library is not None else ""
    return {"cpu": native or f"chunked PyTorch path (native kernel {why_no_kernels()})",
            "cuda": "mamba-ssm" if _load_mamba_ssm() else "chunked PyTorch path (mamba-ssm not installed)"}
