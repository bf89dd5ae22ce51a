"""The edge operator contract as a lint: which blocks become one piece for phones and boards, and why others do not.

Inside for `executorch` is a block that XNNPACK takes whole: one delegate at most, no operator outside it. Each operator
outside cuts the map out of the delegate, runs in ExecuTorch's portable kernels, loops over single numbers, and hands it
back. Inside for `onnx` is a block without Scan, Loop or If, which run pixel after pixel. In both the file must lower,
run, and reproduce PyTorch on three sizes. Operators do not depend on the width, so one width speaks for all.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ens.blocks import FAMILIES, family_options
from ens.blocks.rep import fold_blocks
from ens.distill.library import EdgeVerdict
from ens.export.failures import first_line, raise_shortage
from ens.export.formats import FORMATS, MissingRuntime, describe_network, needing
from ens.networks.steps import Network, RowNetwork, SlotSpec, create_filling
from ens.space import Choice, SearchSpace, Slot

TOLERANCE = 1e-4
SIZES_PX = ((24, 32), (16, 16), (40, 16))
"""Heights and widths that a block is compared on; the first alone where it is outside already."""
_LOOPS = ("Scan", "Loop", "If")
_SHOWN = 4
"""Operators that a reason names; the verdict holds all."""
_MOST_KINDS = 4
"""Blocks after which the families whose blocks alternate begin again."""

Verdicts = dict[str, dict[str, EdgeVerdict]]
"""Label of a kind of block -> runtime -> verdict, as a library's manifest keeps them."""


class EdgeError(ValueError):
    """A space of which the edge contract leaves nothing in some slot."""


def name_kind(spec: SlotSpec, choice: Choice) -> Choice:
    """What is linted for a choice of a slot: one block with its options, a row where the family's blocks alternate."""
    own = dict(spec.options) if choice.family == spec.family else {}
    alternates = choice.family in FAMILIES and "index" in family_options(choice.family)
    return Choice(choice.family, min(choice.depth, _MOST_KINDS) if alternates else 1,
                  tuple(sorted({**own, **dict(choice.options)}.items())))


def lint_kind(spec: SlotSpec, kind: Choice) -> dict[str, EdgeVerdict]:
    """Runtime -> verdict on a kind of block at the width of a slot, random weights; nothing for no family of ours.

    Raises MissingRuntime where a runtime is not installed, MemoryError or OSError where memory or disk ran out.
    """
    if kind.family not in FAMILIES:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RowNetwork(fold_blocks(create_filling(spec, kind)), spec.channels).eval()
    return {"executorch": _judge(lambda: _lint_executorch(network, kind.depth), "executorch"),
            "onnx": _judge(lambda: _lint_onnx(network), "onnxruntime")}


def _judge(lint: Callable[[], EdgeVerdict], package: str) -> EdgeVerdict:
    """The verdict, whatever an exporter or runtime raises being a reason."""
    try:
        return lint()
    except (MissingRuntime, MemoryError, OSError):
        raise
    except Exception as failure:  # exporters' errors share no public class
        raise_shortage(failure)
        return EdgeVerdict(version=version(package), reason=f"does not export or run: "
                           f"{first_line(failure.__cause__ or failure)[:200]}")


def _lint_executorch(network: Network, blocks: int) -> EdgeVerdict:
    with needing("executorch"):
        from ens.export.executorch import assemble, count_operators, load_program, lower
    from ens.export.torch_export import trace_network

    def open_size(size: tuple[int, int]) -> tuple[Counter[str], Callable[[Tensor], Tensor]]:
        lowered = lower(trace_network(network, size))
        return count_operators(lowered), lambda image: load_program(assemble(lowered))(image)

    (count, run), errors = open_size(SIZES_PX[0]), []
    delegates = count.pop("delegate", 0)
    outside = sorted(count)
    reason = f"{delegates} delegates" if outside or delegates > blocks else ""
    if outside:
        reason += f", and outside them {', '.join(outside[:_SHOWN])}" + (
            f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else "")
    for size in SIZES_PX if not reason else SIZES_PX[:1]:
        run = run if size == SIZES_PX[0] else open_size(size)[1]
        errors.append(_measure_error(network, run, size))
    return _conclude("executorch", reason, errors, delegates=delegates, outside=dict(sorted(count.items())))


