"""ONNX files and graphs in ONNX Runtime on the CPU.

Shapes: image (1, C, H, W) in [0, 1], H and W multiples of `size_multiple` -> (1, C, H·upscale, W·upscale).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor


def open_onnx(path: Path, threads: int | None) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """The file, opened, and the metadata beside its graph; raises what the runtime raises.

    FileNotFoundError names the file that other tools put the weights in, where it was left behind.
    """
    try:
        session = _open_session(str(path), threads)
    except Exception as error:  # the runtime's errors share no public class
        lost = re.search(r'External data path does not exist: "([^"]+)"', str(error))
        if lost is None:
            raise
        raise FileNotFoundError(f"its weights are in a file of their own, which is not beside it: {lost[1]}") from None
    return session, dict(session.get_modelmeta().custom_metadata_map)


def open_graph(data: bytes, threads: int | None) -> Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]:
    """A graph in ONNX Runtime: inputs by name -> all of its outputs."""
    session = _open_session(data, threads)
    return lambda feed: list(session.run(None, dict(feed)))


def _open_session(model: str | bytes, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    # Plans one block for all activations of a size: twice the peak, and no faster (measured, CPU, tiles of 512 px).
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(session: onnxruntime.InferenceSession, image: Tensor) -> Tensor:
    """One image through an opened file; raises what the runtime raises."""
    return torch.from_numpy(session.run(None, {"image": np.ascontiguousarray(image.numpy())})[0])


def release_onnx(session: onnxruntime.InferenceSession) -> None:
    """Give back what the runtime keeps for activations: all of the largest run so far, even of one that failed."""
    name, (_, channels, *sides) = session.get_inputs()[0].name, session.get_inputs()[0].shape
    least = int(session.get_modelmeta().custom_metadata_map["size_multiple"])
    height, width = (side if isinstance(side, int) else least for side in sides)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    # It does so at the end of a run only: of the smallest image that there is.
    session.run(None, {name: np.zeros((1, channels, height, width), np.float32)}, options)
