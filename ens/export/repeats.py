"""Blocks that repeat are traced once: with free sides that costs seconds a block, and a network is many of few kinds.

The network is traced with the first block of each kind between two marks and one node in place of every other; what the
graph has between the marks is then copied to those nodes, with the weights that belong there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from ens.export.graph import replace_node
from ens.networks.steps import Network

_DOMAIN = "ens"
_TRACED = "network"
"""The name that the traced module has for the network."""
_LEAST_SIDE = 16
"""Height in pixels from which on every network runs; the shapes of blocks are read at this size and twice its width."""


@dataclass(frozen=True)
class Block:
    """A block of a network, the dotted name it has there, and the shape of its map at the size where all are read."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the block, a shared one under each."""
        return {**dict(self.module.named_parameters(remove_duplicate=False)),
                **dict(self.module.named_buffers(remove_duplicate=False))}


class _Mark(nn.Module):
    """One node of the traced graph that maps x to something of its shape."""

    def __init__(self, operator: str, index: int) -> None:
        super().__init__()
        self.operator, self.index = operator, index

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(f"{_DOMAIN}::{self.operator}", (x,), {"index": self.index}, dtype=x.dtype,
                                       shape=x.shape, version=1)


class _Marked(nn.Module):
    """A block between its marks; `on_call` is told when it is traced."""

    def __init__(self, block: nn.Module, kind: int, on_call: Callable[[], None]) -> None:
        super().__init__()
        self.enter, self.block, self.leave = _Mark(f"Enter{kind}", 0), block, _Mark(f"Leave{kind}", 0)
        self.on_call = on_call

    def forward(self, x: Tensor) -> Tensor:
        self.on_call()
        return self.leave(self.block(self.enter(x)))


