"""Named objectives, every one minimised; the sign of PSNR changes here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ens.space import Measurement, SearchSpace


@dataclass(frozen=True)
class Objective:
    """A quantity to minimise, under the key `name` of Measurement.values.

    `reference` is this objective's coordinate of the hypervolume reference point: in `unit`, or as a multiple of the
    teacher's value where `relative` is True. It is fixed so that hypervolumes of two runs compare.
    """

    name: str
    unit: str
    description: str
    reference: float
    relative: bool


OBJECTIVES: dict[str, Objective] = {
    "psnr_drop_db": Objective("psnr_drop_db", "dB", "PSNR of the teacher minus PSNR of the hybrid", 6.0, False),
    "penalty": Objective("penalty", "", "transformer usage, the paper's price of each stage", 1.1, True),
    "macs": Objective("macs", "MACs", "multiply-adds of one image, scans included", 1.1, True),
    "params": Objective("params", "parameters", "parameters of the hybrid", 1.1, True),
}


def find_objectives(names: Sequence[str]) -> tuple[Objective, ...]:
    """Look two or three different objectives up by name; raises ValueError with the names that exist."""
    unknown = [name for name in names if name not in OBJECTIVES]
    if unknown:
        raise ValueError(f"objective {unknown[0]!r} does not exist; choose from {', '.join(OBJECTIVES)}")
    if len(names) not in (2, 3) or len(set(names)) != len(names):
        raise ValueError(f"a search needs two or three different objectives, got {', '.join(names) or 'none'}")
    return tuple(OBJECTIVES[name] for name in names)


def psnr_drop_db(*, teacher_psnr_db: Sequence[float], psnr_db: Sequence[float]) -> float:
    """Mean PSNR of the teacher minus that of the hybrid over the same images, dB; below zero: better than the teacher.

    NaN when any PSNR of the hybrid is not finite. Raises ValueError when the numbers of images differ or are zero.
    """
    if len(teacher_psnr_db) != len(psnr_db) or not psnr_db:
        raise ValueError(f"the teacher has {len(teacher_psnr_db)} PSNRs and the hybrid {len(psnr_db)}; "
                         "both need one for every validation image")
    drop = float(np.mean(teacher_psnr_db) - np.mean(psnr_db))
    return drop if math.isfinite(drop) else math.nan


def add_objectives(measurement: Measurement, *, space: SearchSpace, teacher_psnr_db: Sequence[float]) -> Measurement:
    """Add `psnr_drop_db` and `penalty` to what was measured and counted; a drop that is not finite makes it invalid."""
    values = {**measurement.values, "penalty": space.penalty(measurement.genotype)}
    if not measurement.valid:
        return replace(measurement, values={**values, "psnr_drop_db": math.nan})
    drop = psnr_drop_db(teacher_psnr_db=teacher_psnr_db, psnr_db=measurement.psnr_db)
    values["psnr_drop_db"] = drop
    if math.isnan(drop):
        return replace(measurement, values=values, valid=False, note="PSNR is not finite")
    return replace(measurement, values=values)


def objective_values(measurements: Sequence[Measurement], names: Sequence[str]) -> np.ndarray:
    """Values as an array (measurements, objectives), float64; the rows of invalid measurements are NaN.

    Raises KeyError where a valid measurement lacks an objective, ValueError where its value is not finite.
    """
    rows = np.full((len(measurements), len(names)), np.nan)
    for row, measurement in zip(rows, measurements, strict=True):
        if not measurement.valid:
            continue
        missing = [name for name in names if name not in measurement.values]
        if missing:
            raise KeyError(f"measurement {measurement.genotype} has no value of {missing[0]}; "
                           f"it has {', '.join(measurement.values)}")
        row[:] = [measurement.values[name] for name in names]
        if not np.isfinite(row).all():
            raise ValueError(f"measurement {measurement.genotype} is marked valid but its values are not finite: "
                             f"{dict(zip(names, row.tolist(), strict=True))}")
    return rows


def reference_point(names: Sequence[str], *, teacher_values: Sequence[float]) -> tuple[float, ...]:
    """Fixed hypervolume reference point of the named objectives, given the teacher's own values of them."""
    return tuple(objective.reference * value if objective.relative else objective.reference
                 for objective, value in zip(find_objectives(names), teacher_values, strict=True))
