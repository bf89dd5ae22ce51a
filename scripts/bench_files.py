"""Milliseconds of exported files in ONNX Runtime, interleaved, as medians and as ratios to the first file."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    sessions = [onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
                for file in arguments.files]
    image = np.random.default_rng(0).random((1, 3, arguments.size, arguments.size), np.float32)
    times: list[list[float]] = [[] for _ in sessions]
    for repeat in range(arguments.repeats + 2):
        for session, spent in zip(sessions, times, strict=True):
            began = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            if repeat >= 2:  # the first runs allocate
                spent.append(1000 * (time.perf_counter() - began))
    first = statistics.median(times[0])
    print(f"ONNX Runtime {onnxruntime.__version__}, {arguments.threads} threads, "
          f"1×3×{arguments.size}×{arguments.size}, median of {arguments.repeats} interleaved runs")
    for file, spent in zip(arguments.files, times, strict=True):
        median = statistics.median(spent)
        print(f"{median:8.1f} ms (min {min(spent):.1f})  {first / median:5.2f} times as fast  {file}")


if __name__ == "__main__":
    main()
