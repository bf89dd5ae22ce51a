"""What a block's or a network's options may be: of the type of their default, and of a size that somebody can mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ens.space import suggest

MAX_DEPTH = 256
"""Blocks of one stage: far above any published one, far below what would fill a memory."""
MAX_PARAMETERS = 500_000_000
"""Of one network or stack of blocks: ten times the largest restoration network there is, 2 GB in float32."""

# Largest whole number by option; memory or time grows with a power of most of them. Others may be up to _LARGEST.
_LARGEST_OF = {"kernel_size": 127, "window": 64, "win_size": 64, "split_size": 64, "split_height": 64,
               "split_width": 64, "sequence_window": 512, "scan_size": 64, "state": 1024, "d_state": 1024,
               "heads": 1024, "num_heads": 1024, "in_channels": 64, "out_channels": 64, "upscale": 16,
               "upscaling_factor": 16, "patch_size": 16, "n_blocks": MAX_DEPTH, "num_refinement_blocks": MAX_DEPTH,
               "num_blocks": MAX_DEPTH, "depth": MAX_DEPTH, "depths": MAX_DEPTH, "depths2": MAX_DEPTH}
_LARGEST = 4096
_LARGEST_RATIO = 16.0
_LONGEST_LIST = 32
Built = TypeVar("Built", bound=nn.Module)


def check_options(owner: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is unknown, of another type than its default, or beyond all sense.

    `owner` is what takes them, for the message. Whole numbers start at 1 unless their default is 0, ratios lie above 0.
    """
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"{owner} has no option {name!r}{suggest(name, defaults)}; allowed: "
                             f"{', '.join(defaults) or 'none'}")
        wanted = _describe_mistake(value, defaults[name], _LARGEST_OF.get(name, _LARGEST))
        if wanted:
            raise ValueError(f"{owner}: option {name} is {wanted}, got {_shorten(value)}")


def _describe_mistake(value: object, default: object, largest: int) -> str:
    """What a value should be instead, "" where it is that."""
    if isinstance(default, bool | str):
        return "" if type(value) is type(default) else {bool: "true or false", str: "text"}[type(default)]
    if isinstance(default, int):
        low = min(default, 1)
        fits = type(value) is int and low <= value <= largest
        return "" if fits else f"a whole number from {low} to {largest}"
    if isinstance(default, float):
        fits = type(value) in (int, float) and 0 < value <= _LARGEST_RATIO  # type: ignore[operator]
        return "" if fits else f"a number above 0, {_LARGEST_RATIO:g} at most"
    if isinstance(default, tuple | list):
        fits = (isinstance(value, tuple | list) and len(value) <= _LONGEST_LIST
                and all(type(entry) is int and 1 <= entry <= largest for entry in value) and sum(value) <= 2 * largest)
        return "" if fits else (f"a list of up to {_LONGEST_LIST} whole numbers from 1 to {largest}, "
                                f"{2 * largest} at most together")
    return ""


def _shorten(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a number of many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_size(owner: str, create: Callable[[], Built], *, times: int = 1) -> Built:
    """What `create` builds, on the meta device; ValueError where `times` of it have more than MAX_PARAMETERS."""
    with torch.device("meta"):
        module = create()
    count = times * sum(math.prod(parameter.shape) for parameter in module.parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{owner} would have {count:,} parameters; allowed: {MAX_PARAMETERS:,}")
    return module
