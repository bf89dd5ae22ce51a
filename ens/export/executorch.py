"""ExecuTorch: a network of one image size as a `.pte` file, delegated to XNNPACK, and that file in its runtime.

Shapes: image (1, C, H, W) in [0, 1] -> (1, C, H·upscale, W·upscale). Needs the extra `[executorch]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.pass_base import ExportPass, PassResult
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.extension.pybindings import portable_lib
from torch import Tensor, fx
from torch.export import ExportedProgram

from ens.export.torch_export import Size, hushed, trace_network
from ens.networks.steps import Network

_METADATA = "ens_metadata"
"""Name of the constant method that gives the file's metadata as JSON."""


class _RemoveExpands(ExportPass):
    """Drop expansions to the shape that is there: XNNPACK does not take them, and they would cut a delegate in two."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = False
        for node in graph_module.graph.nodes:
            if "expand_copy" in str(node.target) and node.args[0].meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                changed = True
        graph_module.recompile()
        return PassResult(graph_module, changed)


def lower(program: ExportedProgram, metadata: Mapping[str, str] | None = None) -> EdgeProgramManager:
    """A traced program in ExecuTorch's operators, what XNNPACK takes of it as delegates; raises what it raises."""
    with hushed():
        return to_edge_transform_and_lower(
            constant_prop_pass(program), transform_passes=[_RemoveExpands()], partitioner=[XnnpackPartitioner()],
            constant_methods={_METADATA: json.dumps(dict(metadata or {}))})


def write_executorch(network: Network, path: Path, metadata: Mapping[str, str], size: Size) -> None:
    """Write the network for images of one size with `metadata` as a constant method; raises what the exporter raises.
    """
    lowered = lower(trace_network(network, size), metadata)
    with hushed():
        path.write_bytes(lowered.to_executorch().buffer)


def open_executorch(path: Path, threads: int | None) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """What runs an image through the file, and its metadata; `threads` are the runtime's, for the whole process."""
    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch_from_buffer(path.read_bytes())
    metadata = json.loads(module.run_method(_METADATA, ())[0]) if _METADATA in module.method_names() else {}

    def run(image: Tensor) -> Tensor:
        return module.forward((image.contiguous(),))[0].clone()

    return run, metadata
