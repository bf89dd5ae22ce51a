"""A network as a list of steps with one traversal, `Network.run`: forward, feature capture and prefix caches use it.

Shapes: image (B, C_in, H, W) in [0, 1]; every step maps a state to a state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ens.blocks import create_stack
from ens.blocks.bounds import MAX_DEPTH
from ens.space import Choice

State = dict[str, Tensor]
"""Running feature `x`, the padded input `image`, skips by name. A step never changes a state, it returns a new one."""


@dataclass(frozen=True)
class Step:
    """One step: take the running feature, join it with a kept one, apply a module, keep the result.

    `module`: dotted name of the submodule to apply ("" for none). `save`: name to keep the result under.
    `load`: start from this kept feature instead of `x`. `cat` / `add`: kept feature joined before the module
    (concatenated behind `x` along the channels, or added). `pair`: kept feature the module takes as second argument.
    `free`: kept features nobody reads after this step.
    """

    module: str = ""
    save: str = ""
    load: str = ""
    cat: str = ""
    add: str = ""
    pair: str = ""
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class SlotSpec:
    """What may fill a slot must map (B, channels, H/downscale, W/downscale) to the same shape.

    `module` is the dotted name of the submodule in the slot, `depth` its number of blocks, `family` theirs, `heads` the
    attention heads where the family has some, and `options` the block options the network was built with. `single`:
    the submodule is one block itself, not a row of blocks. `behind`: blocks that run right behind `module` and are in
    the slot with it.
    """

    name: str
    module: str
    channels: int
    downscale: int
    depth: int
    family: str
    heads: int = 1
    options: tuple[tuple[str, int | float | str | bool], ...] = ()
    single: bool = False
    behind: tuple[str, ...] = ()


class Network(nn.Module):
    """A restoration network whose `steps` say in which order its submodules run.

    Subclasses set `steps`, `slots` (stages, in execution order), `size_multiple` (H and W of what `run` sees) and
    `upscale`. `forward` pads to the multiple, runs every step, and cuts the result back.
    """

    steps: tuple[Step, ...]
    slots: tuple[SlotSpec, ...]
    size_multiple: int = 1
    upscale: int = 1
    in_channels: int = 3
    recipe: tuple[str, dict[str, Any]] | None = None
    """Name and options `create_network` was called with; None for a network built in another way."""

    def run(self, state: State, start: int = 0, stop: int | None = None) -> State:
        """Apply steps `start` to `stop` (exclusive, all by default) and return the new state."""
        for step in self.steps[start:stop]:
            state = self._apply_step(step, state)
        return state

    def _apply_step(self, step: Step, state: State) -> State:
        x = state[step.load or "x"]
        if step.add:
            x = x + state[step.add]
        if step.cat:
            x = torch.cat([x, state[step.cat]], 1)
        if step.module:
            module = self.get_submodule(step.module)
            x = module(x, state[step.pair]) if step.pair else module(x)
        state = {name: value for name, value in state.items() if name not in step.free}
        return {**state, "x": x, **({step.save: x} if step.save else {})}

    def start(self, image: Tensor) -> State:
        """The state before the first step; `image` already has sides that are multiples of `size_multiple`."""
        return {"x": image, "image": image}

    def restore(self, image: Tensor) -> Tensor:
        """All steps on an image whose sides are multiples of `size_multiple`; this is what is exported."""
        return self.run(self.start(image))["x"]

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = self.restore(pad_to_multiple(image, self.size_multiple))
        return x[..., :height * self.upscale, :width * self.upscale]

    def slot(self, name: str) -> SlotSpec:
        """Stage, block or pair of blocks by name; raises KeyError listing the names. Blocks of a stage are
        `stage.index`, pairs of them `stage.0-1`.
        """
        for list_slots in (iter, block_slots, pair_slots):  # one after the other: making them takes longer than filling
            for spec in list_slots(self.slots):
                if spec.name == name:
                    return spec
        raise KeyError(f"no slot {name!r}; stages: {', '.join(spec.name for spec in self.slots)} "
                       "(one block: stage.index, a pair: stage.0-1)")

    def content(self, name: str) -> nn.Module:
        """What is in a slot; a pair of blocks is a row."""
        spec = self.slot(name)
        first, *behind = (self.get_submodule(module) for module in (spec.module, *spec.behind))
        return nn.Sequential(first, *behind) if behind else first

    def fill(self, name: str, module: nn.Module) -> None:
        """Put a module that keeps the shape into a slot, in place."""
        spec = self.slot(name)
        self.set_submodule(spec.module, module)
        for other in spec.behind:
            self.set_submodule(other, nn.Sequential())

    def capture(self, image: Tensor, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Run once and return (input, output) of every named slot; `image` as in `restore`. No gradients."""
        given: dict[str, Tensor] = {}
        returned: dict[str, Tensor] = {}

        def enter(name: str, x: Tensor) -> None:
            given[name] = x

        def leave(name: str, x: Tensor) -> None:
            returned[name] = x

        hooks = [hook for name in names for hook in self.watch(name, enter, leave)]
        try:
            with torch.no_grad():
                self.restore(image)
        finally:
            for handle in hooks:
                handle.remove()
        return {name: (given[name], returned[name]) for name in names}

    def watch(self, name: str, enter: Callable[[str, Tensor], None],
              leave: Callable[[str, Tensor], None]) -> tuple[RemovableHandle, RemovableHandle]:
        """Call `enter` with a slot's name and input in every pass, and `leave` with its output."""
        spec = self.slot(name)
        last = self.get_submodule((spec.module, *spec.behind)[-1])
        return (self.get_submodule(spec.module).register_forward_pre_hook(lambda _, inputs: enter(name, inputs[0])),
                last.register_forward_hook(lambda _, __, output: leave(name, output)))

    def released_keys(self) -> dict[str, str]:
        """Keys of the weights as a released file has them -> those of this network's `state_dict`."""
        return {key: key for key in self.state_dict()}

    def slot_step(self, name: str) -> int:
        """Index of the step that runs this slot (of a block slot: its stage)."""
        module = self.slot(name).module
        return next(index for index, step in enumerate(self.steps)
                    if step.module and (module == step.module or module.startswith(step.module + ".")))


