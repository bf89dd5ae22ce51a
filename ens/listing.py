"""The verbs of the command line that list what there is: `ens spaces` and `ens info`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ens.console import make_table, show, show_json
from ens.objectives import OBJECTIVES
from ens.options import AsJson, Import, load_named

SUMMARY = "summary.json"
"""Beside the shipped studies: what `ens spaces --json` prints of them. Counting them takes half a minute."""


def spaces(studies: Annotated[list[str] | None, typer.Argument(
        metavar="[SPACE.yaml]...", help="Studies to list; the shipped ones by default.")] = None,
        as_json: AsJson = False, code: Import = None) -> None:
    """List studies: slots × choices, genotypes, and the range of parameters and multiply-adds."""
    from ens.config import find_study, shipped_spaces

    shipped = shipped_spaces()
    counted = _read_summary(shipped[0].with_name(SUMMARY))
    found = []
    for path in [find_study(name) for name in studies or map(str, shipped)]:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(counted[sha256] if path in shipped and sha256 in counted else _count_study(path, sha256))
    if as_json:
        show_json(found)
        return
    table = make_table(("space",), ("slots", "genotypes", "surrogates", "params", "MACs 256²"))
    for column in table.columns[:4]:
        column.no_wrap = True
    for one in found:
        ranges = [" – ".join(map(OBJECTIVES[key].format, one[key])) for key in ("params", "macs")]
        low, high = one["choices"]
        count = f"{one['genotypes']:,}" if one["genotypes"] < 1e9 else f"{one['genotypes']:.1e}"
        table.add_row(one["space"], f"{one['slots']} × {low}–{high}" if low < high else f"{one['slots']} × {low}",
                      count, f"{one['surrogates']}", *ranges)
    show(table)


def _read_summary(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of shipped studies, by the hash of their files; nothing while the file is written anew."""
    with suppress(OSError, ValueError):
        return {one["sha256"]: one for one in json.loads(path.read_text(encoding="utf-8"))}
    return {}


def _count_study(path: Path, sha256: str) -> dict[str, Any]:
    from ens.run_folder import RunFolder

    folder = RunFolder(Path(), load_named(str(path)))
    space, costs = folder.space, folder.count_costs()
    return {"space": space.name, "sha256": sha256, "slots": len(space.sizes),
            "choices": [min(space.sizes), max(space.sizes)], "genotypes": space.num_genotypes,
            "surrogates": space.num_surrogates, "params": costs.range("params"), "macs": costs.range("macs")}


def info(as_json: AsJson = False) -> None:
    """What this installation has: versions, devices, scan kernels, and every name a study may use."""
    import onnxruntime
    import torch

    from ens.blocks import FAMILIES
    from ens.data.tasks import TASKS
    from ens.evaluate.protocols import PROTOCOLS
    from ens.networks import NETWORKS
    from ens.ops.selective_scan import scan_backends
    from ens.search import ENGINES

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    names: dict[str, Iterable[str]] = {
        "networks": NETWORKS, "families": FAMILIES, "tasks": TASKS, "protocols": PROTOCOLS,
        "engines": ENGINES, "objectives": OBJECTIVES}
    found: dict[str, str | list[str]] = {
        "ens": version("ens"), "python": sys.version.split()[0], "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "threads": str(torch.get_num_threads()), "GPU": gpus,
        **{f"scan on {device}": path for device, path in scan_backends().items()},
        **{kind: list(known) for kind, known in names.items()}}
    if as_json:
        show_json(found)
        return
    table = Table(box=None, show_header=False)
    for name, value in found.items():
        table.add_row(name, value if isinstance(value, str) else ", ".join(value) or "none")
    show(table)
