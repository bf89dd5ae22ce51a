"""The compiled selective-scan kernel, reached with ctypes: plain pointers and strides, no PyTorch headers.

Shapes as in `ens.ops.selective_scan`; all tensors float32 on the CPU. C++ looks at nothing but pointers, so whatever
it is given passes `_prepare` first, forward and backward.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ens.ops.scan_order import check_order, to_indices

CHUNK = 64
"""Steps between the states that the forward pass keeps."""

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
        *((name, ctypes.c_void_p) for name in ("given_order", "order")),
        *((name, _ScanTensor) for name in ("u", "delta", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias")), ("y", _ScanTensor),
        *((name, ctypes.c_void_p) for name in ("last_state", "checkpoints")),
        *((name, _ScanTensor) for name in ("dy", "du", "ddelta", "dz")),
        *((name, ctypes.c_void_p) for name in ("dlast", "dB", "dC", "dA", "dD", "dbias")), ("splits", ctypes.c_int64)]


class ScanInputs(NamedTuple):
    """u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L); D, delta_bias (D); order (G, L).

    Any strides, no empty axes. `order` is of any integer type, every row a permutation of the steps. `shared`: u is
    (B, D/G, L), read by every group in its own order; `summed`: so are y and z, summed over the groups. Mamba-2: A
    (D, 1), all states decay alike, and delta (B, H, L), D/H channels each.
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


def load_kernels() -> ctypes.CDLL | None:
    """The compiled library, or None where there is none that runs (`why_no_kernels` says why)."""
    return _load()[0]


def why_no_kernels() -> str:
    """Why there are no compiled kernels, for people to read; empty where there are."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    paths = [Path(__file__).with_name(f"kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        return None, "is not built (no C++ compiler when ens was installed)"
    try:
        if _is_cut_off(path):
            return None, f"does not load ({path.name} is cut off)"
        library = ctypes.CDLL(str(path))
        library.ens_scan_chunk.restype = library.ens_scan_lanes.restype = ctypes.c_int64
        library.ens_scan_call_bytes.restype = ctypes.c_int64
        fits = library.ens_scan_call_bytes() == ctypes.sizeof(_ScanCall) and library.ens_scan_chunk() == CHUNK
    except (OSError, AttributeError) as error:  # no such file, wrong machine, missing library; missing function
        return None, f"does not load ({error})"
    return (library, "") if fits else (None, f"does not load ({path.name} was built from another version of ens)")


def _is_cut_off(path: Path) -> bool:
    """Whether a 64-bit little-endian ELF file ends before its table of sections, which linkers write last.

    The loader maps such a file and the process dies of a bus error, which nothing here could catch.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        return False
    table, count = int.from_bytes(header[40:48], "little"), int.from_bytes(header[60:62], "little")
    return path.stat().st_size < table + 64 * count


def like_output(inputs: ScanInputs) -> Tensor:
    """The input whose shape and strides y takes."""
    return inputs.u if inputs.summed or not inputs.shared else inputs.delta


def checkpoint_shape(inputs: ScanInputs) -> tuple[int, ...]:
    """States kept for the backward pass: one a channel and chunk."""
    batch, groups, states, length = inputs.B.shape
    per_group = inputs.A.shape[0] // groups
    return batch, (length + CHUNK - 1) // CHUNK, groups * ((per_group + WIDEST - 1) // WIDEST * WIDEST), states


def scan_forward(inputs: ScanInputs, *, keep: bool, lanes: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y as `like_output`, last state (B, D, N), and checkpoints for the backward pass (empty unless `keep`).

    `lanes` 4, 8 or 16 asks for a vector width (0: the widest here). Raises ValueError for what does not fit together,
    MemoryError without scratch memory.
    """
    inputs = _prepare(inputs)
    batch, channels = inputs.delta.shape[0], inputs.A.shape[0]
    y = torch.empty_like(like_output(inputs))
    last = inputs.u.new_empty(batch, channels, inputs.B.shape[2])
    # Zeros: channels that pad a group are never written, and what an operator returns must not be left to chance.
    checkpoints = inputs.u.new_zeros(checkpoint_shape(inputs) if keep else 0)
    call = _make_call(inputs, lanes)
    call.y, call.last_state = _strided(y), last.data_ptr()
    call.checkpoints = checkpoints.data_ptr() if keep else None
    _raise_for(_library().ens_scan_forward(ctypes.byref(call)), inputs)
    return y, last, checkpoints


def scan_backward(inputs: ScanInputs, checkpoints: Tensor, dy: Tensor, dlast: Tensor | None, *,
                  lanes: int = 0) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B and C as (B, G, L, N), D, z and delta_bias; z's is empty without z."""
    if checkpoints.numel() == 0:
        raise ValueError("the forward pass kept no states (keep=False), so there is nothing to go back through")
    inputs = _prepare(inputs)
    _check_tensors({"checkpoints": (checkpoints, checkpoint_shape(inputs)), "dy": (dy, like_output(inputs).shape),
                    "dlast": (dlast, (inputs.B.shape[0], inputs.A.shape[0], inputs.B.shape[2]))})
    checkpoints = checkpoints.contiguous()
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
    _raise_for(_library().ens_scan_backward(ctypes.byref(call)), inputs)
    dB, dC = (m[0] if call.splits == 1 else m.sum(0) for m in (dB, dC))
    if ddelta.shape != inputs.delta.shape:  # a row of delta serves several channels
        ddelta = torch.empty_like(inputs.delta).copy_(ddelta.unflatten(1, (inputs.delta.shape[1], -1)).sum(2))
    return du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0)


