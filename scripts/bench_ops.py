"""Times of the state-space operators as ratios to what they are compared with: interleaved runs, medians, one run."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, nn

import ens.ops.scan_op
from ens.blocks import create_stack
from ens.export.graph import tidy_graph
from ens.export.onnx import OPSET, simplify_graph
from ens.networks.mambair_unet import MambaIRUNet
from ens.ops.scan_order import FOUR_DIRECTIONS, invert_order, scan_order
from ens.ops.selective_scan import scan_backends, selective_scan, selective_scan_directions, selective_scan_loop
from ens.ops.ssd import ssd, ssd_chunked

LEVELS = ((48, 256, 1), (96, 128, 2), (192, 64, 4), (384, 32, 8))
"""Channels, side and heads of Restormer's four levels for a 256² image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench_ops.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench = Bench(arguments.repeats)
    for part in (bench_memory, bench_scan, bench_growth, bench_orders, bench_mambair, bench_ssd, bench_blocks,
                 bench_onnx):
        part(bench, arguments.threads)
    facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "processor": processor(),
             "onnxruntime": onnxruntime.__version__, "threads": arguments.threads, "repeats": arguments.repeats,
             "load_average": os.getloadavg()[0], **{f"scan_on_{k}": v for k, v in scan_backends().items()}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write(arguments.out, json.dumps({"machine": facts, "rows": bench.rows}, indent=1, ensure_ascii=False) + "\n")
    write(arguments.out.with_suffix(".md"), format_table(bench.rows, facts))
    print(f"{arguments.out}  ({', '.join(f'{name} {value}' for name, value in facts.items())})")


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def format_table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as Markdown, the machine above them."""
    lines = ["# State-space operators, each beside what it is compared with", "",
             "`scripts/bench_ops`, one run, medians of interleaved repeats, milliseconds unless a row says otherwise. "
             "Ratio: times faster where the bound is ≥ or absent, times slower or larger where it is ≤.", "",
             *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()), "",
             "| what | | against | | ratio | bound | |", "|---|---:|---|---:|---:|---|---|"]
    for row in rows:
        met = {True: "met", False: "**missed**", None: ""}[row["met"]]
        lines.append(f"| {row['what']} | {row['this']:.2f} | {row['against']} | {row['other']:.2f} | {row['ratio']:.2f}"
                     f" | {row['bound']} | {met} |")
    return "\n".join(lines) + "\n"


class Bench:
    """Rows of the table: what was measured, against what, in milliseconds, and the ratio with its bound."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, this: Callable[[], Any], other_name: str, other: Callable[[], Any], *,
            at_least: float | None = None, at_most: float | None = None, other_repeats: int | None = None,
            warm_s: float = 0.0) -> None:
        """Time both in turn. `at_least`: wanted times faster than the other; `at_most`: wanted times slower.

        Each timed run follows an untimed one of its own, so neither pays for what the other left in the caches; without
        it where `other_repeats` says that the other is slow. `warm_s`: before that, `this` runs for so long, whichever
        is timed. A virtual machine's second processor that was idle may share its neighbour's core for a while, and two
        threads then do the work of one: seen on bare multiply-adds in registers, for some tenths of a second.
        """
        times: tuple[list[float], list[float]] = ([], [])
        this(), other()
        for repeat in range(self.repeats):
            for spent, run in zip(times, (this, other), strict=True):
                if run is other and repeat >= (other_repeats or self.repeats):
                    continue
                until = time.perf_counter() + warm_s
                while time.perf_counter() < until:
                    this()
                if run is this or other_repeats is None:
                    run()
                began = time.perf_counter()
                run()
                spent.append(1000 * (time.perf_counter() - began))
        ours, theirs = (statistics.median(spent) for spent in times)
        if at_most is not None:
            self.note(name, other_name, ours, theirs, ours / theirs, f"≤ {at_most}", ours / theirs <= at_most)
        else:
            bound = "" if at_least is None else f"≥ {at_least}"
            self.note(name, other_name, ours, theirs, theirs / ours, bound, theirs / ours >= (at_least or 0))

    def note(self, name: str, other: str, ours: float, theirs: float, ratio: float, bound: str, met: bool) -> None:
        self.rows.append({"what": name, "against": other, "this": round(ours, 3), "other": round(theirs, 3),
                          "ratio": round(ratio, 3), "bound": bound, "met": met if bound else None})
        print(f"{ratio:8.2f} x {bound:7} {'' if not bound else 'ok  ' if met else 'MISS'} {name}: {ours:.2f}   "
              f"{other}: {theirs:.2f}", flush=True)


