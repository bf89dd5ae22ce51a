"""int8: an exported ONNX file with 8-bit convolutions and matrix products, statically calibrated (QDQ).

An int8 file does not reproduce its network, so it is held to another promise than other exports: its PSNR on the
validation images may cost at most so many dB, which is measured in ONNX Runtime and written into the file.

Shapes: images (1, C, H, W) in [0, 1], sides multiples of the size multiple.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor

from ens.atomic import atomic_path
from ens.data.pairs import ValidationSet
from ens.evaluate.evaluator import evaluate_restorer
from ens.evaluate.protocols import Protocol
from ens.export.formats import FORMATS, ExportError
from ens.networks.steps import pad_to_multiple

MAX_COST_DB = 0.2
"""PSNR that int8 may cost; beyond it, slots go back to float."""
_FORMAT = "ens onnx int8 1"
_BETWEEN = "between slots"
"""Group of the convolutions that are in no slot: the ones that sample down and up and join skips."""
_CORES = ("x_proj", "dt_projs", "A_log")
"""Weights inside state-space cores: what they make is exponentiated over thousands of pixels."""


class Int8Error(ExportError):
    """A network that int8 harms beyond the bound, or in which nothing can be int8."""


@dataclass(frozen=True)
class Int8Report:
    """What int8 costs on the validation images (mean and worst, dB), which slots stay float, and the cost of each slot
    alone where that was needed to decide.
    """

    cost_db: float
    worst_db: float
    float_slots: tuple[str, ...]
    slot_costs_db: Mapping[str, float]

    def facts(self) -> dict[str, str]:
        """For the card and the file itself."""
        return {"int8_psnr_cost_db": f"{self.cost_db:.3f}", "int8_psnr_cost_worst_db": f"{self.worst_db:.3f}",
                "int8_float_slots": ", ".join(self.float_slots) or "none",
                **({"int8_slot_costs_db": ", ".join(f"{name} {cost:.3f}" for name, cost in self.slot_costs_db.items())}
                   if self.slot_costs_db else {})}


def write_int8(source: Path, target: Path, *, slots: Mapping[str, str], calibration: Sequence[Tensor],
               images: ValidationSet, protocol: Protocol, max_cost_db: float = MAX_COST_DB,
               on_event: Callable[[str], None] | None = None) -> Int8Report:
    """Write the int8 form of an exported ONNX file, with free sides if that has them; the file appears last.

    `slots` (name -> module) name what can stay float, `calibration` are degraded training images. Float are always:
    the first and the last convolution (the long skip joins there), products of two activations (attention and
    state-space cores), and everything that is no convolution or matrix product. Where the mean PSNR on `images` falls
    by more than `max_cost_db`, the slots that cost most alone stay float, one after the other, until it does not.
    Raises Int8Error where even that is too much or an output is not finite.
    """
    say = on_event or (lambda line: None)
    groups = list_groups(onnx.load(source), slots)
    if not groups:
        raise Int8Error(f"{source.name}: holds no convolution or matrix product inside that int8 could take")
    with tempfile.TemporaryDirectory() as scratch:
        trial = _Trial(source, groups, calibration, images, protocol, Path(scratch))
        say(f"int8: calibrating {sum(map(len, groups.values()))} convolutions on {len(calibration)} images")
        costs, alone, kept = trial.costs(()), dict[str, float](), list[str]()
        if statistics.fmean(costs) > max_cost_db:
            say(f"int8: costs {statistics.fmean(costs):.2f} dB; measuring each slot alone")
            alone = {name: statistics.fmean(trial.costs([other for other in groups if other != name]))
                     for name in groups}
        for name in sorted(alone, key=lambda name: -alone[name]):
            kept.append(name)
            if len(kept) == len(groups):
                raise Int8Error(f"{source.name}: int8 costs {statistics.fmean(costs):.2f} dB even where only "
                                f"{name} is int8, more than {max_cost_db} dB; the file was not written")
            costs = trial.costs(kept)
            say(f"int8: {statistics.fmean(costs):.3f} dB with {', '.join(kept)} in float")
            if statistics.fmean(costs) <= max_cost_db:
                break
        with atomic_path(target) as temporary:
            trial.write(temporary, kept)
            check_finite(temporary)
            report = Int8Report(statistics.fmean(costs), max(costs), tuple(kept), alone)
            _add_facts(temporary, report.facts())
    return report


def list_groups(model: onnx.ModelProto, slots: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of the nodes that may become int8, by slot, in the order of the graph."""
    weights = {entry.name: entry for entry in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul") and node.input[1] in weights
             and not _is_uniform(weights[node.input[1]])]
    if len(found) > 2:
        found = found[1:-1]
    groups: dict[str, list[str]] = {}
    for node in found:
        name = node.input[1]
        if not any(core in name for core in _CORES):
            groups.setdefault(_find_slot(name, slots), []).append(node.name)
    return groups