class RowNetwork(Network):
    """The blocks of one slot as a network from feature maps to feature maps: (B, channels, H, W) -> same."""

    steps = (Step("body"),)
    slots = ()

    def __init__(self, body: nn.Module, channels: int, size_multiple: int = 1) -> None:
        super().__init__()
        self.body = body
        self.in_channels = channels
        self.size_multiple = size_multiple


def block_slots(stages: Sequence[SlotSpec]) -> list[SlotSpec]:
    """Every block of these stages as a slot, in execution order; a stage that is one block itself stays as it is."""
    return [stage if stage.single else replace(stage, name=f"{stage.name}.{i}", module=f"{stage.module}.{i}", depth=1)
            for stage in stages for i in range(stage.depth)]


def pair_slots(stages: Sequence[SlotSpec]) -> list[SlotSpec]:
    """Blocks of these stages two by two, in execution order; one that is left over, or alone, is a slot itself."""
    pairs = []
    for stage in stages:
        blocks = block_slots([stage])
        for first in range(0, len(blocks) - 1, 2):
            pairs.append(replace(blocks[first], name=f"{blocks[first].name}-{first + 1}", depth=2,
                                 behind=(blocks[first + 1].module,)))
        pairs.extend(blocks[len(blocks) // 2 * 2:])
    return pairs


def count_row(keys: Iterable[str], row: str) -> int:
    """How many submodules `row.0`, `row.1` … the keys of a `state_dict` name; ValueError names the first of a gap."""
    start = row.count(".") + 1
    numbers = {int(part) for part in (key.split(".")[start] for key in keys if key.startswith(f"{row}."))
               if part.isdecimal()}
    if max(numbers, default=-1) >= len(numbers):
        missing = next(index for index in itertools.count() if index not in numbers)
        raise ValueError(f"{row}.{missing} is missing, {row}.{max(numbers)} is there")
    return len(numbers)


def check_depth(slot: str, choice: Choice) -> None:
    """Raise ValueError for a choice of no block, or of more than anybody can mean."""
    if not 1 <= choice.depth <= MAX_DEPTH:
        raise ValueError(f"slot {slot}: {choice.label} has a depth of {choice.depth}; allowed: 1 to {MAX_DEPTH}")


def create_filling(spec: SlotSpec, choice: Choice) -> nn.Sequential:
    """The blocks of a choice for this slot, randomly initialised.

    A choice of the teacher's own family takes the options the network was built with, unless it says others. Raises
    ValueError for a depth outside 1 to MAX_DEPTH, and what `create_stack` raises.
    """
    check_depth(spec.name, choice)
    own = dict(spec.options) if choice.family == spec.family else {}
    return create_stack(choice.family, spec.channels, choice.depth, heads=spec.heads,
                        options={**own, **dict(choice.options)})


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Reflect on the right and bottom up to the next multiple; replicate where the pad is no smaller than the image."""
    height, width = image.shape[-2:]
    return pad_to_size(image, (height + -height % multiple, width + -width % multiple))


def pad_to_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """As `pad_to_multiple` up to a height and width that the image does not exceed."""
    for axis, side in ((-1, size[1]), (-2, size[0])):
        if pad := side - image.shape[axis]:
            mode = "reflect" if pad < image.shape[axis] else "replicate"
            image = F.pad(image, (0, pad, 0, 0) if axis == -1 else (0, 0, 0, pad), mode=mode)
    return image
