"""Rewrites of an ONNX graph that change no value and save memory traffic, which is what these networks cost.

ONNX Runtime keeps convolutions in a blocked layout and leaves it at every slice of channels and every broadcast, so
a wide convolution that is sliced afterwards costs two passes over its output that narrow convolutions do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ens.export.layout import keep_blocked
from ens.export.views import drop_round_trips

Array = NDArray[Any]

_BLOCK = 4
"""ONNX Runtime computes depth-wise convolutions of other multiples in its slow general kernel (measured: 15 times)."""


def tidy_graph(model: ir.Model) -> None:
    """Drop moves that cancel, fold per-channel factors into convolutions, cut convolutions apart instead of slicing
    them, and keep what is between them in their layout, in place.
    """
    drop_round_trips(model.graph)
    for rewrite in (_fold_shift, _fold_factor, _cut_apart):
        _apply_until_done(model.graph, rewrite)
    keep_blocked(model.graph)
    _drop_unused(model.graph)


def replace_node(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Whoever reads the node's one output reads `value`, and the node is gone."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _apply_until_done(graph: ir.Graph, rewrite: Callable[[ir.Graph, ir.Node], bool]) -> None:
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            # A node removed by an earlier rewrite of this round has no graph any more.
            if node.graph is graph and rewrite(graph, node):
                changed = True


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _fold_factor(graph: ir.Graph, node: ir.Node) -> bool:
    """Conv(x · factor) -> Conv'(x) where factor is constant, one value a channel."""
    return _fold(graph, node, "Mul")


def _fold_shift(graph: ir.Graph, node: ir.Node) -> bool:
    """Conv(x + shift) -> Conv'(x) where shift is constant, one value a channel; 1×1 only, so nothing is padded."""
    return _fold(graph, node, "Add")


def _fold(graph: ir.Graph, node: ir.Node, op_type: str) -> bool:
    if node.op_type != op_type or node.outputs[0].is_graph_output():
        return False
    users = node.outputs[0].consumers()
    first, second = node.inputs
    x, values = (second, _constant(first)) if _constant(second) is None else (first, _constant(second))
    if values is None or values.ndim != 4 or values.size != values.shape[1]:
        return False
    if not users or not all(_is_pointwise(user, values.shape[1]) for user in users):
        return False
    for user in users:
        weight, bias = _constant(user.inputs[1]), _bias(user)
        assert weight is not None
        if op_type == "Mul":
            weight = weight * values.reshape(1, -1, 1, 1)
        else:
            bias = weight[:, :, 0, 0] @ values.reshape(-1) + (0 if bias is None else bias)
        _insert(graph, user, x, weight, bias, group=1, replaced=user.outputs[0])
        graph.remove(user, safe=True)
    graph.remove(node, safe=True)
    return True


def _is_pointwise(node: ir.Node, channels: int) -> bool:
    weight = _constant(node.inputs[1]) if node.op_type == "Conv" else None
    return (weight is not None and weight.shape[1:] == (channels, 1, 1) and _group(node) == 1
            and (len(node.inputs) < 3 or node.inputs[2] is None or _bias(node) is not None))


def _cut_apart(graph: ir.Graph, node: ir.Node) -> bool:
    """A convolution of which only slices of channels are used -> one convolution a slice."""
    weight = _constant(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None or node.outputs[0].is_graph_output() or (len(node.inputs) > 2 and _bias(node) is None):
        return False
    depthwise = weight.shape[1] == 1 and _group(node) == weight.shape[0]
    users = node.outputs[0].consumers()
    windows = [_channel_window(user, weight.shape[0]) for user in users]
    if not users or not all(windows) or not (depthwise or _group(node) == 1):
        return False
    if any((stop - start) % _BLOCK for start, stop in filter(None, windows)):
        return False
    bias = _bias(node)
    for user, window in zip(users, windows, strict=True):
        assert window is not None
        start, stop = window
        x = _slice_channels(graph, node, start, stop, weight.shape[0]) if depthwise else node.inputs[0]
        _insert(graph, node, x, weight[start:stop], None if bias is None else bias[start:stop],
                group=stop - start if depthwise else 1, replaced=user.outputs[0])
        graph.remove(user, safe=True)
    graph.remove(node, safe=True)
    return True


def _slice_channels(graph: ir.Graph, before: ir.Node, start: int, stop: int, channels: int) -> ir.Value:
    """A slice of the channels of `before`'s input; a slice of a slice becomes one slice of the source."""
    source = before.inputs[0]
    assert source is not None
    producer = source.producer()
    window = None if producer is None else _channel_window(producer, None)
    if producer is not None and window is not None:
        source, start, stop = producer.inputs[0], start + window[0], stop + window[0]
    limits = [_new_constant(graph, np.array([value], np.int64)) for value in (start, stop, 1, 1)]
    node = ir.node("Slice", [source, *limits])
    graph.insert_before(before, node)
    return node.outputs[0]


def _insert(graph: ir.Graph, like: ir.Node, x: ir.Value | None, weight: Array, bias: Array | None, *, group: int,
            replaced: ir.Value) -> None:
    """A convolution with `like`'s attributes but these weights, whose output takes the place of `replaced`.

    The new weight keeps the old one's name, so that it can be told which block it is of.
    """
    source = like.inputs[1]
    name = "tidy" if source is None or source.name is None else source.name.partition("#")[0]
    inputs = [x, _new_constant(graph, weight, f"{name}#"), *([] if bias is None else [_new_constant(graph, bias)])]
    attributes = [attribute for name, attribute in like.attributes.items() if name != "group"]
    node = ir.Node("", "Conv", inputs, [*attributes, ir.AttrInt64("group", group)])
    node.outputs[0].shape, node.outputs[0].type = replaced.shape, replaced.type
    graph.insert_before(like, node)
    replaced.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)


def _new_constant(graph: ir.Graph, array: Array, prefix: str = "tidy_") -> ir.Value:
    array = np.ascontiguousarray(array if array.dtype == np.int64 else array.astype(np.float32))
    name = f"{prefix}{len(graph.initializers)}"
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                     const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _constant(value: ir.Value | None) -> Array | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _bias(node: ir.Node) -> Array | None:
    return _constant(node.inputs[2]) if len(node.inputs) > 2 else None


def _group(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _channel_window(node: ir.Node, channels: int | None) -> tuple[int, int] | None:
    """(start, stop) of a Slice along axis 1 with step 1, else None."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    limits = [_constant(value) for value in node.inputs[1:]]
    if any(limit is None or limit.size != 1 for limit in limits):
        return None
    start, stop, axis, *step = (int(limit.item()) for limit in limits if limit is not None)
    if axis != 1 or step not in ([], [1]):
        return None
    if channels is not None:
        start, stop = (min(limit if limit >= 0 else limit + channels, channels) for limit in (start, stop))
    return (start, stop) if 0 <= start < stop else None
