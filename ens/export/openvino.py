"""OpenVINO: the ONNX file as it is, in a runtime of its own (extra `[openvino]`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
from torch import Tensor, from_numpy


def open_openvino(path: Path, threads: int | None, *,
                  exact: bool = True) -> tuple[openvino.CompiledModel, dict[str, str]]:
    """The ONNX file compiled for the CPU, and its metadata; raises what the runtime raises.

    `exact` computes in float32. Otherwise the device's default precision is taken, which is bfloat16 on some.
    """
    core = openvino.Core()
    options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY"}
    if exact:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    data = path.read_bytes()
    model = core.compile_model(core.read_model(data), "CPU", options)
    return model, {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}


def run_openvino(model: openvino.CompiledModel, image: Tensor) -> Tensor:
    """One image through an opened file; raises what the runtime raises."""
    return from_numpy(model([np.ascontiguousarray(image.numpy())])[0].copy())
