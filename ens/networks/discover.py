"""Which submodules of a network may be slots, what share of its cost each has, and which of them to take."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ens.networks.probe import (
    READS_IMAGE,
    Visit,
    differ,
    evaluating,
    naming_failures,
    probe_image,
    record_visits,
)
from ens.networks.wrap import FramedNetwork

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 7, 14, 28, 56, 12, 24, 48)
_WANTED = 0.9
"""Share of the time that slots should cover."""
_LEAST = 0.01
"""Share of the time below which a single layer is no slot worth having."""
_REPEATS, _ENOUGH_S = 5, 10
"""Passes that are timed, and seconds after which no further one begins."""


@dataclass(frozen=True)
class Candidate:
    """A submodule that is called in a pass; `reason` says why it can be no slot, "" where it can.

    `time` and `macs` are shares of the whole network's, everything inside it included.
    """

    name: str
    kind: str
    is_layer: bool
    calls: int
    layout: str
    channels: int
    downscale: int
    params: int
    time: float
    macs: float
    reason: str

    @property
    def is_fit(self) -> bool:
        return not self.reason and self.params > 0


@dataclass(frozen=True)
class Discovery:
    """What one network is made of, `candidates` in the order they run, and the names of the proposed `slots`."""

    candidates: tuple[Candidate, ...]
    slots: tuple[str, ...]
    upscale: int
    size_multiple: int

    @property
    def coverage(self) -> float:
        """Share of the time that the proposed slots have."""
        return sum(one.time for one in self.candidates if one.name in self.slots)


def discover_slots(module: nn.Module, *, in_channels: int = 3, output: int | str | None = None,
                   extras: Mapping[str, object] | None = None, side_px: int = 128) -> Discovery:
    """Run noise of `side_px` and half as many more px through a module and look at every submodule.

    `in_channels`, `output` and `extras` are those of `frame_network`. Raises ValueError where it does not run, or gives
    no image.
    """
    network = FramedNetwork(module, in_channels=in_channels, upscale=1, size_multiple=1, output=output,
                            extras=extras or {})
    upscale, multiple = _find_scale(network)
    units = -(-side_px // multiple)
    size = (units * multiple, (units + max(1, units // 2)) * multiple)
    modules = {name: one for name, one in module.named_modules() if name}
    with evaluating(network):
        passes = [record_visits(functools.partial(network.restore, probe_image(module, in_channels, size, seed)),
                                modules, size) for seed in (0, 1)]
    times, macs = _measure(network, modules, size)
    reads = {one.name for one, other in zip(*passes, strict=False) if differ(one.beside, other.beside)}
    visits: dict[str, list[Visit]] = {}
    for visit in passes[0]:
        visits.setdefault(visit.name, []).append(visit)
    candidates = tuple(_judge(name, modules[name], found, name in reads, times[name], macs[name])
                       for name, found in visits.items())
    return Discovery(candidates, propose_slots(candidates, list(modules)), upscale, multiple)


def _find_scale(network: FramedNetwork) -> tuple[int, int]:
    """How many times the network enlarges, and what the sides of its image must be multiples of."""
    mistakes = []
    for multiple in _MULTIPLES:
        # Odd multiples, different ones: a network that wants more than this fails, or gives another size.
        units = -(-40 // multiple) | 1
        size = (units * multiple, (units + 2) * multiple)
        image = probe_image(network.wrapped, network.in_channels, size, 0)
        try:
            with evaluating(network), naming_failures(f"it fails on {size[0]}×{size[1]}"):
                height, width = network.restore(image).shape[-2:]
        except ValueError as error:
            mistakes.append(str(error))
            continue
        if height % size[0] == 0 and height // size[0] * size[1] == width:
            return height // size[0], multiple
        mistakes.append(f"it makes {height}×{width} of {size[0]}×{size[1]}")
    raise ValueError(f"no size of image runs through the module; {mistakes[-1]}")


def _measure(network: FramedNetwork, modules: Mapping[str, nn.Module],
             size: tuple[int, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of time and of multiply-adds by submodule. Time is that of this thread, which others do not disturb."""
    image, begun = probe_image(network.wrapped, network.in_channels, size, 0), time.monotonic()
    spent: list[dict[str, float]] = []
    with evaluating(network):
        while len(spent) < 2 or (len(spent) <= _REPEATS and time.monotonic() < begun + _ENOUGH_S):
            spent.append(_accumulate(modules, time.thread_time, lambda: network.restore(image)))
        with FlopCounterMode(display=False) as counter:
            macs = _accumulate(modules, counter.get_total_flops, lambda: network.restore(image))
    times = {name: sum(one[name] for one in spent[1:]) for name in ["", *modules]}  # the first pass warms up
    return ({name: value / times[""] for name, value in times.items()},
            {name: value / max(1.0, macs[""]) for name, value in macs.items()})


def _accumulate(modules: Mapping[str, nn.Module], read: Callable[[], float],
                run: Callable[[], object]) -> dict[str, float]:
    """How much `read` grows during the calls of each submodule, and, under "", of all."""
    grown, begun = dict.fromkeys(["", *modules], 0.0), dict.fromkeys(modules, 0.0)

    def hooks(name: str, module: nn.Module) -> Iterable[RemovableHandle]:
        def enter(module: nn.Module, inputs: object) -> None:
            begun[name] = read()

        def leave(module: nn.Module, inputs: object, output: object) -> None:
            grown[name] += read() - begun[name]
        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    handles = [handle for name, module in modules.items() for handle in hooks(name, module)]
    try:
        start = read()
        run()
        grown[""] = read() - start
    finally:
        for handle in handles:
            handle.remove()
    return grown


def _judge(name: str, module: nn.Module, visits: Sequence[Visit], reads_image: bool, spent: float,
           macs: float) -> Candidate:
    first = visits[0]
    reason = f"is called {len(visits)} times" if len(visits) > 1 else first.reason or (
        READS_IMAGE if reads_image else "")
    return Candidate(name, type(module).__name__, not list(module.children()), len(visits),
                     "" if first.reason else first.form.layout, first.channels, first.downscale,
                     sum(p.numel() for p in module.parameters()), spent, macs, reason)


def propose_slots(candidates: Sequence[Candidate], names: Sequence[str]) -> tuple[str, ...]:
    """The outermost blocks that repeat and can be slots; where these cover too little of the time others, then layers.

    `names` are those of all submodules, outer before inner.
    """
    fit = {one.name: one for one in candidates if one.is_fit}
    kinds = Counter(one.kind for one in fit.values())
    taken: list[str] = []
    tiers: tuple[Callable[[Candidate], bool], ...] = (
        lambda one: not one.is_layer and kinds[one.kind] > 1 and one.time >= _LEAST / 10,
        lambda one: not one.is_layer and one.time >= _LEAST,
        lambda one: one.is_layer and one.time >= _LEAST)
    for belongs in tiers:
        for name in names:
            if name in fit and belongs(fit[name]) and not any(_overlap(name, other) for other in taken):
                taken.append(name)
        if sum(fit[name].time for name in taken) >= _WANTED:
            break
    return tuple(one.name for one in candidates if one.name in taken)


def _overlap(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")