def processor() -> str:
    """Model name of the processor where the system tells, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def scan_inputs(length: int = 16384, channels: int = 96, states: int = 16) -> list[Tensor]:
    """u, delta, A, B, C with realistic step sizes."""
    return [torch.randn(1, channels, length), torch.randn(1, channels, length) - 3, -torch.rand(channels, states) * 4,
            torch.randn(1, states, length), torch.randn(1, states, length)]


def forward_backward(function: Callable[..., Any], tensors: list[Tensor]) -> Callable[[], None]:
    """One pass both ways; gradients of every tensor."""
    leaves = [m.detach().clone().requires_grad_() for m in tensors]

    def run() -> None:
        torch.autograd.grad(function(*leaves).sum(), leaves)

    return run


def scan(*tensors: Tensor) -> Tensor:
    y = selective_scan(*tensors, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


def loop(*tensors: Tensor) -> Tensor:
    y = selective_scan_loop(*tensors, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


@contextmanager
def chunked_path() -> Iterator[None]:
    """The scan as it runs where the kernel is not built."""
    kernel = ens.ops.scan_op.HAS_KERNEL
    ens.ops.scan_op.HAS_KERNEL = False
    try:
        yield
    finally:
        ens.ops.scan_op.HAS_KERNEL = kernel


def on_chunked_path(run: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> None:
        with chunked_path():
            run()

    return wrapped


def peak_bytes(run: Callable[[], Any]) -> int:
    """Growth of the resident set's peak while `run` runs; Linux only, 0 elsewhere."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0

    def read(field: str) -> int:
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    clear.write_text("5", encoding="utf-8")  # sets the peak back to the present size
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def bench_memory(bench: Bench, threads: int) -> None:
    tensors = scan_inputs()
    size = sum(m.nbytes for m in tensors)
    small = forward_backward(scan, [m[..., :256].contiguous() if m.ndim == 3 else m for m in tensors])
    small()  # libraries, threads
    leaves = [m.requires_grad_() for m in tensors]
    extra = peak_bytes(lambda: torch.autograd.grad(scan(*leaves).sum(), leaves))
    bench.note("peak memory of scan forward+backward, MB", "its inputs, MB", extra / 1e6, size / 1e6, extra / size,
               "≤ 3", extra <= 3 * size)


def bench_scan(bench: Bench, threads: int) -> None:
    tensors = scan_inputs()
    values = torch.randn(96 * 16384 * 16)
    out = torch.empty_like(values)
    with torch.no_grad():
        bench.add("scan forward", lambda: scan(*tensors), "loop forward", lambda: loop(*tensors), at_least=60,
                  other_repeats=2)
    bench.add("scan forward+backward", forward_backward(scan, tensors), "loop forward+backward",
              forward_backward(loop, tensors), at_least=100, other_repeats=2)
    with torch.no_grad():
        bench.add("scan forward", lambda: scan(*tensors), "exp over B·D·L·N floats", lambda: torch.exp(values, out=out),
                  at_most=1.5)
        bench.add("scan forward", lambda: scan(*tensors), "chunked PyTorch path",
                  on_chunked_path(lambda: scan(*tensors)))
    both = forward_backward(scan, tensors)
    bench.add("scan forward+backward", both, "chunked PyTorch path", on_chunked_path(both))