def _library() -> ctypes.CDLL:
    library = load_kernels()
    assert library is not None, "callers ask load_kernels first"
    return library


def _prepare(inputs: ScanInputs) -> ScanInputs:
    """The same inputs with contiguous A, D, delta_bias and int64 order; ValueError for what C++ must not be given.

    No look at values: those of `order` are C++'s to check, in the pass that turns them into its own integers.
    """
    u, delta, A, B, C, D, z, delta_bias, order, shared, summed, _ = inputs
    if A.ndim != 2 or B.ndim != 4 or delta.ndim != 3 or 0 in (*A.shape, *B.shape, *delta.shape):
        raise ValueError(f"A is (D, N), B (B, G, N, L) and delta (B, D, L) without empty axes, got {tuple(A.shape)}, "
                         f"{tuple(B.shape)} and {tuple(delta.shape)}")
    (channels, decays), (batch, groups, states, length) = A.shape, B.shape
    rows = delta.shape[1]
    if channels % groups or channels % rows or decays not in (1, states) or (shared and rows != channels):
        raise ValueError(f"{groups} groups, {rows} rows of delta and {decays} decays do not fit {channels} channels of "
                         f"{states} states")
    if summed and not shared:
        raise ValueError("only groups that share u can be summed")
    inner, outer = channels // groups if shared else channels, channels // groups if summed else channels
    _check_tensors({"u": (u, (batch, inner, length)), "delta": (delta, (batch, rows, length)), "A": (A, A.shape),
                    "B": (B, B.shape), "C": (C, B.shape), "D": (D, (channels,)), "z": (z, (batch, outer, length)),
                    "delta_bias": (delta_bias, (channels,))})
    if order is not None:
        if order.shape != (groups, length) or order.device.type != "cpu" or length >= 2**31:
            raise ValueError(f"order is {(groups, length)} on the CPU and L below 2^31, got {tuple(order.shape)} on "
                             f"{order.device}")
        order = to_indices(order).contiguous()
    return inputs._replace(A=A.contiguous(), D=D if D is None else D.contiguous(), order=order,
                           delta_bias=delta_bias if delta_bias is None else delta_bias.contiguous())


def _check_tensors(wanted: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Raise ValueError unless every tensor that is there is float32, on the CPU, and of its shape."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32
                                   or tensor.device.type != "cpu"):
            raise ValueError(f"{name} is float32 {tuple(shape)} on the CPU, got {tensor.dtype} {tuple(tensor.shape)} "
                             f"on {tensor.device}")


def _raise_for(status: int, inputs: ScanInputs) -> None:
    """Raise what a call of C++ had to say, if anything."""
    if status == 2:
        assert inputs.order is not None
        check_order(inputs.order)
    if status:
        raise MemoryError(f"selective scan of {inputs.u.shape[0]}×{inputs.A.shape[0]} channels: no memory for scratch "
                          "space")


def _strided(tensor: Tensor | None) -> _ScanTensor:
    """Pointer and strides; (B, channels, L) or (B, G, N, L)."""
    if tensor is None:
        return _ScanTensor(None, 0, 0, 0, 0)
    strides = tensor.stride()
    return _ScanTensor(tensor.data_ptr(), strides[0], strides[1], strides[2] if tensor.ndim == 4 else 0, strides[-1])


def _make_call(inputs: ScanInputs, lanes: int) -> _ScanCall:
    (channels, decays), (batch, groups, states, length) = inputs.A.shape, inputs.B.shape
    if lanes not in (0, 4, 8, 16):
        raise ValueError(f"lanes is 4, 8 or 16, or 0 for the widest of this machine, got {lanes}")
    # Below this much work a thread costs more than it saves.
    threads = max(1, min(torch.get_num_threads(), batch * channels * length * states >> 17))
    units = batch * (1 if inputs.shared else groups)
    tiles = -(-(channels // groups) // (lanes or _library().ens_scan_lanes()))
    return _ScanCall(
        batch=batch, channels=channels, groups=groups, states=states, length=length, shared=inputs.shared,
        summed=inputs.summed, decays=decays, per_delta=channels // inputs.delta.shape[1],
        softplus=inputs.delta_softplus, threads=threads, lanes=lanes, splits=max(1, min(tiles, -(-threads // units))),
        u=_strided(inputs.u), delta=_strided(inputs.delta), z=_strided(inputs.z), B=_strided(inputs.B),
        C=_strided(inputs.C), given_order=_pointer(inputs.order), A=_pointer(inputs.A), D=_pointer(inputs.D),
        bias=_pointer(inputs.delta_bias))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
