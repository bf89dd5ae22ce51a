"""Mamba-2's recurrence (state-space duality, arXiv 2405.21060), causal and non-causal.

Shapes: B batch, L length, H heads, P channels of a head, G groups (head h uses group h // (H/G)), N states,
K chunks, T steps of a chunk, R = H/G. The causal form is chunked matrix products, which edge runtimes run well; eager
float32 on the CPU takes the native scan kernel instead, CUDA takes mamba-ssm where installed. Every exponent is a sum
of log decays (never positive), so nothing is ever divided by a cumulative decay, which underflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ens.ops.checks import check_real
from ens.ops.scan_op import scan_op, uses_kernel


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 64, D: Tensor | None = None, *,
        dt_bias: Tensor | None = None, dt_softplus: bool = False, reverse: bool = False) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_tᵀ, y_t = C_t h_t + D x_t: mamba-ssm's arguments.

    x (B, L, H, P), dt (B, L, H) positive (or `dt_softplus`), A (H) negative, B and C (B, L, G, N), D (H) ->
    (B, L, H, P) in x's dtype; half-precision input is computed in float32. `reverse` runs the recurrence from the
    last step to the first. `chunk_size` concerns mamba-ssm and the chunked form only. Raises ValueError for shapes that
    do not fit, empty axes included, and for complex or integer input.
    """
    _check(x, dt, A, B, C, D, dt_bias)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
    D = None if D is None else D.to(dtype)
    fused = _load_mamba_ssm() if x.is_cuda and x.dtype != torch.float64 else None
    if fused is not None:
        return _ssd_cuda(fused, x, dt, A, B, C, chunk_size, D, reverse=reverse)
    if not torch.compiler.is_compiling() and uses_kernel(dt):
        return _ssd_kernel(x.to(dtype), dt, A, B, C, D, reverse=reverse).to(x.dtype)
    return ssd_chunked(x.to(dtype), dt, A, B, C, chunk_size, D, reverse=reverse).to(x.dtype)


def ssd_rows(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk_size: int = 16) -> Tensor:
    """Every row of a map forward and backward, added: what `ssd` and its reverse give row by row, D once.

    Steps last: x (B, H, P, R, L), dt (B, H, R, L) positive, A and D (H), B and C (B, N, R, L) -> like x. Compiled,
    exported, and where nothing faster runs it is matrix products in the edge operator contract, rank 5 at most.
    """
    check_real("ssd_rows", {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D})
    if x.ndim != 5 or 0 in (*x.shape, *B.shape):
        raise ValueError(f"x is (B, H, P, R, L) and B (B, N, R, L) without empty axes, got {tuple(x.shape)} and "
                         f"{tuple(B.shape)}")
    if dt.shape != (*x.shape[:2], *x.shape[3:]) or A.shape != (x.shape[1],) or D.shape != A.shape:
        raise ValueError(f"x is (B, H, P, R, L), dt (B, H, R, L), A and D (H), got {tuple(x.shape)}, "
                         f"{tuple(dt.shape)}, {tuple(A.shape)} and {tuple(D.shape)}")
    if B.ndim != 4 or B.shape != C.shape or (B.shape[0], *B.shape[2:]) != (x.shape[0], *x.shape[3:]):
        raise ValueError(f"B and C are (B, N, R, L) beside x {tuple(x.shape)}, got {tuple(B.shape)} and "
                         f"{tuple(C.shape)}")
    if torch.compiler.is_compiling() or not (uses_kernel(dt) or (x.is_cuda and _load_mamba_ssm())):
        return _rows_as_products(x, dt, A, B, C, chunk_size) + x * D.view(-1, 1, 1, 1)
    x_, B_, C_ = (m.movedim((-2, -1), (1, 2)).flatten(0, 1) for m in (x, B[:, None], C[:, None]))
    dt_ = dt.permute(0, 2, 3, 1).flatten(0, 1)
    y = ssd(x_, dt_, A, B_, C_, D=D) + ssd(x_, dt_, A, B_, C_, reverse=True)
    return y.unflatten(0, (x.shape[0], -1)).movedim((1, 2), (-2, -1))


