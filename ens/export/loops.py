"""A selective scan in an ONNX graph: one node while the network is traced, a Scan operator afterwards.

PyTorch traces the body of its own loop operator anew for every scan, seconds each, and it is the same for all.
Shapes: L steps first; state (B, G, P, N), u and delta (L, B, G, P), B and C (L, B, G, N), A (G, P, N).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ens.ops.scan_op import tracing_steps

_DOMAIN, _NAME = "ens", "SelectiveScan"


@contextlib.contextmanager
def opaque_scans() -> Iterator[None]:
    """While it is open, a traced selective scan is one node of ours, which `write_scans` turns into a Scan."""
    with tracing_steps(_call_node):
        yield


def _call_node(state: Tensor, A: Tensor, steps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    last, y = torch.onnx.ops.symbolic_multi_out(f"{_DOMAIN}::{_NAME}", (state, *steps, A), dtypes=[state.dtype] * 2,
                                                shapes=[state.shape, steps[0].shape], version=1)
    return last, y


def write_scans(graph: ir.Graph) -> None:
    """Put a Scan operator in place of every traced scan; A is read from outside the loop."""
    for node in list(graph):
        if (node.domain, node.op_type) == (_DOMAIN, _NAME):
            *carried, A = node.inputs
            assert A is not None
            scan = ir.node("Scan", carried, {"body": _build_body(A), "num_scan_inputs": 4}, num_outputs=2)
            graph.insert_before(node, scan)
            for old, new in zip(node.outputs, scan.outputs, strict=True):
                new.shape, new.type = old.shape, old.type
                old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _build_body(A: ir.Value) -> ir.Graph:
    """state' = exp(Δ A) state + Δ u B, y = ⟨state', C⟩: `ens.ops.scan_op._scan_steps` in ONNX operators."""
    state, u, delta, B, C = inputs = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
                                      for name in ("state", "u", "delta", "B", "C")]
    axes = {name: ir.Value(name=name, const_value=ir.tensor(np.array([axis], np.int64)))
            for name, axis in (("last", -1), ("channels", 2))}
    nodes: list[ir.Node] = []

    def apply(operator: str, *values: ir.Value, attributes: tuple[tuple[str, int], ...] = ()) -> ir.Value:
        nodes.append(ir.node(operator, list(values), dict(attributes)))
        return nodes[-1].outputs[0]

    decay = apply("Exp", apply("Mul", apply("Unsqueeze", delta, axes["last"]), A))
    write = apply("Mul", apply("Unsqueeze", apply("Mul", delta, u), axes["last"]),
                  apply("Unsqueeze", B, axes["channels"]))
    after = apply("Add", apply("Mul", decay, state), write)
    read = apply("ReduceSum", apply("Mul", after, apply("Unsqueeze", C, axes["channels"])), axes["last"],
                 attributes=(("keepdims", 0),))
    for value in (after, read):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(inputs, [after, read], nodes=nodes, initializers=list(axes.values()), name="step")
