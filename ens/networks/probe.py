"""One pass over an image: which submodules are called, how, and whether something else could stand in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ens.networks.borders import MAP, Form, blank, find_size, read_size
from ens.own_code import describe_failure
from ens.shortage import is_shortage

READS_IMAGE = "gets features of the image beside its map, which a stand-in would not see"


@dataclass(frozen=True)
class Visit:
    """One call of a submodule: how it is called and what map it sees, or why it can be no slot (`reason`).

    `beside` are the tensors that it gets beside its map.
    """

    name: str
    reason: str = ""
    form: Form = MAP
    channels: int = 0
    downscale: int = 1
    beside: tuple[Tensor, ...] = ()


def record_visits(run: Callable[[], object], modules: Mapping[str, nn.Module], size: tuple[int, int]) -> list[Visit]:
    """Every call of these modules while `run` runs an image of this height and width, in the order they begin."""
    begun: list[Visit | None] = []
    running: list[int] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(len(begun))
        begun.append(None)

    def leave(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            begun[running.pop()] = _describe(name, args, kwargs, output, size)
        return hook

    handles = [handle for name, module in modules.items() for handle in (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave(name), with_kwargs=True))]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [visit for visit in begun if visit is not None]


def _describe(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any,
              image: tuple[int, int]) -> Visit:
    x, rest = args[0] if args else None, args[1:]
    if not isinstance(x, Tensor):
        return Visit(name, "does not get a tensor as its first argument")
    if not isinstance(output, Tensor):
        return Visit(name, f"returns a {type(output).__name__}, not a tensor")
    if x.shape != output.shape:
        return Visit(name, f"changes the shape, {tuple(x.shape)} to {tuple(output.shape)}")
    if x.ndim not in (3, 4):
        return Visit(name, f"works on {tuple(x.shape)}, which is no map")
    places = find_size((rest, kwargs), x.shape[1]) if x.ndim == 3 else None
    if x.ndim == 3 and places is None:
        return Visit(name, f"takes tokens {tuple(x.shape)} without the size of their map")
    sizes = {"tokens": read_size(places[0], (rest, kwargs))} if places else {
        "map": (x.shape[2], x.shape[3]), "rows": (x.shape[1], x.shape[2])}
    fitting = [layout for layout, size in sizes.items() if x.shape[0] == 1 and _find_downscale(image, size)]
    if not fitting:
        return Visit(name, f"works on {tuple(x.shape)}, which is no map of the whole {image[0]}×{image[1]} image at a "
                           "whole fraction of its size")
    layout = fitting[0]
    args, kwargs = blank((rest, kwargs), places[0] if places else ())
    tensors = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    form = (Form(layout, (), (), *(places or ((), tuple)), is_live=True) if tensors else
            Form(layout, args, tuple(kwargs.items()), *(places or ((), tuple))))
    return Visit(name, "", form, x.shape[1] if layout == "map" else x.shape[-1],
                 _find_downscale(image, sizes[layout]), tuple(tensor.detach() for tensor in tensors))


def _find_downscale(image: tuple[int, int], size: tuple[int, int]) -> int:
    """How many times smaller a map is than the image, 0 where that is no whole number or differs between its sides."""
    if not min(size) or image[0] % size[0] or image[1] % size[1] or image[0] // size[0] != image[1] // size[1]:
        return 0
    return int(image[0] // size[0])


def differ(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether what two passes had beside a map differs; on the meta device nobody can tell, and it does not."""
    pairs = list(zip(first, second, strict=True))
    return any(a.shape != b.shape or not (a.is_meta or torch.equal(a, b)) for a, b in pairs)


def probe_image(module: nn.Module, channels: int, size: tuple[int, int], seed: int) -> Tensor:
    """Noise of the precision and on the device that the module computes in."""
    floats = (m for m in (*module.parameters(), *module.buffers()) if m.is_floating_point())
    like = next(floats, torch.zeros(0))
    noise = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return noise.to(dtype=like.dtype, device=like.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every part gets its own mode back, a frozen BatchNorm for instance."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Whatever a user's code raises, as a ValueError of one sentence; shortages as what they are."""
    try:
        yield
    except Exception as error:
        if is_shortage(error):
            raise
        raise ValueError(f"{what}: {describe_failure(error)}") from error
