"""What the archive holds, as JSON values and back: spaces, measurements, baselines and fine-tuned results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ens.objectives import find_objectives
from ens.pareto.baseline import REPORT_KEYS, Baseline, Tuned
from ens.space import Genotype, Measurement, SearchSpace, Slot, format_genotype, parse_choice, parse_genotype


class _Record(BaseModel):
    """A JSON value of an archive, checked when it is read: NaN and infinities are text there."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Penalty(_Record):
    teacher: float
    per_block: float
    transformers: tuple[str, ...]


class _Manifest(_Record):
    space: str
    slot_order: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]
    penalty: _Penalty
    objectives: tuple[str, ...]

    @model_validator(mode="after")
    def _check_names(self) -> _Manifest:
        find_objectives(self.objectives)
        if sorted(self.slot_order) != sorted(self.slots) or not self.slots:
            raise ValueError("slots and slot_order name different slots")
        self.to_space()
        return self

    def to_space(self) -> SearchSpace:
        slots = []
        for name in self.slot_order:
            own, *others = map(parse_choice, self.slots[name])
            slots.append(Slot(name, (dataclasses.replace(own, teacher=True), *others)))
        return SearchSpace(self.space, tuple(slots), self.penalty.teacher, self.penalty.per_block,
                           self.penalty.transformers)


class _Measured(_Record):
    genotype: str
    values: dict[str, float]
    psnr_db: tuple[float, ...]
    note: str


class _Baseline(_Record):
    teacher_psnr_db: tuple[float, ...]
    input_psnr_db: tuple[float, ...]
    values: dict[str, float]


class _Tuned(_Record):
    psnr_db: tuple[float, ...]
    report: dict[str, float]


def check_manifest(manifest: object) -> None:
    """Raises ValueError, with key and reason, for what is not the manifest of an archive."""
    try:
        _Manifest.model_validate(manifest)
    except (ValidationError, ValueError, IndexError) as error:
        raise ValueError(f"its manifest is damaged ({explain(error)})") from None


def space_manifest(space: SearchSpace) -> dict[str, Any]:
    """What a manifest keeps of a space: its name, slots, choice labels and prices."""
    return {"space": space.name, "slot_order": [slot.name for slot in space.slots],
            "slots": {slot.name: [choice.label for choice in slot.choices] for slot in space.slots},
            "penalty": {"teacher": space.penalty_teacher, "per_block": space.penalty_per_block,
                        "transformers": list(space.transformers)}}


def read_space(manifest: Mapping[str, Any]) -> SearchSpace:
    """Inverse of space_manifest."""
    return _Manifest.model_validate(manifest).to_space()


def to_trial(measurement: Measurement, *, slots: Mapping[str, Sequence[str]], objectives: Sequence[str],
              engine: str, worker: str) -> FrozenTrial:
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
        user_attrs={"genotype": format_genotype(measurement.genotype), "engine": engine, "worker": worker,
                    "note": measurement.note, "psnr_db": to_json(measurement.psnr_db),
                    "values": dict(zip(measurement.values, to_json(measurement.values.values()), strict=True))})


def from_stored(state: TrialState, stored: Mapping[str, Any], *, space: SearchSpace,
                objectives: Sequence[str]) -> Measurement:
    """The measurement behind a trial's state and attributes; raises ValueError for what none can have."""
    try:
        read = _Measured.model_validate(stored)
        found = Measurement(parse_genotype(read.genotype, space), read.values, read.psnr_db,
                            state == TrialState.COMPLETE, read.note)
        if found.valid and not all(math.isfinite(found.values.get(name, math.nan)) for name in objectives):
            raise ValueError(f"{', '.join(objectives)} are not all there")
    except ValueError as error:
        raise ValueError(f"a measurement is damaged ({explain(error)})") from None
    return found


def read_genotype(text: str) -> Genotype:
    """`0-2-1` as numbers."""
    return tuple(int(index) for index in text.split("-"))


def read_tuned(stored: Mapping[str, Any]) -> dict[Genotype, tuple[Tuned, ...]]:
    """Results stored as `genotype:recipe`, by genotype: highest mean PSNR first, equal ones by their recipe's name."""
    found: dict[Genotype, list[Tuned]] = {}
    for key, result in stored.items():
        genotype, _, recipe = key.partition(":")
        try:
            read = _Tuned.model_validate(result)
            report = {name: read.report[name] for name in REPORT_KEYS if name in read.report}
            found.setdefault(read_genotype(genotype), []).append(Tuned(recipe, read.psnr_db, report))
        except ValueError as error:
            raise ValueError(f"a fine-tuned result is damaged ({explain(error)})") from None
    return {genotype: tuple(sorted(results, key=lambda result: (-result.mean_db, result.recipe)))
            for genotype, results in found.items()}


def to_baseline(baseline: Baseline) -> dict[str, Any]:
    """A baseline as JSON values."""
    return {"teacher_psnr_db": to_json(baseline.teacher_psnr_db), "input_psnr_db": to_json(baseline.input_psnr_db),
            "values": dict(zip(baseline.values, to_json(baseline.values.values()), strict=True))}


def from_baseline(stored: object) -> Baseline:
    """Inverse of to_baseline; raises ValueError for what is none."""
    try:
        read = _Baseline.model_validate(stored)
    except ValidationError as error:
        raise ValueError(f"its baseline is damaged ({explain(error)})") from None
    return Baseline(read.teacher_psnr_db, read.input_psnr_db, read.values)


def explain(error: Exception) -> str:
    """The first mistake that a schema found, with its place, or the error's own words."""
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def to_json(numbers: Iterable[float]) -> list[float | str]:
    """NaN and infinities as text: they are not JSON, and the dashboard's parser would reject the whole study."""
    return [float(number) if math.isfinite(number) else str(float(number)) for number in numbers]