def _lint_onnx(network: Network) -> EdgeVerdict:
    import onnx

    kind = FORMATS[".onnx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        kind.write(network, path, describe_network(network), None, lambda line: None)
        count = Counter(node.op_type for node in onnx.load(path).graph.node)
        run = kind.open(path, None).run
        errors = [_measure_error(network, run, size) for size in SIZES_PX]
    loops = {name: count[name] for name in _LOOPS if count[name]}
    return _conclude("onnxruntime", f"runs as {', '.join(loops)}" if loops else "", errors, outside=loops)


def _measure_error(network: Network, run: Callable[[Tensor], Tensor], size: tuple[int, int]) -> float:
    """‖a−b‖/‖b‖ on a map of noise."""
    image = torch.randn(1, network.in_channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.restore(image)
    return float((run(image) - expected).norm() / expected.norm())


def _conclude(package: str, reason: str, errors: list[float], *, outside: dict[str, int],
              delegates: int = 0) -> EdgeVerdict:
    error = float(torch.tensor(errors).max())  # NaN where one is
    if not reason and not error <= TOLERANCE:
        reason = f"differs from PyTorch by {error:.1e} relative"
    return EdgeVerdict(version=version(package), reason=reason, delegates=delegates, outside=outside,
                       relative_error=error if error == error else -1.0)


def lint_space(space: SearchSpace, network: Network, known: Mapping[str, Mapping[str, EdgeVerdict]],
               say: Callable[[str], None]) -> Verdicts:
    """Verdicts on every kind of block of a space, the teacher's own included, those that are not `known` made now."""
    found: Verdicts = {}
    for slot in space.slots:
        spec = network.slot(slot.name)
        for choice in slot.choices:
            kind = name_kind(spec, choice)
            if kind.label not in found:
                if kind.label not in known:
                    say(f"edge: linting {kind.label}, some seconds a runtime")
                found[kind.label] = dict(known.get(kind.label) or lint_kind(spec, kind))
    return found


def keep_edge(space: SearchSpace, network: Network, verdicts: Mapping[str, Mapping[str, EdgeVerdict]],
              say: Callable[[str], None]) -> SearchSpace:
    """The space without choices outside the contract; `say` gets a line for each, with its slots and reasons.

    A slot whose teacher's own blocks are outside is closed to them. Raises EdgeError where a slot has nothing left.
    """
    left_out: dict[str, list[str]] = {}
    slots = []
    for slot in space.slots:
        reasons = [_find_reason(name_kind(network.slot(slot.name), choice), verdicts) for choice in slot.choices]
        kept = [choice for choice, reason in zip(slot.choices, reasons, strict=True) if choice.teacher or not reason]
        if reasons[0] and len(kept) == 1:
            raise EdgeError(f"{space.name}: of slot {slot.name} nothing is inside the edge contract: " + "; ".join(
                f"{choice.label}: {reason}" for choice, reason in zip(slot.choices, reasons, strict=True)))
        for choice, reason in zip(slot.choices, reasons, strict=True):
            if reason:
                left_out.setdefault(f"{choice.label}, {reason}", []).append(slot.name)
        slots.append(Slot(slot.name, tuple(kept), closed=bool(reasons[0])))
    for text, names in left_out.items():
        where = "every slot" if len(names) == len(space.slots) else ", ".join(names)
        say(f"edge: leaves out, in {where}: {text}")
    return dataclasses.replace(space, slots=tuple(slots))


def _find_reason(kind: Choice, verdicts: Mapping[str, Mapping[str, EdgeVerdict]]) -> str:
    """Why a kind of block is outside the contract of some runtime; "" where it is inside all."""
    found = verdicts.get(kind.label)
    if not found:
        return "no family of ens, so it is not linted"
    return "; ".join(f"{runtime}: {verdict.reason}" for runtime, verdict in found.items() if verdict.reason)
