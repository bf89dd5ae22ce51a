"""A user's own nn.Module as a Network: name its submodules that keep their shape, and the whole road works on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ens.networks.steps import Network, SlotSpec, State, Step

_WRAPPED: dict[str, FramedNetwork] = {}


class FramedNetwork(Network):
    """A module (B, in_channels, H, W) -> (B, in_channels, sH, sW) of a user's as a network without slots.

    The module gets the image and `extras` by keyword; `output` is the index or key of the image in what it returns,
    None where it returns the image alone.
    """

    def __init__(self, module: nn.Module, *, in_channels: int, upscale: int, size_multiple: int,
                 output: int | str | None, extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.wrapped = module
        self.training = module.training  # of this module alone: those below have a mode of their own each
        self.in_channels, self.upscale, self.size_multiple = in_channels, upscale, size_multiple
        self.output, self.extras = output, dict(extras)
        self.slots = ()
        self.steps = (Step("wrapped"),)
        if type(module) is nn.Sequential and output is None and not extras:
            # named_children would leave out a child that stands in the row twice.
            self.steps = tuple(Step(f"wrapped.{child}") for child in module._modules)

    def _apply_step(self, step: Step, state: State) -> State:
        if step.module != "wrapped":
            return super()._apply_step(step, state)
        returned = self.wrapped(state["x"], **self.extras)
        return {**state, "x": _take_image(returned, self.output)}

    def released_keys(self) -> dict[str, str]:
        return {key.removeprefix("wrapped."): key for key in self.state_dict()}


def _take_image(returned: Any, output: int | str | None) -> Tensor:
    try:
        image = returned if output is None else returned[output]
    except (IndexError, KeyError, TypeError):
        raise ValueError(f"the module returns {_describe(returned)}, which has no {output!r}") from None
    if not isinstance(image, Tensor):
        raise ValueError(f"the module returns {_describe(image)}; say as `output` which element is the image")
    return image


def _describe(value: Any) -> str:
    inside = (f" with {', '.join(map(str, value))}" if isinstance(value, Mapping) else
              f" of {len(value)}" if isinstance(value, tuple | list) else "")
    return f"a {type(value).__name__}{inside}"


class WrappedNetwork(FramedNetwork):
    """A copy of what `wrap_network` was given under this name in this process.

    Files hold weights and this name, never code: a program that opens them wraps the module first. Raises ValueError
    for a name nothing was wrapped under.
    """

    def __init__(self, *, wrapped_as: str) -> None:
        if wrapped_as not in _WRAPPED:
            raise ValueError(f"no module is wrapped as {wrapped_as!r} in this program (there is "
                             f"{', '.join(_WRAPPED) or 'none'}); call wrap_network with it before its files are opened")
        nn.Module.__init__(self)
        self.__dict__ = copy.deepcopy(_WRAPPED[wrapped_as]).__dict__
        self.recipe = ("wrapped", {"wrapped_as": wrapped_as})


def wrap_network(module: nn.Module, *, slots: Sequence[str], name: str, in_channels: int = 3, upscale: int = 1,
                 size_multiple: int = 1, probe_px: int = 64, output: int | str | None = None,
                 extras: Mapping[str, Any] = MappingProxyType({})) -> WrappedNetwork:
    """Turn a module into a network with slots, as `frame_network`; a copy of it, as it is: precision, device, and train
    or eval mode of every part. `name` stands in the files a run writes.
    """
    _WRAPPED[name] = frame_network(copy.deepcopy(module), slots=slots, in_channels=in_channels, upscale=upscale,
                                   size_multiple=size_multiple, probe_px=probe_px, output=output, extras=extras)
    return WrappedNetwork(wrapped_as=name)


def frame_network(module: nn.Module, *, slots: Sequence[str], in_channels: int = 3, upscale: int = 1,
                  size_multiple: int = 1, probe_px: int = 64, output: int | str | None = None,
                  extras: Mapping[str, Any] = MappingProxyType({})) -> FramedNetwork:
    """A module (B, in_channels, H, W) -> (B, in_channels, sH, sW) as a network with slots.

    `slots` are dotted names of submodules, each called once a pass with one (B, C, H, W) tensor and returning that
    shape; their channels and scale are found by one pass over a `probe_px` image. H and W of what the module sees are
    multiples of `size_multiple`; it gets `extras` by keyword, and `output` is the index or key of the image in what it
    returns where it returns more. A plain nn.Sequential runs child by child, so a search shares prefixes; any other
    module runs as a whole. Raises ValueError saying which slot does not fit.
    """
    network = FramedNetwork(module, in_channels=in_channels, upscale=upscale, size_multiple=size_multiple,
                            output=output, extras=extras)
    network.slots = _probe_slots(network, slots, probe_px)
    return network


def _probe_slots(network: FramedNetwork, names: Sequence[str], probe_px: int) -> tuple[SlotSpec, ...]:
    """Slots in the order in which one pass calls them."""
    known = dict(network.wrapped.named_modules())
    unknown = [name for name in names if name not in known or not name]
    if unknown or not names:
        raise ValueError(f"slots {unknown or 'are empty'}: the module has {', '.join(filter(None, known))}")
    image = _image_like(network.wrapped, (1, network.in_channels, probe_px, probe_px))
    calls = _record_calls(network, image, {name: known[name] for name in names})
    found = {name: [shapes for called, shapes in calls if called == name] for name in names}
    for name, passes in found.items():
        if len(passes) != 1:
            raise ValueError(f"slot {name!r} is called {len(passes)} times in a pass; it must be called once")
        given, returned = passes[0]
        if given != returned or len(given) != 4 or given[2] != given[3] or probe_px % given[2]:
            raise ValueError(f"slot {name!r} maps {given} to {returned}; it must keep a (B, C, H, W) shape, square for "
                             f"a square image, whose sides divide {probe_px}")
    return tuple(SlotSpec(name, f"wrapped.{name}", given[1], probe_px // given[2], 1, "own", single=True)
                 for name, (given, _) in calls)


def _image_like(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A black image of the precision and on the device that the module computes in."""
    floats = (m for m in (*module.parameters(), *module.buffers()) if m.is_floating_point())
    like = next(floats, torch.zeros(0))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _record_calls(network: Network, image: Tensor, modules: dict[str, nn.Module]) -> list[tuple[str, Shapes]]:
    """(name, shapes of input and output) of every call of these modules, in order; checks the network's output too."""
    calls: list[tuple[str, Shapes]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            given = inputs[0] if len(inputs) == 1 else None
            calls.append((name, (tuple(given.shape) if isinstance(given, Tensor) else (),
                                 tuple(output.shape) if isinstance(output, Tensor) else ())))
        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            output = network.eval().restore(image)
    finally:
        for module, training in modes:
            module.training = training  # one by one: parts may differ, a frozen BatchNorm for instance
        for handle in handles:
            handle.remove()
    side = image.shape[-1] * network.upscale
    if output.shape[-2:] != (side, side):
        raise ValueError(f"with upscale {network.upscale} the module must return {side}×{side} pixels for "
                         f"{image.shape[-2]}×{image.shape[-1]}, got {tuple(output.shape)}")
    return calls