def bench_growth(bench: Bench, threads: int) -> None:
    short, long = scan_inputs(), scan_inputs(65536)
    with torch.no_grad():
        bench.add("scan L = 65,536", lambda: scan(*long), "scan L = 16,384", lambda: scan(*short), at_most=4.4)

    def with_threads(count: int, run: Callable[[], Any]) -> Callable[[], None]:
        def wrapped() -> None:
            torch.set_num_threads(count)
            run()
            torch.set_num_threads(threads)

        return wrapped

    with torch.no_grad():
        bench.add(f"scan forward, {threads} threads", lambda: scan(*short), "one thread",
                  with_threads(1, lambda: scan(*short)), at_least=1.7, warm_s=1.0)
    both = forward_backward(scan, short)
    bench.add(f"scan forward+backward, {threads} threads", both, "one thread", with_threads(1, both), at_least=1.7,
              warm_s=1.0)


def bench_orders(bench: Bench, threads: int) -> None:
    side, inner, states = 128, 96, 16
    order = torch.stack([scan_order(name, side, side) for name in FOUR_DIRECTIONS])
    last = [m.transpose(1, 2) for m in (torch.randn(1, side * side, inner), torch.randn(1, side * side, 4 * inner) - 3)]
    B, C = (torch.randn(1, side * side, 4, states).permute(0, 2, 3, 1) for _ in range(2))
    A, D, bias = -torch.rand(4 * inner, states) * 4, torch.ones(4 * inner), torch.zeros(4 * inner)

    def through_order(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan_directions(u, delta, A, B, C, D, bias, order)

    def with_copies(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        parts = [torch.stack([m[..., index] if m is u else m[:, g][..., index] for g, index in enumerate(order)], 1)
                 for m in (u, delta.unflatten(1, (4, -1)), B, C)]
        y = selective_scan(parts[0].flatten(1, 2), parts[1].flatten(1, 2), A, parts[2], parts[3], D, None, bias, True)
        assert isinstance(y, Tensor)
        directions = y.unflatten(1, (4, -1))
        return torch.stack([directions[:, g][..., invert_order(index)] for g, index in enumerate(order)]).sum(0)

    tensors = [*last, B, C]
    plain = [m.contiguous() for m in tensors]  # channels first, as copies are cheapest there
    with torch.no_grad():
        bench.add("four directions in place, forward", lambda: through_order(*tensors), "four reordered copies",
                  lambda: with_copies(*plain))
    bench.add("four directions in place, forward+backward", forward_backward(through_order, tensors),
              "four reordered copies", forward_backward(with_copies, plain))


def bench_mambair(bench: Bench, threads: int) -> None:
    block, x = create_stack("mambair", 48, 1), torch.randn(1, 48, 128, 128)
    parameters = list(block.parameters())

    def both() -> None:
        torch.autograd.grad(block(x).sum(), parameters)

    with path_of_before(threads) as before:
        if before is not None:
            bench.add("MambaIR block 48×128², forward+backward", both, "chunked PyTorch path of before", before,
                      at_least=15, other_repeats=3)
    bench.add("MambaIR block 48×128², forward+backward", both, "chunked PyTorch path of today", on_chunked_path(both),
              other_repeats=3)
    network, image = MambaIRUNet().eval(), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        run = open_block(block.eval(), 48, threads)
        small = x[..., :64, :64].contiguous()
        pixels = small.numpy()
        bench.add("MambaIR block 48×64², forward", lambda: block(small), "ONNX Runtime's Scan", lambda: run(pixels),
                  other_repeats=3)
        bench.add("mambair_unet 128², forward", lambda: network(image), "chunked PyTorch path",
                  on_chunked_path(lambda: network(image)), other_repeats=1)


BEFORE = "28e9e19^"
"""The last commit in which a selective scan on the CPU was PyTorch operators on reordered copies."""
WORKER = """
import sys, torch
from ens.blocks import create_stack
torch.set_num_threads(int(sys.argv[1]))
block, x = create_stack("mambair", 48, 1), torch.randn(1, 48, 128, 128)
for _ in sys.stdin:
    torch.autograd.grad(block(x).sum(), list(block.parameters()))
    print("done", flush=True)
"""


@contextmanager
def path_of_before(threads: int) -> Iterator[Callable[[], None] | None]:
    """Forward and backward of a MambaIR block as that commit ran it, in a process of its own; None without history."""
    root = Path(__file__).parents[1]
    archive = subprocess.run(["git", "archive", BEFORE, "ens"], cwd=root, capture_output=True)
    if archive.returncode:
        print(f"no commit {BEFORE} here: the chunked path of before is left out")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(threads)], stdin=subprocess.PIPE, encoding="utf-8",
                                  stdout=subprocess.PIPE, cwd=folder, env={**os.environ, "PYTHONPATH": folder})
        assert worker.stdin is not None and worker.stdout is not None
        asked, answers = worker.stdin, worker.stdout

        def run() -> None:
            print(file=asked, flush=True)
            if not answers.readline():
                raise RuntimeError("the chunked path of before stopped")

        yield run
        asked.close()
        worker.wait()


