"""Which slots are to blame where a network cannot be exported: those whose blocks cannot be exported alone either."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ens.blocks.rep import fold_blocks
from ens.export.failures import raise_shortage
from ens.export.formats import FORMATS, check_size, describe_network
from ens.networks.steps import Network, RowNetwork


def list_culprits(network: Network, slots: Sequence[str], suffix: str) -> list[str]:
    """Those of the named slots that the format of a suffix cannot take as they are filled; no file is kept.

    Raises MemoryError or OSError where memory or disk ran out.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in slots:
            spec = network.slot(name)
            row = RowNetwork(network.content(name), spec.channels,
                             max(1, network.size_multiple // spec.downscale)).eval()
            size = check_size(row, suffix, None)
            try:
                FORMATS[suffix].write(fold_blocks(row), Path(folder) / f"slot{suffix}", describe_network(row, size),
                                      size, lambda line: None)
            except (MemoryError, OSError):
                raise
            except Exception as failure:  # exporters' errors share no public class
                raise_shortage(failure)
                found.append(name)
    return found
