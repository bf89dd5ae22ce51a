"""ens: search restoration networks for hybrids. The public names; each is loaded when it is first used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ens.blocks import FAMILIES as FAMILIES
    from ens.config import load_study as load_study
    from ens.data.pairs import load_validation_set as load_validation_set
    from ens.data.tasks import create_task as create_task
    from ens.distill.library import open_library as open_library
    from ens.evaluate.evaluator import evaluate_restorer as evaluate_restorer
    from ens.evaluate.protocols import task_protocols as task_protocols
    from ens.export.hybrid import build_hybrid as build_hybrid
    from ens.export.hybrid import open_network as open_network
    from ens.networks import NETWORKS as NETWORKS
    from ens.networks import create_network as create_network
    from ens.networks.checkpoints import load_checkpoint as load_checkpoint
    from ens.networks.wrap import wrap_network as wrap_network
    from ens.opened_run import open_run as open_run
    from ens.pareto.archive import read_archive as read_archive
    from ens.pareto.selection import select_front as select_front
    from ens.runtime.session import open_session as open_session
    from ens.search.table import load_table as load_table
    from ens.space import SearchSpace as SearchSpace
    from ens.space import parse_choice as parse_choice

__version__ = "0.1.0"

# PyTorch takes seconds to import; a name is looked up in its module only when somebody asks for it.
_MODULES = {
    "FAMILIES": "ens.blocks",
    "NETWORKS": "ens.networks",
    "SearchSpace": "ens.space",
    "build_hybrid": "ens.export.hybrid",
    "create_network": "ens.networks",
    "create_task": "ens.data.tasks",
    "evaluate_restorer": "ens.evaluate.evaluator",
    "load_checkpoint": "ens.networks.checkpoints",
    "load_study": "ens.config",
    "load_table": "ens.search.table",
    "load_validation_set": "ens.data.pairs",
    "open_library": "ens.distill.library",
    "open_network": "ens.export.hybrid",
    "open_run": "ens.opened_run",
    "open_session": "ens.runtime.session",
    "parse_choice": "ens.space",
    "read_archive": "ens.pareto.archive",
    "select_front": "ens.pareto.selection",
    "task_protocols": "ens.evaluate.protocols",
    "wrap_network": "ens.networks.wrap",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES and not name.startswith("_") and importlib.util.find_spec(f"ens.{name}"):
        return importlib.import_module(f"ens.{name}")  # ens.ops, ens.blocks …
    if name not in _MODULES:
        raise AttributeError(f"ens has no public name {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