def _is_uniform(weight: onnx.TensorProto) -> bool:
    """Means of norms and changes of layout are convolutions whose weights are all the same: float, like any statistic.
    """
    values = onnx.numpy_helper.to_array(weight)
    return bool((values == values.flat[0]).all())


def _find_slot(weight: str, slots: Mapping[str, str]) -> str:
    return next((name for name, module in slots.items() if f".{module}." in f".{weight}"), _BETWEEN)


class _Trial:
    """The int8 forms of one file, each on the validation images."""

    def __init__(self, source: Path, groups: Mapping[str, Sequence[str]], calibration: Sequence[Tensor],
                 images: ValidationSet, protocol: Protocol, scratch: Path) -> None:
        self.groups, self.calibration, self.scratch = groups, calibration, scratch
        self.source = scratch / "source.onnx"
        onnx.save(_name_biases(onnx.load(source)), self.source)
        self._images, self._protocol = images, protocol
        self._float_psnr_db = self._measure(source)

    def write(self, path: Path, kept: Sequence[str]) -> None:
        """The int8 file with the slots `kept` in float."""
        nodes = [node for name, members in self.groups.items() if name not in kept for node in members]
        with _hushed():
            # Seven bits for weights: without VNNI, pairs of 8-bit products overflow the 16 bits they are added in.
            quantize_static(
                self.source, path, _Reader(self.calibration), op_types_to_quantize=["Conv", "MatMul"],
                nodes_to_quantize=nodes, per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8, calibration_cache_path=self.scratch / "ranges.json")

    def costs(self, kept: Sequence[str]) -> list[float]:
        """PSNR that every validation image loses, dB."""
        path = self.scratch / "trial.onnx"
        self.write(path, kept)
        return [before - after for before, after in zip(self._float_psnr_db, self._measure(path), strict=True)]

    def _measure(self, path: Path) -> list[float]:
        opened = FORMATS[".onnx"].open(path, None)
        multiple, upscale = int(opened.metadata["size_multiple"]), int(opened.metadata["upscale"])

        def restore(image: Tensor) -> Tensor:
            height, width = image.shape[-2:]
            return opened.run(pad_to_multiple(image, multiple))[..., :height * upscale, :width * upscale]

        return [score.psnr_db for score in evaluate_restorer(restore, self._images, self._protocol)]


def _name_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with biases renamed, in place: a shared one is copied by ONNX Runtime as NAME0, NAME1 …, and what the
    exporter calls `val_119` then takes the name of its `val_1190`.
    """
    names = {node.input[2]: f"{node.input[2]}:" for node in model.graph.node
             if node.op_type == "Conv" and len(node.input) > 2}
    for entry in model.graph.initializer:
        entry.name = names.get(entry.name, entry.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) if node.op_type == "Conv" else name for name in node.input]
    return model


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images one by one, as ONNX Runtime asks for them."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, object] | None:
        image = next(self._images, None)
        return None if image is None else {"image": np.ascontiguousarray(image.numpy())}


def check_finite(path: Path) -> None:
    """Raise Int8Error where a file gives what is not finite for noise, black, white or half-black images."""
    opened = FORMATS[".onnx"].open(path, None)
    multiple, channels = int(opened.metadata["size_multiple"]), int(opened.metadata["channels"])
    side = -(-64 // multiple) * multiple
    noise = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    half = noise.clone()
    half[..., :side // 2] = 0
    for image in (noise, half, torch.zeros_like(noise), torch.ones_like(noise)):
        if not opened.run(image).isfinite().all():
            raise Int8Error(f"{path.name}: the int8 file gives numbers that are not finite; it was not kept")


def _add_facts(path: Path, facts: Mapping[str, str]) -> None:
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**metadata, "format": _FORMAT, **facts})
    onnx.save(model, path)


@contextmanager
def _hushed() -> Iterator[None]:
    """The quantiser logs advice for networks of other kinds."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