def list_kinds(network: Network) -> list[list[Block]]:
    """The blocks in the network's slots, in lists of those that differ in nothing but the values of their weights.

    A block is in one that is called once, with one map whose shape it keeps, and shares no weight with the rest.
    """
    owners = Counter(id(tensor) for module in network.modules() for tensor in
                     (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    kinds: dict[object, list[Block]] = {}
    for block in _find_blocks(network):
        if all(owners[id(tensor)] == 1 for tensor in block.tensors().values()):
            kinds.setdefault(_describe(block), []).append(block)
    return list(kinds.values())


def _find_blocks(network: Network) -> list[Block]:
    names = [name for spec in network.slots for name in _list_rows(network, spec.module)]
    calls: list[tuple[str, tuple[int, ...]]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            x = inputs[0] if len(inputs) == 1 else None
            keeps = isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape
            calls.append((name, tuple(x.shape) if isinstance(x, Tensor) and keeps else ()))
        return hook

    handles = [network.get_submodule(name).register_forward_hook(record(name)) for name in names]
    height = -(-_LEAST_SIDE // network.size_multiple) * network.size_multiple
    try:
        with torch.no_grad():
            network.restore(torch.zeros(1, network.in_channels, height, 2 * height))
    finally:
        for handle in handles:
            handle.remove()
    count = Counter(name for name, _ in calls)
    return [Block(name, network.get_submodule(name), shape) for name, shape in calls
            if count[name] == 1 and len(shape) == 4]


def _list_rows(network: Network, name: str) -> list[str]:
    """The blocks of a row, or the one block that a slot is."""
    module = network.get_submodule(name)
    return [f"{name}.{child}" for child in module._modules] if type(module) is nn.Sequential else [name]


def _describe(block: Block) -> object:
    """Equal for two blocks that differ in nothing but the values of their weights."""
    modules = tuple((name, type(module), tuple((key, _freeze(value)) for key, value in vars(module).items()
                                               if key not in ("_parameters", "_buffers", "_modules")))
                    for name, module in block.module.named_modules())
    return block.shape, modules, tuple((name, tensor.shape, tensor.dtype) for name, tensor in block.tensors().items())


def _freeze(value: object) -> object:
    """Plain values by value, in containers too; anything else equals itself only."""
    if isinstance(value, tuple | list):
        return tuple(map(_freeze, value))
    if isinstance(value, set):
        return frozenset(map(_freeze, value))
    if value is None or isinstance(value, str | int | float) or (isinstance(value, dict) and not value):
        return type(value), repr(value)
    return id(value)


@contextlib.contextmanager
def marked(network: Network, kinds: Sequence[Sequence[Block]], on_event: Callable[[str], None]) -> Iterator[None]:
    """While it is open, marks stand around the first block of each kind and in place of its others.

    `on_event` gets a line when a marked block is traced.
    """
    try:
        for kind, (first, *others) in enumerate(kinds):
            line = f"export: tracing {first.name} for {len(others) + 1} blocks, kind {kind + 1} of {len(kinds)}"
            network.set_submodule(first.name, _Marked(first.module, kind, _say_once(line, on_event)))
            for index, block in enumerate(others):
                network.set_submodule(block.name, _Mark(f"Copy{kind}", index))
        yield
    finally:
        for block in (block for members in kinds for block in members):
            network.set_submodule(block.name, block.module)


def _say_once(line: str, on_event: Callable[[str], None]) -> Callable[[], None]:
    """The exporter runs the network more than once."""
    lines = [line]
    return lambda: on_event(lines.pop()) if lines else None


def hide_weights(graph: ir.Graph, kinds: Sequence[Sequence[Block]]) -> None:
    """Make the weights between marks unknown until `copy_blocks`, so that no rewrite folds one block's for all."""
    for first, *_ in kinds:
        for value in _list_weights(graph, first).values():
            value.const_value = None


def _list_weights(graph: ir.Graph, first: Block) -> dict[str, ir.Value]:
    """The initializers that are weights of a marked block, by their names in the block."""
    keys = {name: f"{_TRACED}.{first.name}.block.{name}" for name in first.tensors()}
    return {name: graph.initializers[key] for name, key in keys.items() if key in graph.initializers}


def copy_blocks(graph: ir.Graph, kinds: Sequence[Sequence[Block]]) -> None:
    """Put what is between a kind's marks in place of its other blocks, each with its own weights; no mark stays."""
    for kind, (first, *others) in enumerate(kinds):
        (enter,), (leave,), calls = ([node for node in graph if node.op_type == f"{name}{kind}"]
                                     for name in ("Enter", "Leave", "Copy"))
        weights = _list_weights(graph, first)
        body = _view_body(graph, [enter.outputs[0], *weights.values()], leave)
        for call in calls:
            block = others[call.attributes["index"].as_int()]
            own = [_add_weight(graph, f"{block.name}.{name}", value, block.tensors()[name])
                   for name, value in weights.items()]
            _insert_copy(graph, call, body, own)
        for name, value in weights.items():
            value.const_value = TorchTensor(first.tensors()[name].detach(), name=value.name)
        for mark in (enter, leave):
            replace_node(graph, mark, _read(mark))


def _view_body(graph: ir.Graph, inputs: Sequence[ir.Value], leave: ir.Node) -> ir.GraphView:
    """The nodes before `leave` that depend on `inputs`; inputs of the view are these and what else the nodes read.

    That is the same for every block of a kind: constants, and sides of the map.
    """
    inside, nodes, read = set(inputs), [], dict.fromkeys(inputs)
    for node in itertools.takewhile(lambda node: node is not leave, graph):
        values = [value for value in _list_inputs(node) if value.graph is graph]
        if any(value in inside for value in values):
            nodes.append(node)
            inside.update(node.outputs)
            read.update(dict.fromkeys(value for value in values if value not in inside))
    return ir.GraphView(list(read), [_read(leave)], nodes=nodes)


def _list_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, in the graphs of its attributes too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            yield from (value for inside in inner for value in _list_inputs(inside))
            yield from inner.outputs


def _read(mark: ir.Node) -> ir.Value:
    (value,) = mark.inputs
    assert value is not None
    return value


def _add_weight(graph: ir.Graph, name: str, like: ir.Value, tensor: Tensor) -> ir.Value:
    value = ir.Value(name=name, shape=like.shape, type=like.type, const_value=TorchTensor(tensor.detach(), name=name))
    graph.register_initializer(value)
    return value


def _insert_copy(graph: ir.Graph, mark: ir.Node, body: ir.GraphView, weights: Sequence[ir.Value]) -> None:
    """A copy of `body` on the mark's input and these weights, in the mark's place."""
    if not len(body):  # the block gives back what it was given
        replace_node(graph, mark, _read(mark))
        return
    clone = body.clone()
    given = [_read(mark), *weights, *body.inputs[1 + len(weights):]]
    for value, outer in zip(clone.inputs, given, strict=True):
        value.replace_all_uses_with(outer)
    output, nodes = clone.outputs[0], list(clone)
    clone.outputs.clear()
    clone.remove(nodes)
    for node in nodes:
        for value in node.outputs:
            value.name = None  # the graph gives each a name of its own
        node.name = None
    graph.insert_before(mark, nodes)
    replace_node(graph, mark, output)
