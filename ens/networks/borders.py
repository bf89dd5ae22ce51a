"""Slots that take tokens, or more than a map: what stands between a user's code and what fills the slot.

Shapes: maps (B, C, H, W), tokens (B, L, C) with L = H·W in rows, rows (B, H, W, C). Changing between them is a view: no
number moves until an operator wants another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a submodule gets beside its first argument: by position, and by keyword."""
Place = int | str


@dataclass(frozen=True)
class Form:
    """How the user's code calls a slot.

    `layout` is map, tokens or rows. `args` and `kwargs` are what it is called with beside that, but for the size of the
    map, which is in their `places`: one place of two numbers (of the type `pair`), or two of one. `is_live`: tensors
    are among them, so that all are taken from each call, not from here.
    """

    layout: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    places: tuple[Place, ...] = ()
    pair: type = tuple
    is_live: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the slot is called with one map: nothing needs to stand at its border."""
        return self == MAP

    def measure(self, x: Tensor, beside: Arguments) -> tuple[Any, Any]:
        """Height and width of the map that `x` holds."""
        if self.layout != "tokens":
            return (x.shape[2], x.shape[3]) if self.layout == "map" else (x.shape[1], x.shape[2])
        height, width = read_size(self.places, beside)
        return height, width

    def to_map(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.layout == "map":
            return x
        rows = x.reshape(x.shape[0], height, width, x.shape[2]) if self.layout == "tokens" else x
        return rows.permute(0, 3, 1, 2)

    def from_map(self, x: Tensor) -> Tensor:
        if self.layout == "map":
            return x
        rows = x.permute(0, 2, 3, 1)
        return rows.reshape(x.shape[0], x.shape[2] * x.shape[3], x.shape[1]) if self.layout == "tokens" else rows

    def rebuild(self, height: int, width: int) -> Arguments:
        """The further arguments for a map of this size; raises ValueError where only the network has them."""
        if self.is_live:
            raise ValueError("this slot's own blocks get tensors beside the map, which only the whole network has: "
                             "they do not run alone")
        args, kwargs = list(self.args), dict(self.kwargs)
        sides: Sequence[Any] = (height, width) if len(self.places) == 2 else (self._pair(height, width),)
        for place, value in zip(self.places, sides, strict=False):
            if isinstance(place, int):
                args[place] = value
            else:
                kwargs[place] = value
        return tuple(args), kwargs

    def _pair(self, height: int, width: int) -> Any:
        if issubclass(self.pair, Tensor):
            return torch.tensor([height, width])
        make: Callable[[tuple[int, int]], Any] = self.pair
        return make((height, width))


MAP = Form("map")


def find_size(beside: Arguments, count: int) -> tuple[tuple[Place, ...], type] | None:
    """Where the further arguments hold a height and a width of `count` tokens, and the type of a pair; None: nowhere.

    The argument of two such numbers, or the first two whole numbers that follow each other and are such.
    """
    places: list[tuple[Place, Any]] = [*enumerate(beside[0]), *beside[1].items()]
    for place, value in places:
        if isinstance(value, tuple | list | Tensor) and len(_numbers(value)) == 2 and _fill(_numbers(value), count):
            known = (torch.Size, list, Tensor)
            return (place,), next((kind for kind in known if isinstance(value, kind)), tuple)
    for (first, height), (second, width) in itertools.pairwise(places):
        if type(height) is int and type(width) is int and _fill((height, width), count):
            return (first, second), tuple
    return None


def blank(beside: Arguments, places: Sequence[Place]) -> Arguments:
    """The further arguments with None in these places."""
    args = tuple(None if place in places else value for place, value in enumerate(beside[0]))
    return args, {place: None if place in places else value for place, value in beside[1].items()}


def _numbers(value: Any) -> list[int]:
    """The whole numbers of a pair; nothing for what holds anything else."""
    if isinstance(value, Tensor):
        if value.is_meta or value.ndim != 1 or len(value) != 2 or value.is_floating_point():
            return []
        value = value.tolist()
    return list(value) if all(type(number) is int for number in value) else []


def _fill(size: Sequence[int], count: int) -> bool:
    return size[0] * size[1] == count


def read_size(places: tuple[Place, ...], beside: Arguments) -> tuple[Any, Any]:
    """Height and width where `find_size` has found them."""
    values = [beside[0][place] if isinstance(place, int) else beside[1][place] for place in places]
    found = values if len(values) == 2 else values[0].tolist() if isinstance(values[0], Tensor) else values[0]
    height, width = found
    return height, width


class MapView(nn.Module):
    """The user's own blocks as they are, seen as a module that maps a map to a map of its shape."""

    def __init__(self, original: nn.Module, form: Form) -> None:
        super().__init__()
        self.original, self.form = original, form
        self.training = original.training

    def forward(self, x: Tensor, beside: Arguments | None = None) -> Tensor:
        height, width = x.shape[-2:]
        args, kwargs = beside or self.form.rebuild(height, width)
        return self.form.to_map(self.original(self.form.from_map(x), *args, **kwargs), height, width)


class Border(nn.Module):
    """Stands in the user's network where a slot is; `body` fills the slot and maps maps to maps."""

    def __init__(self, original: nn.Module, form: Form) -> None:
        super().__init__()
        self.form = form
        self.body: nn.Module = MapView(original, form)
        self.training = original.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = self.form.to_map(x, *self.form.measure(x, (args, kwargs)))
        if not isinstance(self.body, MapView):
            return self.form.from_map(self.body(given.contiguous()))
        return self.form.from_map(self.body(given, (args, kwargs)) if self.form.is_live else self.body(given))
