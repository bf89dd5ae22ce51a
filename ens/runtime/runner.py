"""Times the files of a plan in turn, on any device: needs Python, numpy and the plan's runtime, and no `ens`.

`ens profile --emit-bundle` writes this file as `run.py` beside the plan and its files: `python run.py` there fills
`results.json`, which `ens profile --from results.json` reads. `ens profile` itself runs it too. Every pass goes once
through all groups; the files of a group take turns. A pass of a group that is done is not repeated.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SLOW_MS = 2000.0
"""What takes longer runs once after its warm-up, however many repeats are asked for."""


def _open_ort(path: Path, threads: int) -> Callable[[np.ndarray], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_mem_pattern = False  # as `ens restore` opens it
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def _open_openvino(path: Path, threads: int, exact: bool = True) -> Callable[[np.ndarray], object]:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_PRECISION_HINT": "f32"} if exact else {}),
               **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    model = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda image: model([image])


def _open_executorch(path: Path, threads: int) -> Callable[[np.ndarray], object]:
    import torch
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    if threads:
        import contextlib

        with contextlib.suppress(ImportError):
            from executorch.extension.threadpool import _unsafe_reset_threadpool

            _unsafe_reset_threadpool(threads)
    module = _load_for_executorch(str(path))
    return lambda image: module.forward((torch.from_numpy(image),))


def _open_torch(path: Path, threads: int) -> Callable[[np.ndarray], object]:
    import torch

    if threads:
        torch.set_num_threads(threads)
    module = torch.export.load(str(path)).module()

    def run(image: np.ndarray) -> object:
        with torch.inference_mode():
            return module(torch.from_numpy(image))

    return run


OPENERS: dict[str, tuple[str, Callable[[Path, int], Callable[[np.ndarray], object]]]] = {
    "ort": ("onnxruntime", _open_ort), "openvino": ("openvino", _open_openvino),
    "openvino-default": ("openvino", functools.partial(_open_openvino, exact=False)),
    "executorch": ("executorch", _open_executorch), "torch": ("torch", _open_torch)}
"""Runtime -> its package, and how it opens a file (path, threads; 0 leaves the default)."""


def time_plan(folder: Path, *, on_step: Callable[[int, int], object], should_stop: Callable[[], bool]) -> bool:
    """Fill `results.json` of the plan in `folder`; False where it was stopped before the end."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    target = folder / "results.json"
    results = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    if results.get("plan") != plan:
        version = importlib.metadata.version(OPENERS[plan["runtime"]][0])
        results = {"plan": plan, "facts": {**describe_machine(), "version": version}, "done": {}}
    steps = [(number, index) for number in range(plan["passes"]) for index in range(len(plan["groups"]))]
    for done, (number, index) in enumerate(steps):
        if f"{number}.{index}" not in results["done"]:
            results["done"][f"{number}.{index}"] = _time_group(folder, plan, plan["groups"][index])
            if done + 1 == len(steps):
                results["facts"]["load"] += f" to {describe_machine()['load']}"
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps(results), encoding="utf-8")
            os.replace(temporary, target)
        on_step(done + 1, len(steps))
        if should_stop() and done + 1 < len(steps):
            return False
    return True


def _time_group(folder: Path, plan: dict[str, Any], group: list[dict[str, Any]]) -> dict[str, list[float]]:
    generator, runs = np.random.default_rng(0), []
    for one in group:
        run = OPENERS[plan["runtime"]][1](folder / one["file"], plan["threads"])
        runs.append(functools.partial(run, generator.random(one["shape"], np.float32)))
    return dict(zip([one["name"] for one in group], time_in_turn(runs, repeats=plan["repeats"]), strict=True))


def time_in_turn(runs: Sequence[Callable[[], object]], *, repeats: int,
                 on_round: Callable[[int], None] | None = None) -> list[list[float]]:
    """Milliseconds of every run, `repeats` each, all in turn; of one that takes `SLOW_MS`, once. The first round is
    never counted: at large sizes the pages it touches first take three times as long as the run (measured, 512²).
    """
    spent: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for run, times in zip(runs, spent, strict=True):
            if times and times[0] > SLOW_MS:
                continue
            began = time.perf_counter()
            run()
            taken = 1000 * (time.perf_counter() - began)
            if number:
                times.append(taken)
        if on_round is not None:
            on_round(number)
    return spent


def describe_machine() -> dict[str, str]:
    """Device and its load over the last minute: what stands beside a time."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    name = names[0] if names else platform.processor() or "unknown"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {"device": f"{name} ({platform.machine()}, {os.cpu_count()} processors)", "load": load}


if __name__ == "__main__":
    time_plan(Path(__file__).resolve().parent, should_stop=lambda: False,
               on_step=lambda done, total: sys.stderr.write(f"{done}/{total}\n"))
