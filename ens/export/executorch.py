"""ExecuTorch: a network of one image size as a `.pte` file, delegated to XNNPACK, and that file in its runtime.

Shapes: image (1, C, H, W) in [0, 1] -> (1, C, H·upscale, W·upscale). Needs the extra `[executorch]`.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from ens.export.torch_export import Size, hushed, quickened, trace_network
from ens.networks.steps import Network

with hushed():  # what it brings along reports what it cannot load
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import ExportPass, NodeMetadata, ProxyValue
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass
    from executorch.extension.pybindings import portable_lib

_OPS = ops.edge.aten
_METADATA = "ens_metadata"
"""Name of the constant method that gives the file's metadata as JSON."""


class _Rewrite(ExportPass):  # type: ignore[misc]
    """What XNNPACK does not take, and would cut a delegate in two, in operators that it takes; no value changes.

    An axis of length 1 more or less is a view, expanding to the shape that is there is nothing, and expanding an axis
    of length 1 is joining copies of it.
    """

    def call_operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: NodeMetadata) -> ProxyValue:
        if op in (_OPS.unsqueeze_copy.default, _OPS.squeeze_copy.dims, _OPS.squeeze_copy.dim):
            return super().call_operator(_OPS.view_copy.default, (args[0], list(meta["val"].shape)), {}, meta)
        if op is _OPS.alias_copy.default:
            return args[0]
        if op is _OPS.expand_copy.default:
            before, after = args[0].data.shape, meta["val"].shape
            if before == after:
                return args[0]
            axes = [axis for axis, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
            if len(before) == len(after) and len(axes) == 1:
                return super().call_operator(_OPS.cat.default, ([args[0]] * after[axes[0]], axes[0]), {}, meta)
        return super().call_operator(op, args, kwargs, meta)


def lower(program: ExportedProgram, metadata: Mapping[str, str] | None = None) -> EdgeProgramManager:
    """A traced program in ExecuTorch's operators, what XNNPACK takes of it as delegates; raises what it raises."""
    with hushed(), quickened():
        return to_edge_transform_and_lower(
            constant_prop_pass(program), transform_passes=[_Rewrite()], partitioner=[XnnpackPartitioner()],
            constant_methods={_METADATA: json.dumps(dict(metadata or {}))})


def count_operators(lowered: EdgeProgramManager) -> Counter[str]:
    """How often a lowered program calls each operator; `delegate` is a part that XNNPACK runs."""
    targets = [node.target for node in lowered.exported_program().graph.nodes
               if node.op == "call_function" and node.target is not operator.getitem]
    names = [str(getattr(target, "__name__", target)).removeprefix("aten.").removesuffix(".default")
             for target in targets]
    return Counter("delegate" if name == "executorch_call_delegate" else name for name in names)


def write_executorch(network: Network, path: Path, metadata: Mapping[str, str], size: Size) -> None:
    """Write the network for images of one size with `metadata` as a constant method; raises what the exporter raises.
    """
    path.write_bytes(assemble(lower(trace_network(network, size), metadata)))


def assemble(lowered: EdgeProgramManager) -> bytes:
    """The `.pte` file of a lowered program."""
    with hushed():
        return bytes(lowered.to_executorch().buffer)


def open_executorch(path: Path, threads: int | None) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """What runs an image through the file, and its metadata; `threads` are the runtime's, for the whole process."""
    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    data = path.read_bytes()
    module = portable_lib._load_for_executorch_from_buffer(data)
    metadata = json.loads(module.run_method(_METADATA, ())[0]) if _METADATA in module.method_names() else {}
    return _bind(module, data), metadata


def load_program(data: bytes) -> Callable[[Tensor], Tensor]:
    """What runs an image through a `.pte` file in memory."""
    return _bind(portable_lib._load_for_executorch_from_buffer(data), data)


def _bind(module: Any, data: bytes) -> Callable[[Tensor], Tensor]:
    def run(image: Tensor) -> Tensor:
        assert data  # the module reads it in place: whoever holds `run` holds the file
        return module.forward((image.contiguous(),))[0].clone()

    return run