def _rows_as_products(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, size: int) -> Tensor:
    """`ssd_rows` without D. Between two steps of a chunk both directions have one decay, so they share its product.

    K counts the chunks of all rows here. Heads are rows of the matrices wherever they share B and C: a product with a
    matrix that is broadcast over them would copy it on edge runtimes.
    """
    batch, heads, width, rows, length = x.shape
    chunks = _count_chunks(length, size)

    def cut(m: Tensor) -> Tensor:  # (…, R, L) -> (…, K, T); padded steps have dt = 0
        return _pad_steps(m, -1, chunks * size - length).reshape(*m.shape[:-2], rows * chunks, size)

    decay_BHKT = cut(dt * A.view(-1, 1, 1))
    decay_BKHT = decay_BHKT.transpose(1, 2).contiguous()  # else its products would copy the constants
    x_BKHPT = cut(x * dt[:, :, None]).permute(0, 3, 1, 2, 4)
    B_BKTN, C_BKNT = cut(B).permute(0, 2, 3, 1), cut(C).transpose(1, 2)
    # Sums of log decays over the steps between are one product with a constant; no mask, every exponent is negative.
    apart_BKHTT = torch.exp(decay_BKHT @ _between(size).to(x)).unflatten(-1, (size, size))
    y = x_BKHPT @ (((B_BKTN @ C_BKNT) * (1 + torch.eye(size).to(x)))[:, :, None] * apart_BKHTT)
    if isinstance(chunks, int) and chunks == 1:
        return y.permute(0, 2, 3, 1, 4)[..., :length]
    total_BHRK = (decay_BHKT @ torch.ones(size, 1).to(x)).reshape(batch, heads, rows, chunks)
    for reverse in (False, True):
        seen_TT = _past(size, reverse=reverse, like=x).T
        until, since = torch.exp(decay_BKHT @ (1 - seen_TT)), torch.exp(decay_BKHT @ seen_TT)
        left_BKQN = (x_BKHPT * until[..., None, :]).flatten(2, 3) @ B_BKTN
        left = left_BKQN.reshape(batch, rows, chunks, heads, -1).permute(0, 3, 1, 2, 4)
        carried = _carry_matrix(left, total_BHRK, reverse=reverse).permute(0, 2, 3, 1, 4)
        y = y + (carried.reshape(left_BKQN.shape) @ C_BKNT).reshape(y.shape) * since[..., None, :]
    return y.permute(0, 2, 3, 1, 4).reshape(batch, heads, width, rows, chunks * size)[..., :length]


def _count_chunks(length: int, size: int) -> int:
    """Chunks that hold `length` steps."""
    # A length that stays open in an exported graph gets chunks to spare: one alone would be taken for a constant.
    return (length + size - 1) // size if isinstance(length, int) else length // size + 2


def _pad_steps(m: Tensor, axis: int, count: int) -> Tensor:
    """Zeros behind the last step; no operator at all where none are known to be needed."""
    behind = -axis % m.ndim - 1  # axes after this one
    return m if isinstance(count, int) and count == 0 else F.pad(m, (*[0] * (2 * behind + 1), count))


def _between(size: int) -> Tensor:
    """(T, T·T): which steps k decay what step s writes on its way to step t, at [k, (s, t)]."""
    step = torch.arange(size)
    k, s, t = step[:, None, None], step[:, None], step
    return (((s < k) & (k <= t)) | ((t <= k) & (k < s))).float().flatten(1)


def _ssd_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, *, reverse: bool) -> Tensor:
    """The selective scan of H·P channels whose states all decay alike."""
    groups, length, width = B.shape[2], x.shape[1], x.shape[3]
    order = None
    if reverse:
        order = torch.arange(length - 1, -1, -1, device=x.device).repeat(groups, 1)
    given = (x, dt, A, B, C, D)
    y, _, _ = scan_op(
        x.flatten(2).transpose(1, 2), dt.transpose(1, 2), A.repeat_interleave(width)[:, None], B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1), None if D is None else D.repeat_interleave(width), None, None, order, False, False,
        False, torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in given))
    return y.transpose(1, 2).reshape(x.shape)


def _ssd_cuda(fused: Callable[..., Tensor], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
              D: Tensor | None, *, reverse: bool) -> Tensor:
    """mamba-ssm's kernel; it runs forward in time only, so `reverse` flips."""
    if reverse:
        return _ssd_cuda(fused, x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), chunk_size, D, reverse=False).flip(1)
    return fused(x, dt, A, B.to(x.dtype), C.to(x.dtype), chunk_size, D=D)


@functools.cache
def _load_mamba_ssm() -> Callable[..., Tensor] | None:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return mamba_chunk_scan_combined


