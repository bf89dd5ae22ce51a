"""Shared statistics (export/statistics.py) of an ONNX file: one graph that reads them, one that is given them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from ens.export.statistics import PASSES, Restore, Share, mean_of, other_size

Array = NDArray[Any]
Feed = Mapping[str, Array]
RunGraph = Callable[[Feed], list[Array]]
"""Inputs by name -> the outputs in the graph's order."""
OpenGraph = Callable[[bytes], RunGraph]


def share_in_graph(path: Path, run: Restore, open_graph: OpenGraph, open_shared: OpenGraph | None = None) -> Share:
    """Share the statistics of the ONNX file at `path`. `open_graph` opens what reads them, `open_shared`, unless the
    same, what is given them. Where the file's size is fixed, its statistics cannot be told, and `run` stays as it is.
    """
    cut = functools.lru_cache(1)(functools.partial(_cut, path, open_graph))

    def share(tiles: Iterable[Tensor]) -> Restore:
        graphs = cut(tuple(next(iter(tiles)).shape[-2:]))
        given: dict[str, Array] = {}
        for data in (graphs.reads, *[graphs.reads_again] * (PASSES - 1)) if graphs.names else ():
            given = dict(zip(graphs.names, _read_means(open_graph(data), tiles, given), strict=True))
        if not given:
            return run
        restore = (open_shared or open_graph)(graphs.takes)
        return lambda tile: torch.from_numpy(restore({"image": _array(tile), **given})[0])
    return share


@dataclass(frozen=True)
class _Graphs:
    """`reads` gives the statistics and nothing else; `takes` has an input of each of `names` in their place, and
    `reads_again` gives them where what follows another one has that input.
    """

    names: tuple[str, ...] = ()
    reads: bytes = b""
    reads_again: bytes = b""
    takes: bytes = b""


def _read_means(read: RunGraph, tiles: Iterable[Tensor], given: Feed) -> list[Array]:
    means = mean_of([torch.from_numpy(value) for value in read({"image": _array(tile), **given})] for tile in tiles)
    return [value.numpy() for value in means]


def _array(image: Tensor) -> Array:
    return np.ascontiguousarray(image.numpy())


def _cut(path: Path, open_graph: OpenGraph, tile: tuple[int, int]) -> _Graphs:
    found = _find_statistics(path, open_graph, tile)
    if not found:
        return _Graphs()
    names = list(found)
    return _Graphs(tuple(f"{name}#shared" for name in names), _graph_of(path, names), _graph_of(path, names, found),
                   _graph_of(path, [], found))


def _graph_of(path: Path, outputs: Sequence[str], given: Mapping[str, tuple[int, ...]] = {}) -> bytes:
    """The file's graph with other outputs, if any are named, and with inputs of these shapes in the place of values."""
    model = _load(path)
    values = _named_values(model.graph)
    for name, shape in given.items():
        new = ir.Value(name=f"{name}#shared", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        values[name].replace_all_uses_with(new)
        model.graph.inputs.append(new)
    if outputs:
        model.graph.outputs[:] = [values[name] for name in outputs]
    RemoveUnusedNodesPass()(model)
    return _encode(model)


def _load(path: Path) -> ir.Model:
    return ir.external_data.load_to_model(ir.load(path))  # other tools put weights into a file of their own


def _encode(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def _named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {value.name: value for node in graph for value in node.outputs if value.name}


def _find_statistics(path: Path, open_graph: OpenGraph, tile: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every statistic, from the shapes of all values at two sizes."""
    model = _load(path)
    facts, values = model.metadata_props, _named_values(model.graph)
    if "height" in facts:
        return {}
    shapes = [ir.node("Shape", [value]) for value in values.values()]
    model.graph.extend(shapes)
    model.graph.outputs[:] = [node.outputs[0] for node in shapes]
    images = [np.zeros((1, int(facts["channels"]), *size), np.float32)
              for size in (tile, other_size(tile, int(facts["size_multiple"])))]
    read = open_graph(_encode(model))
    here, there = (dict(zip(values, read({"image": image}), strict=True)) for image in images)
    grows = {"image", *(name for name in values if not np.array_equal(here[name], there[name]))}
    found = [name for name, value in values.items() if name not in grows and value.uses()
             and any(given is not None and given.name in grows for given in _inputs(value))]
    known = open_graph(_graph_of(path, found))({"image": images[0]}) if found else []
    return {name: value.shape for name, value in zip(found, known, strict=True) if value.dtype == np.float32}


def _inputs(value: ir.Value) -> Sequence[ir.Value | None]:
    producer = value.producer()
    return () if producer is None else producer.inputs
