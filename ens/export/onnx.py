"""ONNX: a network as a graph for images of one size or of any, and its file in ONNX Runtime.

Shapes: image (1, C, H, W) in [0, 1], H and W multiples of `size_multiple` -> (1, C, H·upscale, W·upscale).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx._internal.exporter import _registration

from ens.export.graph import replace_node, tidy_graph
from ens.export.loops import opaque_scans, write_scans
from ens.export.repeats import Block, copy_blocks, hide_weights, list_kinds, marked
from ens.export.torch_export import EXAMPLE_PX, LARGEST_SIDE, Size, hushed, quickened
from ens.networks.steps import Network

OPSET = 20
"""GELU is one operator from here on; below it ONNX Runtime is a tenth slower, above it is not faster (measured)."""
_RULES = (rules.reshape_reshape_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule,
          rules.no_op_transpose_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.cast_cast_rule,
          rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.slice_split_rule,
          rules.one_reshape_matmul_reshape_rule, rules.two_reshapes_matmul_reshape_rule,
          rules.materialize_reshape_shape_rule)
"""Of the exporter's rewrites those that take shapes away. Its own optimiser also takes a constant near 0 for 0, and an
epsilon under a root is one: a black image became NaN."""
_LARGEST_FOLDED = 2**15
"""Elements of a constant that folding may write down: numbers that a few operators make stay out of the file."""


class _Restore(nn.Module):
    """`Network.restore` of an image that comes as (1, C, h, m, w, m), m the size multiple.

    Its sides are then products of h and w to the tracer, which halves and divides them in a moment; of sides that are
    only promised to be multiples it proves every division anew, for seconds a block.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        height, width = (image.shape[axis] * self.network.size_multiple for axis in (2, 4))
        return self.network.restore(image.reshape(1, self.network.in_channels, height, width))


def write_onnx(network: Network, path: Path, metadata: Mapping[str, str], size: Size | None,
               on_event: Callable[[str], None]) -> None:
    """Write the network with `metadata` beside its graph, for images of one size or of any (None).

    `on_event` gets a line a step. Raises whatever the exporter meets.
    """
    kinds = list_kinds(network)
    model = _trace(network, kinds, on_event)
    on_event("export: simplifying the graph")
    with hushed():
        passes.InlinePass()(model)
        write_scans(model.graph)
        _join_units(model.graph, network.size_multiple, size)
        hide_weights(model.graph, kinds)
        simplify_graph(model)
        copy_blocks(model.graph, kinds)
        _fold(model)
    tidy_graph(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # the tracer's stack: paths of this machine, and another address in every process
    model.metadata_props.update(metadata)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _trace(network: Network, kinds: Sequence[Sequence[Block]], on_event: Callable[[str], None]) -> ir.Model:
    multiple, stdout = network.size_multiple, sys.stdout

    def say(line: str) -> None:
        with contextlib.redirect_stdout(stdout):
            on_event(line)

    height, width = (max(least, side // multiple) for least, side in zip((6, 9), EXAMPLE_PX, strict=True))
    example = torch.zeros(1, network.in_channels, height, multiple, width, multiple)
    units = {axis: Dim(name, min=1, max=LARGEST_SIDE // multiple) for axis, name in ((2, "h"), (4, "w"))}
    with torch.no_grad(), hushed(), quickened(), _one_registry(), opaque_scans(), marked(network, kinds, say):
        # Left to the exporter, a side that it cannot prove something of becomes a constant without a word.
        program = torch.export.export(_Restore(network).eval(), (example,), dynamic_shapes={"image": units},
                                      strict=False, prefer_deferred_runtime_asserts_over_guards=True)
        say("export: writing the graph in ONNX operators")
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, input_names=["image"],
                                     output_names=["restored"], verbose=False, optimize=False)
    assert exported is not None
    return exported.model


_make_registry = functools.cache(_registration.ONNXRegistry.from_torchlib)


@contextlib.contextmanager
def _one_registry() -> Iterator[None]:
    """The exporter's table of operators made once a process, not a file: 0.6 of the 2.5 s that a block takes."""
    kind = _registration.ONNXRegistry
    own = vars(kind)["from_torchlib"]
    kind.from_torchlib = staticmethod(_make_registry)  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.from_torchlib = own  # type: ignore[method-assign]


def _join_units(graph: ir.Graph, multiple: int, size: Size | None) -> None:
    """Make the input (1, C, H, W) again: the reshape goes, and a unit is a side divided by the multiple.

    Sides that are fixed are fixed here: blocks that repeat at several resolutions were traced as one.
    """
    (units,) = graph.inputs
    (reshape,) = (node for node in units.consumers() if node.op_type == "Reshape")
    assert units.shape is not None
    image = ir.Value(name=units.name, shape=ir.Shape([1, units.shape[1], *(size or ("height", "width"))]),
                     type=units.type)
    divisor = _add_number(graph, "size_multiple", multiple)
    for node in list(units.consumers()):
        if node.op_type != "Shape":
            continue
        axis = node.attributes["start"].as_int() // 2 + 1
        if size:
            replace_node(graph, node, _add_number(graph, f"{node.outputs[0].name}_fixed", size[axis - 2] // multiple))
        else:
            side = ir.node("Shape", [image], {"start": axis, "end": axis + 1})
            unit = ir.node("Div", [side.outputs[0], divisor])
            graph.insert_before(node, [side, unit])
            replace_node(graph, node, unit.outputs[0])
    replace_node(graph, reshape, image)
    graph.inputs[:] = [image]


def _add_number(graph: ir.Graph, name: str, number: int) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array([number], np.int64)))
    graph.register_initializer(value)
    return value


def simplify_graph(model: ir.Model) -> None:
    """Fold what is constant, shapes above all, and drop what nothing reads; no value changes."""
    _fold(model)
    rewriter.rewrite(model, pattern_rewrite_rules=list(_RULES))
    _fold(model)


def _fold(model: ir.Model) -> None:
    fold_constants_ir(model, output_size_limit=_LARGEST_FOLDED)
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