def ssd_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 64, D: Tensor | None = None,
                *, reverse: bool = False) -> Tensor:
    """`ssd` as matrix products over chunks (listing 1 of the paper), in the edge operator contract for one group.

    Arguments as for `ssd`, all of one float type and dt ready. `reverse` transposes the triangular matrices, nothing
    is flipped. Chunks are grouped again as often as L needs, but once in an exported graph, which takes no decisions
    on L (so L up to a few thousand there).
    """
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    # Padded steps have dt = 0: they decay nothing and add nothing, whichever way the recurrence runs.
    chunks = _count_chunks(length, chunk_size)
    pad = chunks * chunk_size - length
    dt_BKTH = _pad_steps(dt, 1, pad).reshape(batch, chunks, chunk_size, heads)
    x_BKTHP = _pad_steps(x, 1, pad).reshape(batch, chunks, chunk_size, heads, width)
    B_BKGTN, C_BKGTN = (_pad_steps(m, 1, pad).reshape(batch, chunks, chunk_size, groups, states).transpose(2, 3)
                        for m in (B, C))

    past_TT = _past(chunk_size, reverse=reverse, like=dt)
    decay_BKHT = (dt_BKTH * A).transpose(2, 3)
    sum_BKHT = decay_BKHT @ past_TT.T
    total_BKH = (decay_BKHT @ dt.new_ones(chunk_size, 1)).squeeze(-1)
    xdt_BKTHP = x_BKTHP * dt_BKTH[..., None]

    inside = _inside_chunks(xdt_BKTHP, sum_BKHT, B_BKGTN, C_BKGTN, past_TT)
    grouped = (batch, chunks, chunk_size, groups, heads // groups * width)
    tail_BKTH1 = torch.exp(total_BKH[..., None] - sum_BKHT).transpose(2, 3)[..., None]
    left_BKGNQ = B_BKGTN.transpose(3, 4) @ (xdt_BKTHP * tail_BKTH1).reshape(grouped).transpose(2, 3)
    carried_BKGNQ = _carry_grouped(left_BKGNQ, total_BKH, max(chunk_size, 16), reverse=reverse)
    before = (C_BKGTN @ carried_BKGNQ).transpose(2, 3).reshape(batch, chunks, chunk_size, heads, width)
    y = inside.transpose(2, 3) + before * torch.exp(sum_BKHT).transpose(2, 3)[..., None]
    y = y.reshape(batch, chunks * chunk_size, heads, width)[:, :length]
    return y if D is None else y + x * D[:, None]


def _past(size: int, *, reverse: bool, like: Tensor) -> Tensor:
    """1 where step t (row) has seen step s (column), itself included."""
    ones = torch.ones(size, size, dtype=like.dtype, device=like.device)
    return ones.triu() if reverse else ones.tril()


def _inside_chunks(xdt_BKTHP: Tensor, sum_BKHT: Tensor, B_BKGTN: Tensor, C_BKGTN: Tensor, past_TT: Tensor) -> Tensor:
    """What the steps of a chunk add to each other: (C Bᵀ ∘ decay) x -> (B, K, H, T, P)."""
    heads, groups = xdt_BKTHP.shape[3], B_BKGTN.shape[2]
    scores = C_BKGTN @ B_BKGTN.transpose(3, 4)
    if groups > 1:
        scores = scores.repeat_interleave(heads // groups, 2)
    # The mask is applied before exp as well: a step not seen has a positive exponent, which may overflow.
    exponent = (sum_BKHT[..., :, None] - sum_BKHT[..., None, :]) * past_TT
    return (scores * (torch.exp(exponent) * past_TT)) @ xdt_BKTHP.transpose(2, 3)


def _carry_grouped(left_BKGNQ: Tensor, total_BKH: Tensor, group: int, *, reverse: bool) -> Tensor:
    """State that enters each chunk, from what each chunk leaves behind: (B, K, G, N, R·P) -> same."""
    batch, chunks, groups, states, columns = left_BKGNQ.shape
    heads = total_BKH.shape[2]
    width = columns * groups // heads
    total_BHK = total_BKH.transpose(1, 2)
    if groups == 1:  # rank 5 all the way, for edge runtimes
        left_BHKQ = left_BKGNQ.reshape(batch, chunks, states, heads, width).permute(0, 3, 1, 2, 4).flatten(3)
        carried = carry(left_BHKQ, total_BHK, group, reverse=reverse)
        carried = carried.reshape(batch, heads, chunks, states, width).permute(0, 2, 3, 1, 4)
        return carried.reshape(batch, chunks, 1, states, columns)
    left = left_BKGNQ.reshape(batch, chunks, groups, states, heads // groups, width).permute(0, 2, 4, 1, 3, 5)
    carried = carry(left.flatten(4).flatten(1, 2), total_BHK, group, reverse=reverse)
    carried = carried.reshape(batch, groups, heads // groups, chunks, states, width)
    return carried.permute(0, 3, 1, 4, 2, 5).flatten(4)


def carry(left_BHKQ: Tensor, total_BHK: Tensor, group: int, *, reverse: bool = False) -> Tensor:
    """e_k = Σ over earlier j of exp(total_{j+1} + … + total_{k-1}) left_j: the state that enters chunk k.

    Matrix products over groups of `group` chunks, grouped again and again, so the work stays proportional to K.
    """
    chunks = left_BHKQ.shape[2]
    if torch.compiler.is_exporting() or chunks <= group:
        return _carry_matrix(left_BHKQ, total_BHK, reverse=reverse)
    pad = -chunks % group
    left = F.pad(left_BHKQ, (0, 0, 0, pad)).view(*total_BHK.shape[:2], -1, group, left_BHKQ.shape[3])
    total = F.pad(total_BHK, (0, pad)).view(*left.shape[:4])
    inside = _carry_matrix(left, total, reverse=reverse)
    last = 0 if reverse else -1
    group_left = inside[..., last, :] * torch.exp(total[..., last, None]) + left[..., last, :]
    entering = carry(group_left, total.sum(-1), group, reverse=reverse)
    before = _past(group, reverse=reverse, like=total) - torch.eye(group, dtype=total.dtype, device=total.device)
    result = inside + torch.exp(total @ before.T)[..., None] * entering[..., None, :]
    return result.flatten(2, 3)[:, :, :chunks]


def _carry_matrix(left: Tensor, total: Tensor, *, reverse: bool) -> Tensor:
    """`carry` as one matrix product; left (…, K, Q), total (…, K)."""
    past = _past(total.shape[-1], reverse=reverse, like=total)
    # total.sum over steps strictly between: cumulative (own step excluded) minus cumulative (own step included).
    included = total @ past.T
    before = past * past.T.neg().add(1)
    exponent = ((included - total)[..., :, None] - included[..., None, :]) * before
    return (torch.exp(exponent) * before) @ left


def ssd_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *,
             reverse: bool = False) -> Tensor:
    """Readable twin of `ssd`, one step at a time; same shapes."""
    _check(x, dt, A, B, C, D)
    batch, length, heads, width = x.shape
    B_BLHN, C_BLHN = (m.repeat_interleave(heads // m.shape[2], 2) for m in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[3])
    y = [x.new_zeros(batch, heads, width)] * length
    for t in (reversed(range(length)) if reverse else range(length)):
        write = (dt[:, t, :, None] * x[:, t])[..., None] * B_BLHN[:, t, :, None, :]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + write
        y[t] = (state * C_BLHN[:, t, :, None, :]).sum(-1)
    result = torch.stack(y, 1)
    return result if D is None else result + x * D[:, None]


def ssd_noncausal(x: Tensor, weight: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One state for all steps: y_l = C_lᵀ Σ_j weight_j B_j x_jᵀ, two matrix products (VSSD, arXiv 2407.18559).

    Steps last, as an image has them: x (B, H, P, L), weight (B, H, L), B and C (B, N, L) -> (B, H, P, L). The
    weight says how much a step writes into the state of its head; without decay there is no order.
    """
    check_real("ssd_noncausal", {"x": x, "weight": weight, "B": B, "C": C})
    if x.ndim != 4 or weight.shape != (x.shape[0], x.shape[1], x.shape[3]):
        raise ValueError(f"x is (B, H, P, L) and weight (B, H, L), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if B.ndim != 3 or B.shape != C.shape or B.shape[::2] != x.shape[::3]:
        raise ValueError(f"B and C are (B, N, L) beside x {tuple(x.shape)}, got {tuple(B.shape)} and {tuple(C.shape)}")
    weighted = (x * weight[:, :, None]).flatten(1, 2)
    state_BQN = weighted @ B.transpose(1, 2)
    return (state_BQN @ C).view(x.shape)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
           dt_bias: Tensor | None = None) -> None:
    check_real("ssd", {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias})
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x is (B, L, H, P) without empty axes, got {tuple(x.shape)}")
    heads = x.shape[2]
    if dt.shape != x.shape[:3] or any(m is not None and m.shape != (heads,) for m in (A, D, dt_bias)):
        shapes = [None if m is None else tuple(m.shape) for m in (A, D, dt_bias)]
        raise ValueError(f"beside x {tuple(x.shape)}, dt is (B, L, H), A, D and dt_bias are (H); got dt "
                         f"{tuple(dt.shape)} and {shapes}")
    if B.ndim != 4 or B.shape != C.shape or B.shape[:2] != x.shape[:2] or 0 in B.shape or heads % B.shape[2]:
        raise ValueError(f"B and C are (B, L, G, N) without empty axes, G dividing {heads} heads, beside x "
                         f"{tuple(x.shape)}; got {tuple(B.shape)} and {tuple(C.shape)}")
