"""A user's own nn.Module as a Network: name its submodules that keep their shape, and the whole road works on it."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ens.networks.borders import Border, Form, MapView
from ens.networks.probe import READS_IMAGE, Visit, differ, evaluating, naming_failures, probe_image, record_visits
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
        framed = [spec.module.removeprefix("wrapped.").removesuffix("body") for spec in self.slots
                  if isinstance(self.get_submodule(spec.module), MapView)]
        released = {}
        for key in self.state_dict():
            name = key.removeprefix("wrapped.")
            for slot in framed:
                name = name.replace(f"{slot}body.original.", slot, 1) if name.startswith(slot) else name
            released[name] = key
        return released


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

    `slots` are dotted names of submodules, each called once a pass and returning the shape it gets: a map (B, C, H, W)
    or (B, H, W, C), or tokens (B, L, C) with their height and width in further arguments, of whatever name and type.
    What else they are called with may not depend on what the image shows. Channels and scale are found by passes over
    noise of `probe_px` and half as many more px. H and W of what the module sees are multiples of `size_multiple`; it
    gets `extras` by keyword, and `output` is the index or key of the image in what it returns where it returns more. A
    plain nn.Sequential runs child by child, so a search shares prefixes; any other module runs as a whole. Raises
    ValueError saying which slot does not fit.
    """
    network = FramedNetwork(module, in_channels=in_channels, upscale=upscale, size_multiple=size_multiple,
                            output=output, extras=extras)
    height = probe_px + -probe_px % size_multiple
    size = (height, height + size_multiple * -(-height // (2 * size_multiple)))  # no side can be taken for the other
    visits = _probe_slots(network, slots, size)
    _check_nested(visits)
    network.slots = tuple(SlotSpec(
        visit.name, f"wrapped.{visit.name}{'' if visit.form.is_plain else '.body'}", visit.channels, visit.downscale, 1,
        "own", single=True) for visit in visits)
    expected = _run(network, size)
    forms: list[Form] = []
    for visit in visits:
        if visit.form not in forms:
            forms.append(visit.form)
        if not visit.form.is_plain:
            original = network.get_submodule(f"wrapped.{visit.name}")
            # One object for all forms that are alike: what an export traces once must differ in nothing but weights.
            network.set_submodule(f"wrapped.{visit.name}", Border(original, forms[forms.index(visit.form)]))
    got = _run(network, size)
    if not got.is_meta and not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
        raise ValueError("the module computes something else once its slots can be filled: it looks at what its blocks "
                         "are")
    return network


def _run(network: FramedNetwork, size: tuple[int, int], seed: int = 0) -> Tensor:
    """What it makes of noise of this size; raises ValueError where it fails, or makes something of another size."""
    image = probe_image(network.wrapped, network.in_channels, size, seed)
    with evaluating(network), naming_failures(f"the module fails on an image of {size[0]}×{size[1]}"):
        output = network.restore(image)
    wanted = tuple(side * network.upscale for side in size)
    if output.shape[-2:] != wanted:
        raise ValueError(f"with upscale {network.upscale} the module must return {wanted[0]}×{wanted[1]} pixels for "
                         f"{size[0]}×{size[1]}, got {tuple(output.shape)}")
    return output


def _probe_slots(network: FramedNetwork, names: Sequence[str], size: tuple[int, int]) -> list[Visit]:
    """The calls of these submodules in the order they are made; raises ValueError for one that can be no slot."""
    known = dict(network.wrapped.named_modules())
    unknown = [name for name in names if name not in known or not name]
    if unknown or not names:
        raise ValueError(f"slots {unknown or 'are empty'}: the module has {', '.join(filter(None, known))}")
    modules = {name: known[name] for name in names}
    visits, again = (record_visits(functools.partial(_run, network, size, seed), modules, size) for seed in (0, 1))
    for name in names:
        found = [visit for visit in visits if visit.name == name]
        if len(found) != 1:
            raise ValueError(f"slot {name!r} is called {len(found)} times in a pass; it must be called once")
        if found[0].reason:
            raise ValueError(f"slot {name!r} {found[0].reason}; a slot keeps the shape of one map")
    for one, other in zip(visits, again, strict=False):
        if differ(one.beside, other.beside):
            raise ValueError(f"slot {one.name!r} {READS_IMAGE}")
    return visits


def _check_nested(visits: Sequence[Visit]) -> None:
    for outer, inner in itertools.permutations(visits, 2):
        if inner.name.startswith(f"{outer.name}.") and not outer.form.is_plain:
            raise ValueError(f"slot {inner.name!r} lies in slot {outer.name!r}, which takes more than a map; name one "
                             "of them")
