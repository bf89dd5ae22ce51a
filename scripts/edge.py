"""What becomes of every block family in every format: `results/edge.md`'s table, and the verdicts of what ships.

`edge.py [FAMILY...]` prints a Markdown table (half a minute a family); `edge.py LIBRARY`, a folder or `builtin:NAME`,
lints what a library holds and stores the verdicts in its manifest.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ens.blocks import FAMILIES
from ens.blocks.rep import fold_blocks
from ens.distill.library import open_library
from ens.export.card import EXPORTS
from ens.export.edge import SIZES_PX, lint_kind, name_kind
from ens.export.formats import FORMATS, RUNTIMES, describe_network
from ens.networks.steps import RowNetwork, SlotSpec, create_filling
from ens.space import Choice, parse_choice

CHANNELS = 16


def measure_error(family: str, name: str, folder: Path, sizes: Sequence[tuple[int, int]] = SIZES_PX) -> float:
    """Largest ‖a−b‖/‖b‖ over the sizes of one block in a format of EXPORTS, run in its runtime."""
    spec = SlotSpec("body", "body", CHANNELS, 1, 1, family, heads=2)
    torch.manual_seed(0)
    network = RowNetwork(create_filling(spec, Choice(family, 1)), CHANNELS).eval()
    (suffix, runtime), errors = EXPORTS[name], []
    fixed = FORMATS[suffix].default_size is not None
    for size in sizes:
        path = folder / f"{family}-{size if fixed else 'any'}{suffix}"
        if not path.exists():
            given = size if fixed else None
            FORMATS[suffix].write(fold_blocks(network), path, describe_network(network, given), given,
                                  lambda line: None)
        image = torch.randn(1, CHANNELS, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = network.restore(image)
        got = RUNTIMES[runtime][1](path, 1).run(image)
        errors.append((got - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())


def print_table(families: Sequence[str]) -> None:
    """One block of 16 channels a family; what the lint has compared on three sizes is not run again."""
    print(f"| family | delegates | outside | {' | '.join(EXPORTS)} | verdict |\n|{'---|' * (4 + len(EXPORTS))}")
    for family in families:
        verdicts = lint_kind(SlotSpec("body", "body", CHANNELS, 1, 1, family, heads=2), Choice(family, 1))
        edge = verdicts["executorch"]
        known = {"pte": edge.relative_error} if not edge.reason else {}
        with tempfile.TemporaryDirectory() as folder:
            errors = [f"{known[name] if name in known else measure_error(family, name, Path(folder)):.0e}"
                      for name in EXPORTS]
        outside = ", ".join(f"{name}{f' ×{count}' if count > 1 else ''}" for name, count in edge.outside.items())
        reasons = [name for name, verdict in verdicts.items() if verdict.reason]
        print(f"| {family} | {edge.delegates} | {outside or 'none'} | {' | '.join(errors)} | "
              f"{'outside: ' + ', '.join(reasons) if reasons else 'inside'} |", flush=True)


def store_verdicts(name: str) -> None:
    """Lint every kind of block that a library holds, its teacher's included, and write its manifest."""
    library = open_library(name)
    network = library.create_skeleton()
    choices = {(spec.name, Choice(spec.family, spec.depth)) for spec in network.slots}
    choices |= {(entry.slot, parse_choice(entry.choice)) for entry in library.surrogates.values()}
    for slot, choice in sorted(choices, key=str):
        kind = name_kind(network.slot(slot), choice)
        if kind.label not in library.manifest.edge:
            library.manifest.edge[kind.label] = lint_kind(network.slot(slot), kind)
            print(kind.label, library.manifest.edge[kind.label], flush=True)
    library.write_manifest()


if __name__ == "__main__":
    asked = sys.argv[1:]
    if set(asked) <= set(FAMILIES):
        print_table(asked or list(FAMILIES))
    else:
        store_verdicts(asked[0])
