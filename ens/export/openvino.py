"""OpenVINO: the ONNX file as it is, in a runtime of its own (extra `[openvino]`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray
from torch import Tensor, from_numpy


def open_openvino(path: Path, threads: int | None, *,
                  exact: bool = True) -> tuple[openvino.CompiledModel, dict[str, str]]:
    """The ONNX file compiled for the CPU, and its metadata; raises what the runtime raises."""
    data = path.read_bytes()
    model = _compile(data, threads, exact)
    return model, {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}


def open_graph(data: bytes, threads: int | None, *,
               exact: bool = True) -> Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]:
    """An ONNX graph in OpenVINO: inputs by name -> all of its outputs."""
    model = _compile(data, threads, exact)
    return lambda feed: [value.copy() for value in model(dict(feed)).to_tuple()]


def _compile(data: bytes, threads: int | None, exact: bool) -> openvino.CompiledModel:
    """`exact` computes in float32. Otherwise the device's default precision is taken, which is bfloat16 on some.
    """
    core = openvino.Core()
    options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY"}
    if exact:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return core.compile_model(core.read_model(data), "CPU", options)


def run_openvino(model: openvino.CompiledModel, image: Tensor) -> Tensor:
    """One image through an opened file; raises what the runtime raises."""
    return from_numpy(model([np.ascontiguousarray(image.numpy())])[0].copy())
