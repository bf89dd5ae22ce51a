"""Rewrites of ONNX graphs: the same values from fewer passes over memory, and hands off whatever does not fit."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ens.export.graph import tidy_graph

RNG = np.random.default_rng(0)


class Drawing:
    """A graph under construction: x (1, 8, H, W) goes in, the named values come out."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, array: NDArray[np.generic]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def conv(self, x: str, cin: int, cout: int, *, kernel: int = 1, depthwise: bool = False, bias: bool = True) -> str:
        weight = RNG.standard_normal((cout, 1 if depthwise else cin, kernel, kernel)).astype(np.float32)
        inputs = [self.constant(weight)]
        if bias:
            inputs.append(self.constant(RNG.standard_normal(cout).astype(np.float32)))
        return self.node("Conv", x, *inputs, group=cout if depthwise else 1, pads=[kernel // 2] * 4)

    def slice(self, x: str, start: int, stop: int, axis: int = 1) -> str:
        return self.node("Slice", x, *(self.constant(np.array([value], np.int64)) for value in (start, stop, axis, 1)))

    def per_channel(self, op: str, x: str, channels: int = 8) -> str:
        return self.node(op, x, self.constant(RNG.standard_normal((1, channels, 1, 1)).astype(np.float32)))

    def check(self, outputs: Sequence[str]) -> tuple[Counter[str], Counter[str]]:
        """Tidy the graph, compare the outputs in ONNX Runtime, return the operators before and after."""
        sides = (1, 8, "h", "w")
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, None, None, None)) for name in outputs],
            self.constants)
        before = onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), data_prop=True)
        model = ir.serde.deserialize_model(before)
        tidy_graph(model)
        after = ir.serde.serialize_model(model)
        onnx.checker.check_model(after, full_check=True)
        self.before, self.after = before, after
        x = RNG.standard_normal((1, 8, 9, 7)).astype(np.float32)
        first, second = (onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
                         for proto in (before, after))
        for one, other in zip(first, second, strict=True):
            assert one.shape == other.shape
            assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)
        used = {name for node in after.graph.node for name in node.input}
        assert all(constant.name in used for constant in after.graph.initializer)
        return tuple(Counter(node.op_type for node in proto.graph.node) for proto in (before, after))


@pytest.mark.parametrize("bias", [True, False])
def test_halves_of_a_gated_convolution_become_two(bias: bool) -> None:
    d = Drawing()
    y = d.conv(d.conv("x", 8, 16, bias=bias), 16, 16, kernel=3, depthwise=True, bias=bias)
    out = d.conv(d.node("Mul", d.slice(y, 0, 8), d.slice(y, 8, 16)), 8, 8)
    before, after = d.check([out])
    assert before == {"Conv": 3, "Slice": 2, "Mul": 1}
    assert after == {"Conv": 5, "Mul": 1}


def test_a_slice_of_a_slice_is_followed_to_its_convolution() -> None:
    d = Drawing()
    projected = d.conv("x", 8, 24)
    mixed = d.conv(d.slice(projected, 8, 2**31), 16, 16, kernel=3, depthwise=True)
    parts = [d.slice(projected, 0, 8), d.slice(mixed, 0, 8), d.slice(mixed, 8, 12), d.slice(mixed, -4, 16)]
    assert d.check([parts[0], d.node("Mul", *parts[:2]), d.node("Add", *parts[2:])])[1] == {
        "Conv": 7, "Mul": 1, "Add": 1}


def test_factors_and_shifts_fold_into_every_pointwise_convolution_behind() -> None:
    d = Drawing()
    y = d.per_channel("Add", d.per_channel("Mul", "x"))
    assert d.check([d.conv(y, 8, 4), d.conv(y, 8, 8, bias=False)])[1] == {"Conv": 2}


def _draw_norm(d: Drawing, x: str) -> str:
    """Mean and scale of a layer norm, each a map of one channel."""
    ones = d.constant(np.full((1, 8, 1, 1), 1 / 8, np.float32))
    centred = d.node("Sub", x, d.node("Conv", x, ones))
    variance = d.node("Conv", d.node("Mul", centred, centred), ones)
    return d.node("Mul", centred, d.node("Reciprocal", d.node("Sqrt", variance)))


