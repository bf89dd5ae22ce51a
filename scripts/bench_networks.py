"""Every published network in one run: parameters, MACs with the scan counted, milliseconds and peak memory by size.

`python scripts/bench_networks.py --out results/networks` writes `networks.csv` and `networks.md`, the claims of the
papers beside what is counted and timed here. Each network and size runs in a process of its own, so that its peak
memory is its own; sizes are interleaved, networks timed in turn.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ens.blocks import create_stack
from ens.evaluate.cost import count_cost
from ens.networks import create_network

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Restormer": ("restormer", {"layer_norm": "BiasFree"}),
    "MambaIR-UNet (expand 2)": ("mambair_unet", {}),
    "MambaIR-UNet (expand 1.5)": ("mambair_unet", {"mlp_ratio": 1.5}),
    "Uformer-S": ("uformer", {"embed_dim": 32, "modulator": False}),
    "Serpent-style, patch 1": ("serpent", {"patch_size": 1}),
    "Serpent-style, patch 2": ("serpent", {"patch_size": 2}),
    "Serpent-style, patch 4": ("serpent", {"patch_size": 4}),
    "PLKSR ×4": ("plksr", {}),
    "PLKSR-tiny ×4": ("plksr", {"n_blocks": 12, "kernel_size": 13, "use_ea": False}),
    "DVMSR ×4": ("dvmsr", {}),
    "MambaCSR ×4": ("mambacsr", {}),
    "MambaCSR ×4, one scale": ("mambacsr", {"cross_scale_scan": False}),
}
TINY = {"n_blocks": 12, "kernel_size": 13, "use_ea": False}
# MACs as the papers say them: title, claim, network, options, input height and width.
MAC_CLAIMS: list[tuple[str, str, str, dict[str, Any], int, int]] = [
    ("Restormer, MACs at 256²", "154.88 G (141 G + attention)", "restormer", {}, 256, 256),
    *((f"PLKSR ×{scale}, MACs for 1280×720", claim, "plksr", {"upscaling_factor": scale}, 720 // scale, 1280 // scale)
      for scale, claim in ((2, "1694.8 G"), (3, "752.9 G"), (4, "424.9 G"))),
    *((f"PLKSR-tiny ×{scale}, MACs for 1280×720", claim, "plksr", {"upscaling_factor": scale, **TINY}, 720 // scale,
       1280 // scale) for scale, claim in ((2, "540.6 G"), (3, "240.8 G"), (4, "136.3 G"))),
    ("DVMSR, MACs at 256²", "20.17 G, without conv1d, projections and scan", "dvmsr", {}, 256, 256),
]
PARAMETER_CLAIMS = {"Restormer": 26_111_668, "MambaIR-UNet (expand 2)": 30_750_424,
                    "MambaIR-UNet (expand 1.5)": 26_779_480, "PLKSR ×4": 7_386_096, "PLKSR-tiny ×4": 2_370_544,
                    "DVMSR ×4": 424_428, "MambaCSR ×4": 22_051_842, "MambaCSR ×4, one scale": 18_372_603}
COLUMNS = ("network", "size", "params", "macs", "ms", "peak_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/networks"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of the process, "
                        "for a machine that is busy with other work; give one thread then")
    parser.add_argument("--limit-tmac", type=float, default=1.5, help="count, but do not run, what costs more")
    parser.add_argument("--limit-mib", type=float, default=8192, help="count, but do not run, what needs more")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SIZE"), help="time one, print JSON (used by the script)")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(time_one(given.one[0], int(given.one[1]), given.threads, given.repeats, given.clock)))
        return
    torch.set_num_threads(given.threads)
    rows = []
    for size in given.sizes:
        for name in given.networks:
            row = measure(name, size, given)
            rows.append(row)
            print(*(row[column] for column in COLUMNS), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "networks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    machine = (f"PyTorch {torch.__version__}, {given.threads} threads, {platform.machine()}, median of {given.repeats} "
               f"runs ({given.clock} time), one image of 3 channels")
    (given.out / "networks.md").write_text(write_tables(rows, given.sizes, machine), encoding="utf-8")


def measure(name: str, size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Count one network at one size, and time it in a fresh process where it is within the limits."""
    network, options = NETWORKS[name]
    with torch.device("meta"):
        cost = count_cost(create_network(network, **options), (1, 3, size, size))
    row: dict[str, Any] = {"network": name, "size": size, "params": cost.params, "macs": cost.macs, "ms": "",
                           "peak_mib": ""}
    if cost.macs > given.limit_tmac * 1e12 or cost.peak_bytes > given.limit_mib * 2**20:
        return row
    command = [sys.executable, __file__, "--one", name, str(size), "--threads", str(given.threads), "--repeats",
               str(given.repeats), "--clock", given.clock]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return row | (json.loads(done.stdout) if done.returncode == 0 else {"ms": "failed"})


