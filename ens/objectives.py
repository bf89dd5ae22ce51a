"""Named objectives, every one minimised; the sign of PSNR changes here and nowhere else.

To add one: an entry of `OBJECTIVES`, a meter in `ens/evaluate/meters.py`, and a test.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from ens.space import Measurement, suggest


def _format_db(value: float) -> str:
    return f"{value:.3f}"


def _format_plain(value: float) -> str:
    return f"{value:.4g}"


def _format_si(value: float) -> str:
    """Three digits and a letter: `1.23 G`."""
    for scale, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            scaled = abs(value) / scale
            return f"{value / scale:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{value:g}"


def _format_bytes(value: float) -> str:
    """`24.6 MB`."""
    text = _format_si(value)
    return f"{text}B" if " " in text else f"{text} B"


@dataclass(frozen=True)
class Objective:
    """A quantity to minimise, under the key `name` of Measurement.values.

    `label` is what people read on an axis or over a column, its unit included; `format` writes one value for them.
    `reference` is this objective's coordinate of the hypervolume reference point, as a multiple of the teacher's value
    where `relative` is True. It is fixed so that hypervolumes of two runs compare. `si` says that values span powers
    of ten, so axes count in k, M and G.
    """

    name: str
    label: str
    reference: float
    relative: bool
    format: Callable[[float], str]
    si: bool = False


QUALITY = "psnr_drop_db"
"""What is measured on images; every other objective is known without."""
LATENCY = "latency_ms"
"""Milliseconds by a latency table; `latency_ms@NAME` by the one of that name."""
OBJECTIVES: dict[str, Objective] = {
    "psnr_drop_db": Objective("psnr_drop_db", "PSNR drop (dB)", 6.0, False, _format_db),
    "penalty": Objective("penalty", "transformer usage penalty", 1.1, True, _format_plain),
    "macs": Objective("macs", "multiply-adds at 256×256", 1.1, True, _format_si, si=True),
    "params": Objective("params", "parameters", 1.1, True, _format_si, si=True),
    "peak_bytes": Objective("peak_bytes", "peak activation memory (bytes)", 1.1, True, _format_bytes, si=True),
    LATENCY: Objective(LATENCY, "latency (ms)", 1.1, True, _format_plain),
}


def table_of(name: str) -> str:
    """`phone` of `latency_ms@phone`, the same objective on another latency table; "" of any other name."""
    return name.partition("@")[2]


def find_objective(name: str) -> Objective:
    """One objective by name; raises ValueError with the names that exist."""
    base, _, table = name.partition("@")
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if base == LATENCY and table:
        return replace(OBJECTIVES[LATENCY], name=name, label=f"latency (ms, {table})")
    raise ValueError(f"objective {name!r} does not exist{suggest(name, OBJECTIVES)}; choose from "
                     f"{', '.join(OBJECTIVES)}")


def find_objectives(names: Sequence[str]) -> tuple[Objective, ...]:
    """Look two or three different objectives up by name; raises ValueError with the names that exist."""
    found = tuple(map(find_objective, names))
    if len(names) not in (2, 3) or len(set(names)) != len(names):
        raise ValueError(f"a front needs two or three different objectives, got {', '.join(names) or 'none'}")
    return found


def list_objectives(names: Iterable[str]) -> tuple[Objective, ...]:
    """The objectives among the names of values, in the order of `OBJECTIVES`; other names are passed over."""
    found = []
    for name in dict.fromkeys(names):
        with suppress(ValueError):
            found.append(find_objective(name))
    order = list(OBJECTIVES)
    return tuple(sorted(found, key=lambda objective: order.index(objective.name.partition("@")[0])))


def format_value(name: str, value: float) -> str:
    """A value of the named objective as people read it, `1.23 G` for multiply-adds; other names as dB or plain."""
    with suppress(ValueError):
        return find_objective(name).format(value)
    return _format_db(value) if name.endswith("_db") else _format_plain(value)


def read_quantity(text: str) -> float:
    """`120`, `200M`, `1.5 G` as a number; raises ValueError for what is none, or not finite."""
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1.0)
    try:
        value = float(text.rstrip("kMG").strip()) * scale
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number; write for instance 0.1, 120 or 200M")
    return value


def label_value(name: str) -> str:
    """What people read over a value of this name, its unit included."""
    with suppress(ValueError):
        return find_objective(name).label
    return name.replace("_", " ")


def mean_psnr_db(psnr_db: Sequence[float]) -> float:
    """Mean PSNR over images, dB; infinite only where every image is.

    An image that is restored perfectly (infinite) is left out: it would hide all others. `count_perfect` says how many.
    """
    finite = [value for value in psnr_db if value != math.inf]
    return statistics.fmean(finite or psnr_db)


def count_perfect(*psnr_db: Sequence[float]) -> int:
    """Number of images that one of the given sequences (a PSNR an image, or none at all) has restored perfectly."""
    return sum(math.inf in values for values in zip(*filter(None, psnr_db), strict=True))


def psnr_drop_db(*, teacher_psnr_db: Sequence[float], psnr_db: Sequence[float]) -> float:
    """Mean PSNR of the teacher minus that of the hybrid over the same images, dB; below zero: better than the teacher.

    Images that either restores perfectly are left out; NaN when there is no other, or any PSNR is NaN or −infinite.
    Raises ValueError when the numbers of images differ or are zero.
    """
    drops = _paired_drops(teacher_psnr_db, psnr_db)
    drop = float(drops.mean()) if len(drops) else math.nan
    return drop if math.isfinite(drop) else math.nan


def psnr_drop_se_db(*, teacher_psnr_db: Sequence[float], psnr_db: Sequence[float]) -> float:
    """Paired standard error of `psnr_drop_db` over the images: s / √n of the per-image drops, dB; 0 for one image.

    Pairing matters: images differ by many dB, the drops on them by tenths.
    """
    drops = _paired_drops(teacher_psnr_db, psnr_db)
    return float(drops.std(ddof=1) / math.sqrt(len(drops))) if len(drops) > 1 else 0.0


def _paired_drops(teacher_psnr_db: Sequence[float], psnr_db: Sequence[float]) -> np.ndarray:
    if len(teacher_psnr_db) != len(psnr_db) or not psnr_db:
        raise ValueError(f"the teacher has {len(teacher_psnr_db)} PSNRs and the hybrid {len(psnr_db)}; "
                         "both need one for every validation image")
    pairs = np.asarray([teacher_psnr_db, psnr_db], np.float64)
    teacher, hybrid = pairs[:, (pairs != np.inf).all(axis=0)]
    return np.asarray(teacher - hybrid)


def add_quality(measurement: Measurement, *, teacher_psnr_db: Sequence[float]) -> Measurement:
    """Add `psnr_drop_db` and its standard error `psnr_drop_se_db`; a drop that is not finite makes it invalid."""
    if not measurement.valid:
        return measurement
    drop = psnr_drop_db(teacher_psnr_db=teacher_psnr_db, psnr_db=measurement.psnr_db)
    if math.isnan(drop):
        return replace(measurement, valid=False, note="PSNR is not finite")
    error = psnr_drop_se_db(teacher_psnr_db=teacher_psnr_db, psnr_db=measurement.psnr_db)
    return replace(measurement, values={**measurement.values, "psnr_drop_db": drop, "psnr_drop_se_db": error})


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
