"""Networks that users bring: modules that functions of theirs return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ens.networks.steps import Network
from ens.networks.wrap import FramedNetwork, frame_network
from ens.own_code import OwnCodeError, describe_failure, find_function
from ens.shortage import is_shortage

_FRAME = tuple(inspect.signature(frame_network).parameters)[1:]


def build_module(name: str, options: Mapping[str, Any]) -> nn.Module:
    """What the user's function returns for these options, always on the CPU; raises OwnCodeError."""
    function = find_function(name)
    try:
        parameters = inspect.signature(function).parameters
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        raise OwnCodeError(f"network {name} does not take these options ({error}); it takes "
                           f"{', '.join(parameters) or 'none'}") from None
    try:
        # Code of others reads values while it builds (`x.item()`), which the meta device has none of.
        with torch.device("cpu"):
            module = function(**options)
    except Exception as error:
        if is_shortage(error):
            raise
        raise OwnCodeError(f"network {name} cannot be built: {describe_failure(error)}") from error
    if not isinstance(module, nn.Module):
        raise OwnCodeError(f"{name} returned a {type(module).__name__}, not an nn.Module")
    return module


def split_options(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the user's function, and those for `frame_network`; what both know of goes to both."""
    known = inspect.signature(find_function(name)).parameters
    frame = {key: value for key, value in options.items() if key in _FRAME}
    return {key: value for key, value in options.items() if key not in _FRAME or key in known}, frame


def create_own(name: str, options: Mapping[str, Any]) -> Network:
    """A user's network with its slots: what its function returns for `options`, framed as `frame_network` says.

    Raises OwnCodeError for code that was not imported or fails, and for slots that do not fit.
    """
    plain = {key: _thaw(value) for key, value in options.items()}
    given, frame = split_options(name, plain)
    module = build_module(name, given)
    if isinstance(module, Network):
        network = module
    elif "slots" not in frame:
        raise OwnCodeError(f"network {name} names no `slots`; `ens slots {name}` lists what they can be")
    else:
        try:
            network = frame_network(module, **frame)
        except (TypeError, ValueError) as error:
            raise OwnCodeError(f"network {name}: {error}") from error
    network.recipe = (name, plain)
    return network


def create_whole(name: str, options: Mapping[str, Any]) -> Network:
    """A user's network without slots, to run it: what `create_own` makes otherwise."""
    given, frame = split_options(name, options)
    module = build_module(name, given)
    if isinstance(module, Network):
        return module
    return FramedNetwork(module, in_channels=frame.get("in_channels", 3), upscale=frame.get("upscale", 1),
                         size_multiple=frame.get("size_multiple", 1), output=frame.get("output"),
                         extras=frame.get("extras", {}))


def _thaw(value: object) -> object:
    """Tuples as lists, all the way down: what a file gives back."""
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return [_thaw(item) for item in value] if isinstance(value, tuple | list) else value
