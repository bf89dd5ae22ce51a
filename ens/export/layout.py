"""Keeps maps in the blocked layout that ONNX Runtime convolves in, where it would leave it for one operator and return.

It stays there from convolution to convolution, and through sums and products of two blocked maps of one shape. A map
of one channel that meets all channels (mean and scale of a layer norm), or a map from elsewhere (a matrix product, the
network's input), ends it: operands are copied to the plain layout and the result back, each copy for about the price
of the operator. A convolution with ones takes such an operand in and changes no value: x · 1 = x.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_LANES = 8
"""Channels come in blocks of 8, or of 16 with AVX-512; other numbers of them are left alone."""
_BINARY = ("Add", "Sub", "Mul")
_UNARY = ("Relu", "Sigmoid", "Tanh")


def keep_blocked(graph: ir.Graph) -> None:
    """Put convolutions with ones before sums, differences and products with one blocked operand, in place.

    Only where the result is a map of whole blocks that goes into a convolution or into another of these operators.
    """
    blocked: set[ir.Value | None] = set()
    for node in list(graph):
        if node.op_type in _BINARY and _is_worth_it(node):
            _bring_in(graph, node, blocked)
        if _is_blocked(node, blocked):
            blocked.add(node.outputs[0])


def _is_blocked(node: ir.Node, blocked: set[ir.Value | None]) -> bool:
    """Whether ONNX Runtime computes this node in its blocked layout."""
    if node.op_type == "Conv":
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 4:
            return False
        out_channels, in_channels = weight.const_value.shape.numpy()[:2]
        group = node.attributes["group"].as_int() if "group" in node.attributes else 1
        if group == 1:
            return in_channels < _LANES or in_channels % _LANES == 0
        return in_channels == 1 and group == out_channels and out_channels % _LANES == 0
    if node.op_type in _UNARY:
        return node.inputs[0] in blocked
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    if node.op_type == "Mul" and len(constants) == 1:  # by a factor a channel: it becomes a depth-wise convolution
        return len(constants[0].shape) == 4 and not blocked.isdisjoint(node.inputs)
    return node.op_type in ("Add", "Mul") and blocked.issuperset(node.inputs)


def _is_worth_it(node: ir.Node) -> bool:
    channels = _count_channels(node.outputs[0])
    return (channels > 1 and channels % _LANES == 0
            and all(value is not None and value.const_value is None for value in node.inputs)
            and any(user.op_type in ("Conv", *_BINARY) for user in node.outputs[0].consumers()))


def _bring_in(graph: ir.Graph, node: ir.Node, blocked: set[ir.Value | None]) -> None:
    """Make both operands blocked where one is, or where one has a single channel; −1 of it is added for "−"."""
    channels = _count_channels(node.outputs[0])
    counts = [_count_channels(value) for value in node.inputs]
    if counts in ([channels, 1], [1, channels]) and not (node.op_type == "Sub" and counts[0] == 1):
        index = counts.index(1)
        spread = _convolve(graph, node.inputs[index], channels, -1.0 if node.op_type == "Sub" else 1.0)
        graph.insert_before(node, spread)
        node.replace_input_with(index, spread.outputs[0])
        node.op_type = "Mul" if node.op_type == "Mul" else "Add"
        blocked.add(spread.outputs[0])
    elif counts != [channels, channels] or node.op_type == "Sub" or blocked.isdisjoint(node.inputs):
        return
    for value in dict.fromkeys(node.inputs):
        if value is None or value in blocked:
            continue
        users = [use for use in value.uses() if use.node.op_type in ("Conv", *_BINARY)]
        entered = _convolve(graph, value, channels, 1.0)
        if (producer := value.producer()) is None:
            graph.insert_before(graph[0], entered)
        else:
            graph.insert_after(producer, entered)
        for use in users:
            use.node.replace_input_with(use.idx, entered.outputs[0])
        blocked.add(entered.outputs[0])


def _convolve(graph: ir.Graph, value: ir.Value | None, channels: int, factor: float) -> ir.Node:
    """`factor` times a map of as many channels, or times the one channel of a map, once for each."""
    assert value is not None and value.shape is not None
    name = f"tidy_{'minus_' if factor < 0 else ''}ones_{channels}"
    if name not in graph.initializers:
        ones = ir.tensor(np.full((channels, 1, 1, 1), factor, np.float32), name=name)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape((channels, 1, 1, 1)), const_value=ones,
                                            type=ir.TensorType(ir.DataType.FLOAT)))
    conv = ir.Node("", "Conv", [value, graph.initializers[name]], [ir.AttrInt64("group", _count_channels(value))])
    conv.outputs[0].shape = ir.Shape([value.shape[0], channels, *value.shape[2:]])
    conv.outputs[0].type = value.type
    return conv


def _count_channels(value: ir.Value | None) -> int:
    """Channels of a map; 0 where they are not known, or where the value is no map (a vector of channels, a matrix)."""
    if value is None or value.shape is None or len(value.shape) != 4 or 1 in tuple(value.shape)[2:]:
        return 0
    return value.shape[1] if isinstance(value.shape[1], int) else 0
