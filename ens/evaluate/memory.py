"""Activation memory of the graph that an export writes: the most bytes of maps alive together, from shapes alone.

A map is alive from the operator that makes it to the last one that reads it; operands and results of an operator are
alive together. Weights do not count, nor what a runtime adds (copies in other layouts, workspace) or saves (a result
in the place of an operand that is read no more). The peak of a genotype is a maximum, not a sum: over its slots, of
what the choice needs there beside what waits around it (skips, the image), and over what lies between the slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ens.blocks.rep import fold_blocks
from ens.evaluate.cost import copy_shapes, image_for
from ens.networks.steps import Network, SlotSpec, create_filling
from ens.space import Choice, SearchSpace, Tally

_ATEN = torch.ops.aten
_CUT = 4
"""An export cuts a convolution apart where slices of so many channels, or multiples, are all that is read of it."""
_STEPS = 64
"""Times an operator takes; the pieces of a depth-wise convolution that is cut apart come one after the other."""


class _Liveness(TorchDispatchMode):
    """Notes when bytes of a storage are made and when they are read last; times count operators."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.time = 0
        self.born: dict[int, int] = {}
        """Time at which a storage is made."""
        self.reads: dict[int, dict[tuple[int, int], int]] = {}
        """Byte ranges of a storage, each with the time of its last reading."""
        weights = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
        self._outside = {storage._cdata for storage in weights}
        self._kept: list[object] = [*weights]  # none of them may go, or its address is given to another
        self._convolved: set[int] = set()
        self._depthwise: list[tuple[int, int, int, int]] = []
        """Storage read and where in it, storage made, time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.time += _STEPS
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            self.read(tensor)
        if func is _ATEN.slice.Tensor and self._is_copied(args[0], result):
            result = result.clone()
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor in [*made, *map(torch.empty_like, made)] if func is _ATEN.silu.default else made:
            self._make(tensor)  # x · sigmoid(x) is two operators of an exported graph
        if func is _ATEN.convolution.default:
            self._note_convolution(args[0], result, groups=args[8])
        return result

    def _make(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.born and storage._cdata not in self._outside:
            self._kept.append(storage)
            self.born[storage._cdata] = self.time
        self.read(tensor)

    def _note_convolution(self, x: Tensor, result: Tensor, *, groups: int) -> None:
        given, made = (tensor.untyped_storage()._cdata for tensor in (x, result))
        self._convolved.add(made)
        if groups > 1 and x.shape == result.shape and given in self.born:
            self._depthwise.append((given, int(x.storage_offset()) * x.element_size(), made, self.time))

    def read(self, tensor: Tensor) -> None:
        """Note that a tensor's bytes are needed now; a tensor of one image holds them in a row."""
        storage = tensor.untyped_storage()._cdata
        if storage in self.born:
            start = int(tensor.storage_offset()) * tensor.element_size()
            span = sum(int((side - 1) * stride) for side, stride in zip(tensor.shape, tensor.stride(), strict=True))
            stop = start + (span + 1) * tensor.element_size() if tensor.numel() else start
            self.reads.setdefault(storage, {})[start, stop] = self.time

    def _is_copied(self, x: Tensor, part: Tensor) -> bool:
        """Whether a slice stays an operator in an exported graph."""
        pixels = x.shape[2] * x.shape[3] if x.ndim == 4 else 0
        return (x.shape != part.shape and not
                (pixels and x.untyped_storage()._cdata in self._convolved and x.shape[1] != part.shape[1]
                 and part.shape[1] % _CUT == 0 and (part.storage_offset() // pixels) % _CUT == 0))

    def list_parts(self) -> NDArray[np.int64]:
        """Rows of bytes, time they are made, time they are read last, storage. To be called once, at the end."""
        late: dict[tuple[int, int], int] = {}
        for given, offset, storage, time in self._depthwise:
            for number, (start, stop) in enumerate(self._split(storage)):
                late[storage, start] = time + min(number, _STEPS - 1)
                part, reads = (offset + start, offset + stop), self.reads[given]
                reads[part] = max(reads.get(part, 0), late[storage, start])
        rows = []
        for storage, born in self.born.items():
            for start, stop in self._split(storage):
                made = late.get((storage, start), born)
                last = max(last for part, last in self.reads[storage].items() if part[0] <= start < part[1])
                rows.append((stop - start, made, max(made, last), storage))
        return np.array(rows, np.int64)

    def _split(self, storage: int) -> list[tuple[int, int]]:
        """The byte ranges that reading cuts a storage into."""
        parts = self.reads[storage]
        return [(start, stop) for start, stop in itertools.pairwise(sorted({edge for part in parts for edge in part}))
                if any(part[0] <= start < part[1] for part in parts)]


def _sum_alive(parts: NDArray[np.int64], stop: int) -> NDArray[np.int64]:
    """Bytes alive at each time up to `stop`, which is included."""
    change = np.zeros(stop + 2, np.int64)
    np.add.at(change, parts[:, 1], parts[:, 0])
    np.add.at(change, np.minimum(parts[:, 2] + 1, stop + 1), -parts[:, 0])
    return change.cumsum()[:stop + 1]


def build_peak_tally(network: Network, space: SearchSpace, *, height: int, width: int) -> Tally:
    """Peak bytes by slot and choice, each beside what waits around the slot, for an image of this size padded to the
    network's multiple. The same numbers as of the exported file, but for `vssd` and `ssd` (up to a tenth too low) and
    selective scans: what an ONNX Scan takes beyond its operands is not known.
    """
    specs = [network.slot(slot.name) for slot in space.slots]
    parts, visits = _trace_network(network, specs, (1, network.in_channels, height, width))
    last = int(parts[:, 2].max())
    alive, between = _sum_alive(parts, last), np.ones(last + 1, bool)
    known: dict[tuple[SlotSpec, Choice, tuple[int, ...], bool], int] = {}
    entries = []
    for slot, spec in zip(space.slots, specs, strict=True):
        start, stop, shape, given = visits[slot.name]
        between[start + 1:stop + 1] = False
        waiting = parts[(parts[:, 1] <= start) & (parts[:, 2] > stop)]
        kept = given in waiting[:, 3]
        row = [float(alive[start + 1:max(start + 1, stop) + 1].max())]
        for choice in slot.choices[1:]:
            alike = (replace(spec, name="", module="", depth=0), choice, shape, kept)
            if alike not in known:
                known[alike] = _trace_choice(spec, choice, shape, kept=kept)
            row.append(float(known[alike] + waiting[:, 0].sum()))
        entries.append(tuple(row))
    return Tally(float(alive[between].max()), tuple(entries), is_maximum=True)


def _trace_choice(spec: SlotSpec, choice: Choice, shape: tuple[int, ...], *, kept: bool) -> int:
    """Peak bytes of a choice alone, without its input where that is `kept` for later readers anyway."""
    with torch.device("meta"):
        blocks = fold_blocks(create_filling(spec, choice).eval())
    with torch.no_grad(), _exported(), _Liveness(blocks) as live:
        given = image_for(blocks, shape)
        result = blocks(given)
    live.time += _STEPS
    live.read(result)
    parts = live.list_parts()
    if kept:
        parts = parts[parts[:, 3] != given.untyped_storage()._cdata]
    return int(_sum_alive(parts, live.time).max())


Visit = tuple[int, int, tuple[int, ...], int]
"""Times before a slot's first operator and of its last, the shape of its input, and the storage of that."""


def _trace_network(network: Network, specs: Sequence[SlotSpec],
                   shape: tuple[int, ...]) -> tuple[NDArray[np.int64], Mapping[str, Visit]]:
    """One pass of the teacher: what is alive when, and when each slot runs."""
    shadow = fold_blocks(copy_shapes(network).eval())
    visits: dict[str, Visit] = {}
    with torch.no_grad(), _exported(), _Liveness(shadow) as live:
        def enter(name: str, x: Tensor) -> None:
            visits[name] = live.time, live.time, tuple(x.shape), x.untyped_storage()._cdata

        def leave(name: str, x: Tensor) -> None:
            visits[name] = visits[name][0], live.time, *visits[name][2:]

        for spec in specs:
            shadow.watch(spec.name, enter, leave)
        result = shadow(image_for(shadow, shape))
    live.time += _STEPS
    live.read(result)
    return live.list_parts(), visits


def _exported() -> Any:
    """While it is open, scans are the operators that an export writes, not kernels of this machine."""
    return mock.patch.object(torch.compiler, "_is_compiling_flag", True)
