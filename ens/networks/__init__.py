"""NETWORKS: the published networks by name, and the one way to build them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ens.blocks.bounds import check_options, check_size
from ens.networks.dat import DAT
from ens.networks.dvmsr import DVMSR
from ens.networks.mambacsr import MambaCSR
from ens.networks.mambair_unet import MambaIRUNet
from ens.networks.own import create_own
from ens.networks.plksr import PLKSR
from ens.networks.restormer import Restormer
from ens.networks.serpent import Serpent
from ens.networks.steps import Network
from ens.networks.uformer import Uformer
from ens.networks.wrap import WrappedNetwork
from ens.own_code import is_own, list_offers
from ens.space import suggest

NETWORKS: dict[str, type[Network]] = {
    "restormer": Restormer,
    "mambair_unet": MambaIRUNet,
    "plksr": PLKSR,
    "dvmsr": DVMSR,
    "mambacsr": MambaCSR,
    "serpent": Serpent,
    "uformer": Uformer,
    "dat": DAT,
    "wrapped": WrappedNetwork,
}


def create_network(name: str, **options: Any) -> Network:
    """Build a published network by name with its published constructor options (random weights), or one of a user's,
    `my_network:build`, as `create_own` does.

    Raises ValueError for an unknown name or option, listing the allowed ones, and for sizes out of bounds. The network
    remembers how it was built (`network.recipe`), so a file that holds its weights can describe it.
    """
    if is_own(name):
        return create_own(name, options)
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown{suggest(name, NETWORKS)}; allowed: {', '.join(NETWORKS)}, and "
                         f"functions of your own, my_network:build with --import my_network.py{list_offers()}")
    parameters = inspect.signature(NETWORKS[name]).parameters.values()
    check_options(f"network {name}", options, {parameter.name: parameter.default for parameter in parameters})
    network = check_size(f"network {name}", lambda: NETWORKS[name](**options))
    if torch.get_default_device().type != "meta":
        network = NETWORKS[name](**options)
    network.recipe = (name, {key: list(value) if isinstance(value, tuple) else value
                             for key, value in options.items()})
    return network
