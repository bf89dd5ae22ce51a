"""Statistics of the map, means over all of its pixels above all, shared by the tiles of an image.

A tile's own statistics are not those of the image, and no overlap hides that: channel attention and Restormer's
attention see another image in every tile. Shared, they are the mean of what tiles from all over the image give, and
what is left of a seam is the reach of the convolutions. (Local statistics may restore better, because training sees
small crops: Chu et al., TLC, 2022. Tiles that differ do not look better.) A normalisation over the map that is one
operator, instance or group normalisation, keeps each tile's own.

A statistic is told by its shape: a value that does not grow with the image, computed from one that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ens.export.failures import raise_shortage

Restore = Callable[[Tensor], Tensor]
Share = Callable[[Iterable[Tensor]], Restore]
"""Tiles (1, C, h, w) of one size, which may be gone through again -> what restores tiles of that size with the mean of
the statistics of these."""

_STEP_PX = 64
"""What windows, strides and the padding for them divide, as a rule."""
PASSES = 2
"""The first pass has statistics that follow another one of tiles with their own; the second of tiles that share."""


def other_size(tile: Sequence[int], size_multiple: int) -> tuple[int, ...]:
    """Sides unlike the tile's, as small as can be, that a network pads as it pads those."""
    step = math.lcm(_STEP_PX, size_multiple)
    return tuple(side % step + (2 if side // step == 1 else 1) * step for side in tile)


def mean_of(lists: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The mean, place by place, of lists of tensors of the same shapes; one list is in memory at a time."""
    total: list[Tensor] = []
    count = 0
    for values in lists:
        total = [old + value for old, value in zip(total, values, strict=True)] if count else list(values)
        count += 1
    return [value / count for value in total]


def share_in_torch(run: Restore, size_multiple: int, channels: int) -> Share:
    """Share the statistics of what PyTorch runs operator by operator. The order of the operators tells which is which:
    where it depends on the size (a loop over rows), or no size but the tile's runs, `run` stays as it is.
    """
    def share(tiles: Iterable[Tensor]) -> Restore:
        first = next(iter(tiles))
        here = _list_operators(run, first)
        try:
            there = _list_operators(run, torch.zeros(1, channels, *other_size(first.shape[-2:], size_multiple)))
        except Exception as failure:  # somebody's own network may raise anything
            raise_shortage(failure)
            return run
        found = [place for place, (one, other) in enumerate(zip(here, there, strict=False))
                 if one.inputs != other.inputs and one.outputs and one.outputs == other.outputs]
        if not found or [one.name for one in here] != [one.name for one in there]:
            return run
        fixed: _Fixed = {}
        for _ in range(PASSES):
            means = iter(mean_of(_read_outputs(run, tile, found, fixed) for tile in tiles))
            fixed = {place: (here[place].name, [next(means) for _ in here[place].outputs]) for place in found}
        return lambda tile: _run_with(run, tile, fixed)
    return share


_Fixed = dict[int, tuple[str, list[Tensor]]]
"""Place of an operator -> its name, and what it gives whatever it computes."""


@dataclass(frozen=True)
class _Operator:
    """The name of an operator that ran, and the shapes of the tensors it took and, where all are floats, gave."""

    name: str
    inputs: list[torch.Size]
    outputs: list[torch.Size]


class _Watched(TorchDispatchMode):
    """Shows every operator to `see` (place, name, what it took, what it gave), which may give something instead."""

    def __init__(self, see: Callable[[int, str, list[Any], list[Any]], list[Any] | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see, self.place = see, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        outputs, structure = tree_flatten(given)
        instead = self.see(self.place, str(func), tree_leaves((args, kwargs)), outputs)
        self.place += 1
        return given if instead is None else tree_unflatten(instead, structure)


def _list_operators(run: Restore, tile: Tensor) -> list[_Operator]:
    """The operators of a run; of the second, because the first may fill tables of that size."""
    operators: list[_Operator] = []
    run(tile)
    with _Watched(lambda place, name, inputs, outputs: operators.append(
            _Operator(name, _shapes(inputs), _shapes(outputs) if _all_floats(outputs) else []))):
        run(tile)
    return operators


def _shapes(values: Iterable[Any]) -> list[torch.Size]:
    return [value.shape for value in values if isinstance(value, Tensor)]


def _all_floats(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _read_outputs(run: Restore, tile: Tensor, places: Collection[int], fixed: _Fixed) -> list[Tensor]:
    """What the operators at these places compute, one after the other, where those before them give `fixed`."""
    values: list[Tensor] = []
    _run_with(run, tile, fixed, lambda place, outputs: values.extend(
        value.clone() for value in outputs) if place in places else None)
    return values


def _run_with(run: Restore, tile: Tensor, fixed: _Fixed,
              note: Callable[[int, list[Tensor]], None] = lambda place, outputs: None) -> Tensor:
    """`run` with `fixed` in the places of what operators give."""
    def see(place: int, name: str, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
        note(place, outputs)
        expected, values = fixed.get(place, ("", []))
        # Copies: the network may go on to change in place what an operator gave it.
        return [value.clone() for value in values] if name == expected else None
    with _Watched(see):
        return run(tile)