def _draw_core(d: Drawing, x: str, state: str) -> str:
    """A matrix product of a map's pixels, as attention and state-space cores end, and its product with a gate."""
    flat = d.node("Reshape", d.conv(x, 8, 8), d.constant(np.array([1, 8, -1], np.int64)))
    seen = d.node("Reshape", d.node("MatMul", state, flat), d.node("Shape", x))
    return d.node("Mul", seen, d.conv(x, 8, 8))


def test_norms_residuals_and_cores_stay_in_the_layout_of_convolutions() -> None:
    d = Drawing()
    state = d.constant(RNG.standard_normal((1, 8, 8)).astype(np.float32))
    y = d.node("Add", "x", d.conv(_draw_core(d, _draw_norm(d, "x"), state), 8, 8))
    out = d.node("Add", y, d.conv(d.node("Relu", d.conv(_draw_norm(d, y), 8, 8)), 8, 8))
    before, after = d.check([d.conv(out, 8, 8)])
    assert before["Sub"] == 2 and after["Sub"] == 0
    assert after["Conv"] == before["Conv"] + 2 + 2 + 2  # two means, two scales, the input, what the product gives
    copies = [_count_copies(model) for model in (d.before, d.after)]
    assert copies[1] <= copies[0] / 2 or copies == [0, 0]  # no blocked layout on this processor


def _count_copies(model: onnx.ModelProto) -> int:
    """Maps of whole blocks that ONNX Runtime copies from one layout to the other, on 1 × 8 × 9 × 7."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for axis, side in ((2, 9), (3, 7)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = side
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    narrow = {name for node in graph.node if node.op_type == "Conv" for name in node.output
              if next(w.dims[0] for w in graph.initializer if w.name == node.input[1]) == 1}
    return sum(node.op_type.startswith("Reorder") and node.input[0] not in narrow for node in graph.node)


def test_maps_of_other_shapes_are_left_where_they_are() -> None:
    d = Drawing()
    pooled = d.node("GlobalAveragePool", d.conv("x", 8, 8))
    gated = d.node("Mul", d.conv("x", 8, 8), d.conv(pooled, 8, 8))  # a vector of channels
    uneven = d.node("Sub", d.conv("x", 8, 12), d.conv("x", 8, 1))  # no whole blocks
    last = d.node("Sub", d.conv("x", 8, 8), d.conv("x", 8, 1))  # nothing behind it is a convolution
    before, after = d.check([d.conv(gated, 8, 8), d.conv(uneven, 12, 8), d.node("Tanh", last)])
    assert before == after


def test_what_does_not_fit_stays_as_it_is() -> None:
    for draw in (_shift_before_padding, _uneven_parts, _whole_output_used_too, _other_axis, _factor_used_elsewhere,
                 _grouped):
        d = Drawing()
        before, after = d.check(draw(d))
        assert before == after, draw.__name__


def _shift_before_padding(d: Drawing) -> list[str]:
    return [d.conv(d.per_channel("Add", "x"), 8, 8, kernel=3)]


def _uneven_parts(d: Drawing) -> list[str]:
    y = d.conv("x", 8, 10)
    return [d.node("Relu", d.slice(y, 0, 5)), d.slice(y, 5, 10)]


def _whole_output_used_too(d: Drawing) -> list[str]:
    y = d.conv("x", 8, 8)
    return [d.slice(y, 0, 4), d.node("Relu", y)]


def _other_axis(d: Drawing) -> list[str]:
    return [d.slice(d.conv("x", 8, 8), 0, 4, axis=2)]


def _factor_used_elsewhere(d: Drawing) -> list[str]:
    y = d.per_channel("Mul", "x")
    return [d.conv(y, 8, 8), d.node("Relu", y)]


def _grouped(d: Drawing) -> list[str]:
    weight = d.constant(RNG.standard_normal((8, 4, 1, 1)).astype(np.float32))
    y = d.node("Conv", d.per_channel("Mul", "x"), weight, group=2)
    return [d.slice(y, 0, 4), d.slice(y, 4, 8)]
