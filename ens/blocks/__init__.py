"""Block families: (B, C, H, W) -> (B, C, H, W), any H and W, never writing into the input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from ens.blocks.bounds import MAX_DEPTH, check_options, check_size
from ens.blocks.conv import ConvBlock
from ens.blocks.dat import DATBlock
from ens.blocks.half import HalfBlock
from ens.blocks.identity import IdentityBlock
from ens.blocks.mambair import MambaIRBlock
from ens.blocks.plk import PLKBlock
from ens.blocks.rep import RepBlock
from ens.blocks.restormer import RestormerBlock
from ens.blocks.rlmb import RLMBBlock
from ens.blocks.serpent import SerpentBlock
from ens.blocks.ssd import SSDBlock
from ens.blocks.uformer import UformerBlock
from ens.blocks.vimm import ViMMBlock
from ens.blocks.vssd import VSSDBlock
from ens.space import suggest

FAMILIES: dict[str, type[nn.Module]] = {
    "restormer": RestormerBlock,
    "mambair": MambaIRBlock,
    "ssd": SSDBlock,
    "vssd": VSSDBlock,
    "conv": ConvBlock,
    "half": HalfBlock,
    "rep": RepBlock,
    "plk": PLKBlock,
    "vimm": ViMMBlock,
    "rlmb": RLMBBlock,
    "serpent": SerpentBlock,
    "uformer": UformerBlock,
    "dat": DATBlock,
    "identity": IdentityBlock,
}


def family_options(family: str) -> dict[str, int | float | str | bool]:
    """Option names of a family with their defaults; raises KeyError listing the families."""
    if family not in FAMILIES:
        raise KeyError(f"no block family {family!r}{suggest(family, FAMILIES)}; allowed: {', '.join(FAMILIES)}")
    parameters = inspect.signature(FAMILIES[family]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "channels"}


def create_stack(family: str, channels: int, depth: int, *, heads: int = 1,
                 options: Mapping[str, int | float | str | bool] | None = None) -> nn.Sequential:
    """`depth` blocks of a family in a row, as the slots of a network hold them: (B, channels, H, W) -> same.

    `heads` reaches the families that have attention heads, the position in the row those whose blocks alternate
    (`index`); `options` are keyword arguments of the block. The identity family is one block whatever the depth.
    Raises KeyError for an unknown family, ValueError for an unknown option and for what is out of bounds (`bounds`);
    both name what is allowed.
    """
    allowed = family_options(family)
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"{family}×{depth}: depth is 1 to {MAX_DEPTH}")
    given = dict(options or {})
    check_options(f"family {family!r}", given, allowed)
    if "heads" in allowed:
        given.setdefault("heads", heads)
    count = 1 if family == "identity" else depth
    rows = [{"index": i, **given} if "index" in allowed else given for i in range(count)]
    check_size(f"{family}×{depth} of {channels} channels", lambda: FAMILIES[family](channels, **given), times=count)
    return nn.Sequential(*(FAMILIES[family](channels, **row) for row in rows))
