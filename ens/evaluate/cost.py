"""What a network costs, counted from its operators on shapes alone: nothing is timed, nothing is computed.

Multiply-adds are those of convolutions and matrix products, and of every scan by one formula (`ens.ops.scan_op`,
`scan_flops`): VMamba's (9·N + 1) operations a step and channel, half as many multiply-adds. `ssd` counts as the
recurrence it is, by the same formula in each direction, whatever form of it runs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ens.networks.steps import Network, SlotSpec, create_filling
from ens.space import Choice, SearchSpace, Tally


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds of one pass (the scans' included), and peak bytes of live activations."""

    params: int
    macs: int
    peak_bytes: int


class _LiveBytes(TorchDispatchMode):
    """Follows every storage from its first appearance to its death."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._known:
            self._known.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def count_cost(module: nn.Module, shape: tuple[int, ...]) -> Cost:
    """Cost of one pass over an input of this shape (B, C, H, W), without gradients; no weight is read or copied."""
    shadow = copy_shapes(module).eval()
    counter, bytes_ = FlopCounterMode(display=False), _LiveBytes()
    with torch.no_grad(), counter, bytes_:
        shadow(image_for(shadow, shape))
    return Cost(_count_params(module), counter.get_total_flops() // 2, bytes_.peak)


def copy_shapes(module: nn.Module) -> Any:
    """The module with its parameters and buffers on the meta device; the module itself stays as it is."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        shape = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(module, memo)  # what is in the memo counts as copied already


def image_for(shadow: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """An input of the precision the module computes in, on its device."""
    floats = (p for p in shadow.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0, device="meta"))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


class CostTable:
    """Costs of every genotype of a space as sums: what the slots do not touch, plus one entry a slot.

    `entries` are (parameters, operations) of every choice of every slot, in slot order; two operations are a
    multiply-add. Operations, because halves of odd numbers would not add up.
    """

    def __init__(self, *, rest: tuple[int, int], entries: Sequence[Sequence[tuple[int, int]]]) -> None:
        self._rest = rest
        self._entries = entries

    def costs(self, genotype: Sequence[int]) -> Mapping[str, float]:
        """`params` and `macs` of one genotype."""
        chosen = [self._entries[slot][index] for slot, index in enumerate(genotype)]
        return {"params": float(self._rest[0] + sum(params for params, _ in chosen)),
                "macs": float((self._rest[1] + sum(operations for _, operations in chosen)) // 2)}

    def tally(self, name: str) -> Tally:
        """`params` or `macs` as numbers a choice; halves of multiply-adds are dropped in the end only."""
        index, divisor = (0, 1) if name == "params" else (1, 2)
        entries = tuple(tuple(entry[index] / divisor for entry in row) for row in self._entries)
        return Tally(self._rest[index] / divisor, entries)

    def range(self, name: str) -> tuple[float, float]:
        """Smallest and largest `params` or `macs` of any genotype."""
        index = ("params", "macs").index(name)
        ends = (self._rest[index] + sum(end(entry[index] for entry in row) for row in self._entries)
                for end in (min, max))
        smallest, largest = (float(end if name == "params" else end // 2) for end in ends)
        return smallest, largest


def build_cost_table(network: Network, space: SearchSpace, *, height: int = 256, width: int = 256) -> CostTable:
    """Count every choice of every slot once, for an image of this size: on the maps that really reach the slot, which
    are larger where the image has to be padded to a multiple of the network's.
    """
    specs = [network.slot(slot.name) for slot in space.slots]
    total, own = _count_slots(network, specs, (1, network.in_channels, height, width))
    rest = (_count_params(network), total)
    entries: list[list[tuple[int, int]]] = []
    known: dict[tuple[SlotSpec, Choice, tuple[int, ...]], tuple[int, int]] = {}
    for slot, spec in zip(space.slots, specs, strict=True):
        shape, operations = own[slot.name]
        entries.append([(_count_params(network.content(spec.name)), operations)])
        rest = (rest[0] - entries[-1][0][0], rest[1] - operations)
        for choice in slot.choices[1:]:
            # Stages of one shape are counted once.
            alike = (replace(spec, name="", module="", behind=(), depth=0), choice, shape)
            if alike not in known:
                with torch.device("meta"):  # sizes are all that counts, so no time goes into random weights
                    blocks = create_filling(spec, choice).eval()
                known[alike] = (_count_params(blocks), _count_operations(blocks, shape))
            entries[-1].append(known[alike])
    return CostTable(rest=rest, entries=entries)


def _count_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_operations(shadow: nn.Module, shape: tuple[int, ...]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(image_for(shadow, shape))
    return counter.get_total_flops()


def _count_slots(network: Network, specs: Sequence[SlotSpec],
                 shape: tuple[int, ...]) -> tuple[int, dict[str, tuple[tuple[int, ...], int]]]:
    """Operations of one pass, and by slot the shape of its input and its own operations."""
    try:
        return _count_run(copy_shapes(network).eval(), specs, shape)
    except (RuntimeError, NotImplementedError):
        if any(tensor.is_meta for tensor in network.parameters()):
            raise
        return _count_run(copy.deepcopy(network).eval(), specs, shape)  # a user's code may read values, to decide by


def _count_run(shadow: Network, specs: Sequence[SlotSpec],
               shape: tuple[int, ...]) -> tuple[int, dict[str, tuple[tuple[int, ...], int]]]:
    counter = FlopCounterMode(display=False)
    found: dict[str, tuple[tuple[int, ...], int]] = {}

    def enter(name: str, x: Tensor) -> None:
        found[name] = (tuple(x.shape), counter.get_total_flops())

    def leave(name: str, x: Tensor) -> None:
        found[name] = (found[name][0], counter.get_total_flops() - found[name][1])

    for spec in specs:
        shadow.watch(spec.name, enter, leave)
    with torch.no_grad(), counter:
        shadow(image_for(shadow, shape))
    return counter.get_total_flops(), found
