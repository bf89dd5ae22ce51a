"""Processor seconds and file sizes of ONNX exports at published sizes, one process a network: results/export.md.

Weights are random. The time is that of `FORMATS[".onnx"].write`, all threads together, without the comparison with
PyTorch that follows it in `ens export`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Restormer": ("restormer", {}),
    "Uformer-B": ("uformer", {"embed_dim": 32, "depths": (1, 2, 8, 8, 2, 8, 8, 2, 1), "modulator": True}),
    "MambaIR-UNet (SIDD)": ("mambair_unet", {"mlp_ratio": 1.5}),
    "MambaCSR": ("mambacsr", {}),
    "DAT-light": ("dat", {"embed_dim": 60, "depth": (18,), "num_heads": (6,), "expansion_factor": 2.0,
                          "resi_connection": "3conv", "upsampler": "pixelshuffledirect"}),
}


def measure(label: str) -> str:
    """A row of the table: network, blocks, processor seconds, megabytes."""
    import torch

    from ens.export.formats import FORMATS
    from ens.networks import create_network

    torch.set_num_threads(1)
    name, options = NETWORKS[label]
    network = create_network(name, **options).eval()
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "network.onnx", time.process_time()
        FORMATS[".onnx"].write(network, path, {}, None, lambda line: None)
        seconds = time.process_time() - start
        blocks = sum(spec.depth for spec in network.slots)
        return f"| {label} | {blocks} | {seconds:.1f} | {path.stat().st_size / 1e6:.1f} |"


def main() -> None:
    """Print the table, or the row of the network that is named."""
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
        return
    print(f"Load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors.\n")
    print("| network | blocks | processor seconds | file, MB |\n|---|---|---|---|", flush=True)
    for label in NETWORKS:
        subprocess.run([sys.executable, __file__, label], check=True)


if __name__ == "__main__":
    main()