def bench_ssd(bench: Bench, threads: int) -> None:
    length = 16384
    for heads, width, states in ((4, 24, 16), (2, 48, 64), (8, 64, 64)):
        x, dt = torch.randn(1, length, heads, width), torch.rand(1, length, heads) * 0.1
        A = -torch.rand(heads) * 4
        B, C = (torch.randn(1, length, 1, states) for _ in range(2))
        inner = heads * width
        with torch.no_grad():
            for chunk in (16, 32, 64, 128):
                side = round((length * (chunk * (states + inner) + 2 * states * inner)) ** (1 / 3))
                a, b = torch.randn(side, side), torch.randn(side, side)
                label = f"H {heads} P {width} N {states}"
                if chunk == 64:
                    bench.add(f"ssd {label}", lambda: ssd(x, dt, A, B, C), f"matrix product of {side}³",  # noqa: B023
                              lambda: a @ b, at_most=3)  # noqa: B023
                bench.add(f"ssd_chunked {label} T {chunk}",
                          lambda: ssd_chunked(x, dt, A, B, C, chunk),  # noqa: B023
                          f"matrix product of {side}³", lambda: a @ b)  # noqa: B023


def bench_blocks(bench: Bench, threads: int) -> None:
    for channels, side, heads in LEVELS:
        x = torch.randn(1, channels, side, side)
        blocks = [create_stack(family, channels, 1, heads=heads).eval() for family in ("vssd", "restormer")]
        with torch.no_grad():
            bench.add(f"vssd block {channels}×{side}² eager", lambda: blocks[0](x), "restormer block",  # noqa: B023
                      lambda: blocks[1](x), at_least=1)  # noqa: B023


def bench_onnx(bench: Bench, threads: int) -> None:
    families = ("restormer", "vssd", "conv", "ssd")
    for channels, side, heads in LEVELS:
        x = torch.randn(1, channels, side, side).numpy()
        runs = [open_block(create_stack(family, channels, 1, heads=heads).eval(), channels, threads)
                for family in families]
        for family, run in list(zip(families, runs, strict=True))[1:]:
            bench.add(f"{family} block {channels}×{side}² ONNX Runtime", lambda: run(x), "restormer block",  # noqa: B023
                      lambda: runs[0](x), at_least=1 if family == "vssd" else None)  # noqa: B023


def open_block(block: nn.Module, channels: int, threads: int) -> Callable[[Any], Any]:
    """The block in ONNX Runtime as `ens export` writes it, height and width dynamic."""
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.onnx.export(block, (torch.randn(1, channels, 48, 64),), dynamo=True, dynamic_shapes=(dynamic,),
                                    opset_version=OPSET, verbose=False, optimize=False)
    assert program is not None
    InlinePass()(program.model)
    simplify_graph(program.model)
    tidy_graph(program.model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


if __name__ == "__main__":
    main()
