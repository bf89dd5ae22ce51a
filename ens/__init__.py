"""ens: search restoration networks for hybrids. The public names; each is loaded when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ens.blocks import FAMILIES as FAMILIES
    from ens.data.tasks import create_task as create_task
    from ens.networks import NETWORKS as NETWORKS
    from ens.networks import create_network as create_network
    from ens.pareto.archive import Archive as Archive
    from ens.space import Choice as Choice
    from ens.space import Measurement as Measurement
    from ens.space import SearchSpace as SearchSpace
    from ens.space import Slot as Slot

__version__ = "0.1.0"

# PyTorch takes seconds to import; a name is looked up in its module only when somebody asks for it.
_MODULES = {
    "FAMILIES": "ens.blocks",
    "create_task": "ens.data.tasks",
    "NETWORKS": "ens.networks",
    "create_network": "ens.networks",
    "Archive": "ens.pareto.archive",
    "Choice": "ens.space",
    "Measurement": "ens.space",
    "SearchSpace": "ens.space",
    "Slot": "ens.space",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"ens has no public name {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