def time_one(name: str, size: int, threads: int, repeats: int, clock: str) -> dict[str, float]:
    """Median milliseconds, and MiB that the passes added to the process's largest resident size."""
    torch.set_num_threads(threads)
    network, options = NETWORKS[name]
    torch.manual_seed(0)
    module = create_network(network, **options).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    now, times = {"wall": time.perf_counter, "cpu": time.process_time}[clock], []
    with torch.inference_mode():
        image = torch.rand(1, 3, size, size)
        module(torch.rand(1, 3, 64, 64))
        for _ in range(repeats):
            began = now()
            module(image)
            times.append(1000 * (now() - began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"ms": round(statistics.median(times), 1), "peak_mib": round(peak / 1024, 1)}


def write_tables(rows: list[dict[str, Any]], sizes: list[int], machine: str) -> str:
    """Markdown: one table by size, growth from size to size and ratios to Restormer, and the papers' claims."""
    found = {(row["network"], row["size"]): row for row in rows}
    names = list(dict.fromkeys(row["network"] for row in rows))
    lines = ["# The published networks, measured", "", f"{machine}. Super-resolution sizes are those of the input. An "
             "empty cell was counted, not run.", "",
             "| network | parameters | " + " | ".join(f"G MAC {size}² | ms | MiB" for size in sizes) + " |",
             "|---|---|" + "---|" * (3 * len(sizes))]
    for name in names:
        cells = [f"{found[name, size]['macs'] / 1e9:.1f} | {found[name, size]['ms']} | {found[name, size]['peak_mib']}"
                 for size in sizes]
        lines.append(f"| {name} | {found[name, sizes[0]]['params']:,} | " + " | ".join(cells) + " |")
    lines += ["", "Growth of the time from one size to the next (4.0 is linear in the pixels), and of MACs and time "
              "against Restormer at the same size (Restormer / network):", "",
              "| network | " + " | ".join(f"ms {a}²→{b}²" for a, b in itertools.pairwise(sizes)) + " | "
              + " | ".join(f"MACs, ms at {size}²" for size in sizes) + " |",
              "|---|" + "---|" * (2 * len(sizes) - 1)]
    for name in names:
        growth = [divide(found[name, b]["ms"], found[name, a]["ms"]) for a, b in itertools.pairwise(sizes)]
        ratios = [" / ".join(divide(found["Restormer", size][key], found[name, size][key]) for key in ("macs", "ms"))
                  if ("Restormer", size) in found else "" for size in sizes]
        lines.append(f"| {name} | " + " | ".join([*growth, *ratios]) + " |")
    lines += ["", "The claims of the papers, and the same here. Their times are a GPU's or a phone's, so ratios are "
              "what can be compared.", "", "| claim | paper | here |", "|---|---|---|"]
    lines += [f"| {title} | {claim} | {here} |" for title, claim, here in compare_claims(found, sizes)]
    return "\n".join([*lines, ""])


def compare_claims(found: dict[tuple[str, int], dict[str, Any]], sizes: list[int]) -> list[tuple[str, str, str]]:
    """Title, what the paper says, what is counted or timed here."""
    rows = [(f"{name}, parameters", f"{claim:,}", f"{found[name, sizes[0]]['params']:,}")
            for name, claim in PARAMETER_CLAIMS.items() if (name, sizes[0]) in found]
    for title, claim, network, options, height, width in MAC_CLAIMS:
        with torch.device("meta"):
            macs = count_cost(create_network(network, **options), (1, 3, height, width)).macs
        rows.append((title, claim, f"{macs / 1e9:.2f} G"))

    def ratios(above: str, below: str, key: str) -> str:
        known = [(size, divide(found[above, size][key], found[below, size][key])) for size in sizes
                 if (above, size) in found and (below, size) in found]
        return ", ".join(f"{ratio}× at {size}²" for size, ratio in known if ratio) or "not measured"

    serpent = "Serpent-style, patch 4"
    rows += [("Serpent: fewer FLOPs than Restormer", "up to 150×", ratios("Restormer", serpent, "macs")),
             ("Serpent: less memory than Restormer", "up to 5×", ratios("Restormer", serpent, "peak_mib")),
             ("Serpent: the advantage in time grows with resolution", "yes", ratios("Restormer", serpent, "ms")),
             ("PLKSR ×4 / PLKSR-tiny ×4, time", "3.0× (10.9 / 3.6 ms)", ratios("PLKSR ×4", "PLKSR-tiny ×4", "ms"))]
    torch.manual_seed(0)
    image = torch.rand(1, 64, 180, 320)
    naive, partial = (time_module(nn.Conv2d(n, n, 17, padding=8), image[:, :n]) for n in (64, 16))
    rows.append(("PLKSR: the 17×17 kernel on 16 of 64 channels against all 64", "−86 % time",
                 f"{partial / naive - 1:+.0%}"))
    level = torch.rand(1, 48, 128, 128)
    mamba, transformer = (time_module(create_stack(family, 48, 1, heads=1, options={}), level)
                          for family in ("mambair", "restormer"))
    rows.append(("ENS: a MambaIR block / a Restormer block, time (here: 48 channels, 128²)", "0.75× (180 / 240 ms)",
                 f"{mamba / transformer:.2f}× ({mamba:.0f} / {transformer:.0f} ms)"))
    return rows


def time_module(module: nn.Module, image: torch.Tensor, *, repeats: int = 7) -> float:
    """Median milliseconds of a forward pass."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            module.eval()(image)
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def divide(a: float | str, b: float | str) -> str:
    """a / b to two places, "" where one of them was not measured."""
    return f"{a / b:.2f}" if isinstance(a, int | float) and isinstance(b, int | float) and b else ""


if __name__ == "__main__":
    main()
