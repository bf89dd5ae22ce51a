"""How many times as fast one block of each family is as a Restormer block of the same width, in ONNX Runtime.

`bench_families.py [CHOICE...]` prints a Markdown table: files of fixed sizes, timed in turn, medians of the ratios of
every round with their quartiles. Widths and sizes are those of the levels of a U-Net for an image of 256².
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from ens.blocks import create_stack
from ens.blocks.rep import fold_blocks
from ens.export.formats import FORMATS, describe_network
from ens.networks.wrap import wrap_network
from ens.runtime.bench import quartiles
from ens.runtime.runner import OPENERS, describe_machine, time_in_turn
from ens.space import parse_choice

SLOTS = ((16, 256), (32, 256), (32, 128), (48, 256), (96, 256), (96, 128), (192, 64), (384, 32))
CHOICES = ("vssd×1(state=16)", "conv×1", "half×1", "rep×1")
REPEATS = 11


def main() -> None:
    """Print the table for one and for two threads."""
    choices = ["restormer×1", *(sys.argv[1:] or CHOICES)]
    for threads in (1, 2):
        print(f"\n{threads} thread(s), {describe_machine()}\n\n| channels, size | Restormer block, ms |",
              " | ".join(choices[1:]), "|\n|" + "---|" * (len(choices) + 1), flush=True)
        for channels, side in SLOTS:
            with tempfile.TemporaryDirectory() as folder:
                runs = [_open(Path(folder) / f"{number}.onnx", text, channels, side, threads)
                        for number, text in enumerate(choices)]
                spent = time_in_turn(runs, repeats=REPEATS)
            ratios = [[first / own for first, own in zip(spent[0], times, strict=True)] for times in spent[1:]]
            print(f"| {channels}, {side}² | {statistics.median(spent[0]):.1f} |", " | ".join(
                "{:.2f} ({:.2f}–{:.2f})".format(statistics.median(row), *quartiles(row)) for row in ratios), "|",
                flush=True)


def _open(path: Path, text: str, channels: int, side: int, threads: int) -> functools.partial[object]:
    """One block as a file of this size, and what runs it on noise."""
    torch.manual_seed(0)
    choice = parse_choice(text)
    blocks = create_stack(choice.family, channels, choice.depth, options=dict(choice.options)).eval()
    network = fold_blocks(wrap_network(blocks, slots=["0"], name="block", in_channels=channels, size_multiple=4))
    FORMATS[".onnx"].write(network, path, describe_network(network, (side, side)), (side, side), lambda line: None)
    image = np.random.default_rng(0).random((1, channels, side, side), np.float32)
    return functools.partial(OPENERS["ort"][1](path, threads), image)


if __name__ == "__main__":
    main()
