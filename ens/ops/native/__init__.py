"""The compiled selective-scan kernel, reached with ctypes: plain pointers and strides, no PyTorch headers.

Shapes as in `ens.ops.selective_scan`; all tensors float32 on the CPU, any strides where not said otherwise.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 16
"""Channels of a group are padded to this many in the checkpoints, whatever the instruction set."""


class _ScanTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("channel", ctypes.c_int64),
                ("state", ctypes.c_int64), ("step", ctypes.c_int64)]


class _ScanCall(ctypes.Structure):
    """Mirror of ScanCall in scan.h, field by field."""

    _fields_ = [*((name, ctypes.c_int64) for name in (
        "batch", "channels", "groups", "states", "length", "shared", "summed", "softplus", "decays", "per_delta",
        "threads", "lanes")),
        ("order", ctypes.c_void_p), *((name, _ScanTensor) for name in ("u", "delta", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias")), ("y", _ScanTensor),
        *((name, ctypes.c_void_p) for name in ("last_state", "checkpoints")),
        *((name, _ScanTensor) for name in ("dy", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dlast", "dB", "dC", "dA", "dD", "dbias")), ("splits", ctypes.c_int64)]


class ScanInputs(NamedTuple):
    """u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L); D, delta_bias (D); order (G, L) int32.

    A, D, delta_bias and order are contiguous. `shared`: u is (B, D/G, L), read by every group in its own order;
    `summed`: so are y and z, summed over the groups. Mamba-2: A (D, 1), all states decay alike, and delta (B, H, L),
    D/H channels each.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    order: Tensor | None
    shared: bool
    summed: bool
    delta_softplus: bool


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled library, or None where the package was installed without a compiler."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"kernels{suffix}")
        if path.is_file():
            library = ctypes.CDLL(str(path))
            library.ens_scan_chunk.restype = library.ens_scan_lanes.restype = ctypes.c_int64
            return library
    return None


def like_output(inputs: ScanInputs) -> Tensor:
    """The input whose shape and strides y takes."""
    return inputs.u if inputs.summed or not inputs.shared else inputs.delta


def checkpoint_shape(inputs: ScanInputs) -> tuple[int, ...]:
    """States kept for the backward pass: one a channel and chunk."""
    batch, groups, states, length = inputs.B.shape
    per_group = inputs.A.shape[0] // groups
    chunk = _library().ens_scan_chunk()
    return batch, (length + chunk - 1) // chunk, groups * ((per_group + WIDEST - 1) // WIDEST * WIDEST), states


def scan_forward(inputs: ScanInputs, *, keep: bool, lanes: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y as `like_output`, last state (B, D, N), and checkpoints for the backward pass (empty unless `keep`).

    `lanes` 4, 8 or 16 asks for a vector width (0: the widest here). Raises MemoryError without scratch memory.
    """
    batch, channels = inputs.delta.shape[0], inputs.A.shape[0]
    y = torch.empty_like(like_output(inputs))
    last = inputs.u.new_empty(batch, channels, inputs.B.shape[2])
    checkpoints = inputs.u.new_empty(checkpoint_shape(inputs) if keep else 0)
    call = _make_call(inputs, lanes)
    call.y, call.last_state = _strided(y), last.data_ptr()
    call.checkpoints = checkpoints.data_ptr() if keep else None
    if _library().ens_scan_forward(ctypes.byref(call)):
        raise MemoryError(f"selective scan of {batch}×{channels} channels: no memory for scratch space")
    return y, last, checkpoints


def scan_backward(inputs: ScanInputs, checkpoints: Tensor, dy: Tensor, dlast: Tensor | None, *,
                  lanes: int = 0) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B and C as (B, G, L, N), D, z and delta_bias; z's is empty without z."""
    if checkpoints.numel() == 0:
        raise ValueError("the forward pass kept no states (keep=False), so there is nothing to go back through")
    batch, channels, decays = inputs.delta.shape[0], *inputs.A.shape
    groups, states, length = inputs.B.shape[1:]
    call = _make_call(inputs, lanes)
    du = torch.empty_like(inputs.u)
    ddelta = torch.empty_like(inputs.delta if channels == inputs.delta.shape[1] else inputs.u)
    dz = torch.empty_like(inputs.u if inputs.z is None else inputs.z) if inputs.z is not None else dy.new_empty(0)
    dB, dC = (dy.new_empty(call.splits, batch, groups, length, states) for _ in range(2))
    dA, dD, dbias = dy.new_empty(batch, channels, decays), dy.new_empty(batch, channels), dy.new_empty(batch, channels)
    dlast = None if dlast is None else dlast.contiguous()
    call.dy, call.du, call.ddelta = _strided(dy), _strided(du), _strided(ddelta)
    call.dz = _strided(dz if inputs.z is not None else None)
    call.dlast, call.checkpoints = None if dlast is None else dlast.data_ptr(), checkpoints.data_ptr()
    call.dB, call.dC, call.dA, call.dD, call.dbias = (m.data_ptr() for m in (dB, dC, dA, dD, dbias))
    if _library().ens_scan_backward(ctypes.byref(call)):
        raise MemoryError(f"selective scan of {batch}×{channels} channels: no memory for scratch space")
    dB, dC = (m[0] if call.splits == 1 else m.sum(0) for m in (dB, dC))
    if ddelta.shape != inputs.delta.shape:  # a row of delta serves several channels
        ddelta = torch.empty_like(inputs.delta).copy_(ddelta.unflatten(1, (inputs.delta.shape[1], -1)).sum(2))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0)


def _library() -> ctypes.CDLL:
    library = load_kernels()
    assert library is not None, "callers ask load_kernels first"
    return library


def _strided(tensor: Tensor | None) -> _ScanTensor:
    """Pointer and strides; (B, channels, L) or (B, G, N, L)."""
    if tensor is None:
        return _ScanTensor(None, 0, 0, 0, 0)
    strides = tensor.stride()
    return _ScanTensor(tensor.data_ptr(), strides[0], strides[1], strides[2] if tensor.ndim == 4 else 0, strides[-1])


def _make_call(inputs: ScanInputs, lanes: int) -> _ScanCall:
    (channels, decays), (batch, groups, states, length) = inputs.A.shape, inputs.B.shape
    if inputs.order is not None and not (0 <= int(inputs.order.min()) <= int(inputs.order.max()) < length):
        raise ValueError(f"order holds numbers from 0 to {length - 1}, got {int(inputs.order.min())} to "
                         f"{int(inputs.order.max())}")
    # Below this much work a thread costs more than it saves.
    threads = max(1, min(torch.get_num_threads(), batch * channels * length * states >> 17))
    units = batch * (1 if inputs.shared else groups)
    tiles = -(-(channels // groups) // (lanes or _library().ens_scan_lanes()))
    return _ScanCall(
        batch=batch, channels=channels, groups=groups, states=states, length=length, shared=inputs.shared,
        summed=inputs.summed, decays=decays, per_delta=channels // inputs.delta.shape[1],
        softplus=inputs.delta_softplus, threads=threads, lanes=lanes, splits=max(1, min(tiles, -(-threads // units))),
        u=_strided(inputs.u), delta=_strided(inputs.delta), z=_strided(inputs.z), B=_strided(inputs.B),
        C=_strided(inputs.C), order=_pointer(inputs.order), A=_pointer(inputs.A), D=_pointer(inputs.D),
        bias=_pointer(inputs.delta_bias))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
