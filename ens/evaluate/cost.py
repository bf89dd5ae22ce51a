"""What a network costs, counted from its operators on shapes alone: nothing is timed, nothing is computed."""

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
from ens.space import Choice, SearchSpace


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
    """Cost of one pass over an input of this shape (B, C, H, W), without gradients."""
    shadow = copy.deepcopy(module).to("meta").eval()
    counter, bytes_ = FlopCounterMode(display=False), _LiveBytes()
    with torch.no_grad(), counter, bytes_:
        image = torch.empty(shape, device="meta")
        shadow(image)
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2, bytes_.peak)


class CostTable:
    """Costs of every genotype of a space as sums: what the slots do not touch, plus one entry a slot.

    `entries` are (parameters, MACs) of every choice of every slot, in slot order.
    """

    def __init__(self, *, rest: tuple[int, int], entries: Sequence[Sequence[tuple[int, int]]]) -> None:
        self._rest = rest
        self._entries = entries

    def costs(self, genotype: Sequence[int]) -> Mapping[str, float]:
        """`params` and `macs` of one genotype."""
        chosen = [self._entries[slot][index] for slot, index in enumerate(genotype)]
        return {"params": float(self._rest[0] + sum(params for params, _ in chosen)),
                "macs": float(self._rest[1] + sum(macs for _, macs in chosen))}

    def range(self, name: str) -> tuple[float, float]:
        """Smallest and largest `params` or `macs` of any genotype."""
        index = ("params", "macs").index(name)
        return (float(self._rest[index] + sum(min(entry[index] for entry in row) for row in self._entries)),
                float(self._rest[index] + sum(max(entry[index] for entry in row) for row in self._entries)))


def build_cost_table(network: Network, space: SearchSpace, *, height: int = 256, width: int = 256) -> CostTable:
    """Count every choice of every slot once, for an image of this size."""
    total = count_cost(network, (1, network.in_channels, height, width))
    rest = (total.params, total.macs)
    entries: list[list[tuple[int, int]]] = []
    known: dict[tuple[SlotSpec, Choice], Cost] = {}
    for slot in space.slots:
        spec = network.slot(slot.name)
        shape = (1, spec.channels, height // spec.downscale, width // spec.downscale)
        own = count_cost(network.get_submodule(spec.module), shape)
        rest = (rest[0] - own.params, rest[1] - own.macs)
        entries.append([(own.params, own.macs)])
        for choice in slot.choices[1:]:
            alike = (replace(spec, name="", module="", depth=0), choice)  # stages of one shape are counted once
            if alike not in known:
                with torch.device("meta"):  # sizes are all that counts, so no time goes into random weights
                    known[alike] = count_cost(create_filling(spec, choice), shape)
            entries[-1].append((known[alike].params, known[alike].macs))
    return CostTable(rest=rest, entries=entries)
