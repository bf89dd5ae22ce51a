"""What the archive holds, as JSON values and back: spaces, measurements, baselines and fine-tuned results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from ens.pareto.baseline import Baseline, Tuned
from ens.space import Genotype, Measurement, SearchSpace, Slot, format_genotype, parse_choice


def space_manifest(space: SearchSpace) -> dict[str, Any]:
    """What a manifest keeps of a space: its name, slots, choice labels and prices."""
    return {"space": space.name, "slot_order": [slot.name for slot in space.slots],
            "slots": {slot.name: [choice.label for choice in slot.choices] for slot in space.slots},
            "penalty": {"teacher": space.penalty_teacher, "per_block": space.penalty_per_block,
                        "transformers": list(space.transformers)}}


def read_space(manifest: Mapping[str, Any]) -> SearchSpace:
    """Inverse of space_manifest."""
    slots = []
    for name in manifest["slot_order"]:
        own, *others = map(parse_choice, manifest["slots"][name])
        slots.append(Slot(name, (dataclasses.replace(own, teacher=True), *others)))
    penalty = manifest["penalty"]
    return SearchSpace(manifest["space"], tuple(slots), penalty["teacher"], penalty["per_block"],
                       tuple(penalty["transformers"]))


def to_trial(measurement: Measurement, *, slots: Mapping[str, Sequence[str]], objectives: Sequence[str],
              engine: str) -> FrozenTrial:
    """One finished trial of an Optuna study; raises ValueError for what an archive does not take."""
    if len(measurement.genotype) != len(slots):
        raise ValueError(f"a genotype of this archive has {len(slots)} entries, got {len(measurement.genotype)}")
    labels = {slot: choices[index]
              for (slot, choices), index in zip(slots.items(), measurement.genotype, strict=True)}
    values = [measurement.values.get(name, math.nan) for name in objectives]
    if measurement.valid and not all(map(math.isfinite, values)):
        raise ValueError(f"a valid measurement needs finite {', '.join(objectives)}, got {values}")
    distributions: dict[str, BaseDistribution] = {slot: CategoricalDistribution(tuple(choices))
                                                  for slot, choices in slots.items()}
    return optuna.create_trial(
        state=TrialState.COMPLETE if measurement.valid else TrialState.FAIL,
        values=values if measurement.valid else None, params=labels, distributions=distributions,
        user_attrs={"genotype": format_genotype(measurement.genotype), "engine": engine, "note": measurement.note,
                    "psnr_db": _to_json(measurement.psnr_db),
                    "values": dict(zip(measurement.values, _to_json(measurement.values.values()), strict=True))})


def from_stored(state: TrialState, stored: Mapping[str, Any]) -> Measurement:
    """The measurement behind a trial's state and attributes."""
    return Measurement(genotype=read_genotype(stored["genotype"]),
                       values={name: float(value) for name, value in stored["values"].items()},
                       psnr_db=tuple(float(value) for value in stored["psnr_db"]),
                       valid=state == TrialState.COMPLETE, note=stored["note"])


def read_genotype(text: str) -> Genotype:
    """`0-2-1` as numbers."""
    return tuple(int(index) for index in text.split("-"))


def read_tuned(stored: Mapping[str, Any]) -> dict[Genotype, tuple[Tuned, ...]]:
    """Results stored as `genotype:recipe`, by genotype: highest mean PSNR first, equal ones by their recipe's name."""
    found: dict[Genotype, list[Tuned]] = {}
    for key, result in stored.items():
        genotype, _, recipe = key.partition(":")
        found.setdefault(read_genotype(genotype), []).append(Tuned(recipe, tuple(result["psnr_db"]), result["report"]))
    return {genotype: tuple(sorted(results, key=lambda result: (-result.mean_db, result.recipe)))
            for genotype, results in found.items()}


def to_baseline(baseline: Baseline) -> dict[str, Any]:
    """A baseline as JSON values."""
    return {"teacher_psnr_db": _to_json(baseline.teacher_psnr_db), "input_psnr_db": _to_json(baseline.input_psnr_db),
            "values": dict(zip(baseline.values, _to_json(baseline.values.values()), strict=True))}


def from_baseline(stored: Mapping[str, Any]) -> Baseline:
    """Inverse of to_baseline."""
    return Baseline(tuple(map(float, stored["teacher_psnr_db"])), tuple(map(float, stored["input_psnr_db"])),
                    {name: float(value) for name, value in stored["values"].items()})


def _to_json(numbers: Iterable[float]) -> list[float | str]:
    """NaN and infinities as text: they are not JSON, and the dashboard's parser would reject the whole study."""
    return [float(number) if math.isfinite(number) else str(float(number)) for number in numbers]
