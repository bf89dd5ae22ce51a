"""torch.export: a network as a traced program, which other formats start from, and its `.pt2` file.

Shapes: image (1, C, H, W) in [0, 1], H and W multiples of `size_multiple` -> (1, C, H·upscale, W·upscale).
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shapes_config

from ens.networks.steps import Network

Size = tuple[int, int]
"""Height and width in pixels."""
LARGEST_SIDE = 65536
EXAMPLE_PX = (640, 1152)
"""Sides of the traced image where they stay free: different ones, and so large that windows of 32 pixels in the deepest
level are different numbers above 1 too. What is 1 in the example, or equal, a tracer may take to be so always."""
_METADATA = "ens.json"


class _Restore(nn.Module):
    """`Network.restore` as the forward pass."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.restore(image)


def trace_network(network: Network, size: Size | None) -> ExportedProgram:
    """The network as a program of ATen operators for images of one size, or of any (None); raises what tracing raises.

    Nothing in it tells of this machine.
    """
    multiple = network.size_multiple
    free = {2: multiple * Dim("h", min=1, max=LARGEST_SIDE // multiple),
            3: multiple * Dim("w", min=1, max=LARGEST_SIDE // multiple)}
    height, width = size or tuple(max(least, side // multiple) * multiple
                                  for least, side in zip((6, 9), EXAMPLE_PX, strict=True))
    with torch.no_grad(), hushed(), quickened():
        # Left to itself, a side that the tracer cannot prove something of becomes a constant without a word.
        program = torch.export.export(_Restore(network).eval(), (torch.zeros(1, network.in_channels, height, width),),
                                      dynamic_shapes=None if size else {"image": free}, strict=False,
                                      prefer_deferred_runtime_asserts_over_guards=True)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten._assert_scalar.default:  # that a side is not 1, which holds at 1 as well
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def write_program(network: Network, path: Path, metadata: Mapping[str, str], size: Size | None) -> None:
    """Write the traced network with `metadata` as the extra file `ens.json`; raises what tracing raises."""
    program = trace_network(network, size)
    height, width = size or (network.size_multiple, network.size_multiple)
    program.example_inputs = ((torch.zeros(1, network.in_channels, height, width),), {})  # they are stored too
    data = io.BytesIO()
    with hushed():
        torch.export.save(program, data, extra_files={_METADATA: json.dumps(dict(metadata))})
    path.write_bytes(data.getvalue())


def open_program(path: Path, threads: int | None) -> tuple[nn.Module, dict[str, str]]:
    """The program of a `.pt2` file and its metadata; `threads` are PyTorch's, for the whole process.

    Raises ValueError for a file that could run code of its own, and what PyTorch raises for one that is damaged.
    """
    data = path.read_bytes()
    _check_harmless(data)
    if threads is not None:
        torch.set_num_threads(threads)
    extra = {_METADATA: "{}"}
    with hushed():
        program = torch.export.load(io.BytesIO(data), extra_files=extra)
    return program.module(), json.loads(extra[_METADATA])


def run_program(module: nn.Module, image: Tensor) -> Tensor:
    """One image through an opened file."""
    with torch.no_grad():
        return module(image)


_FILE = re.compile(r"[^/]+/(data/(weights|constants)/(weight|tensor)_\d+|data/(weights|constants)/model_\w+\.json|"
                   r"data/sample_inputs/model\.pt|models/model\.json|extra/\w+\.json|archive_(format|version)|"
                   r"byteorder|\.data/\w+|\.format_version|\.storage_alignment)")
_CALL = re.compile(r"torch\.ops\.(aten|higher_order)\.\w+(\.\w+)?|_operator\.\w+|torch\.sym_\w+|math\.\w+|"
                   r"torch\._sym_\w+")
_TERM = re.compile(r"Symbol\('\w+'|[A-Z]\w*(?=\()|(positive|integer|nonnegative)=True|true|false|True|False|"
                   r"-?\d+(\.\d+)?(e-?\d+)?|'-?\d[\d.e-]*'|precision=\d+|\boo\b|[su]\d+|[(), ]|[-+*/<>=]")


def _check_harmless(data: bytes) -> None:
    """Raise ValueError for what a file may make `torch.export.load` run beside tensor operators.

    The loader unpickles what asks for it, calls any function of torch that is named, and has sympy evaluate text.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            if _FILE.fullmatch(name) is None:
                raise ValueError(f"it holds {name}, which an exported network does not have")
            if name.endswith(".json"):
                _check_values(json.loads(archive.read(name)))
            if name.endswith("/model.pt"):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)  # the loader would try without


def _check_values(value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check_values(item)
    if not isinstance(value, dict):
        return
    if value.get("use_pickle"):
        raise ValueError("it holds a pickle, which may run code")
    if isinstance(target := value.get("target"), str) and _CALL.fullmatch(target) is None:
        raise ValueError(f"it calls {target}, which is no operator on tensors")
    if isinstance(text := value.get("expr_str"), str) and _TERM.sub("", text):
        raise ValueError(f"it has a size that is no formula: {text[:60]}")
    for item in value.values():
        _check_values(item)


@contextlib.contextmanager
def quickened() -> Iterator[None]:
    """Without what costs a tracer more than it brings, a quarter of the time together (measured).

    That is looking for garbage among millions of objects that stay, and asking whether a side might be 0 or 1, which
    PyTorch's own exporter does not ask either.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Exporters report on themselves in warnings, log lines and prints; only errors matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
