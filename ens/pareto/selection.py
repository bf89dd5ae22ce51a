"""From measurements to the front that a person chooses from: its members, the knee, the nearest, the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ens.pareto.front import cheapest_within, knee, nearest, non_dominated
from ens.space import Genotype, Measurement, SearchSpace, format_genotype, parse_genotype


@dataclass(frozen=True)
class Front:
    """The non-dominated measurements, first objective rising; `knee` and `nearest` are indices into `members`."""

    objectives: tuple[str, ...]
    members: tuple[Measurement, ...]
    knee: int
    nearest: tuple[int, ...]

    @property
    def values(self) -> np.ndarray:
        """Objectives of the members, (members, objectives)."""
        return measured_values(self.members, self.objectives)

    def role(self, index: int) -> str:
        """`knee`, `near 1` to `near 5` (nearest to the knee first), or an empty text."""
        if index == self.knee:
            return "knee"
        return f"near {self.nearest.index(index) + 1}" if index in self.nearest else ""


def measured_values(measurements: Sequence[Measurement], objectives: Sequence[str]) -> np.ndarray:
    """Objectives of valid measurements, (measurements, objectives); raises KeyError where one is missing."""
    return np.array([[measurement.values[name] for name in objectives] for measurement in measurements],
                    dtype=np.float64).reshape(len(measurements), len(objectives))


def select_front(measurements: Sequence[Measurement], objectives: Sequence[str]) -> Front:
    """Front of the valid measurements; raises ValueError when there is none."""
    valid = [measurement for measurement in measurements if measurement.valid]
    if not valid:
        raise ValueError(f"none of the {len(measurements)} measurements is valid, so there is no front")
    mask = non_dominated(measured_values(valid, objectives))
    members = [measurement for measurement, keep in zip(valid, mask, strict=True) if keep]
    members.sort(key=lambda member: (*(member.values[name] for name in objectives), member.genotype))
    values = measured_values(members, objectives)
    middle = knee(values)
    return Front(tuple(objectives), tuple(members), middle, tuple(nearest(values, middle)))


def pick_genotype(pick: str, *, front: Front, space: SearchSpace) -> Genotype:
    """Genotype meant by `knee`, `near 1`…, `within 0.1` (dB) or by itself (`0-2-1`); raises ValueError."""
    roles = {front.role(index): member.genotype for index, member in enumerate(front.members)}
    if pick in roles and pick:
        return roles[pick]
    word, _, number = pick.partition(" ")
    if word == "within":
        try:
            limit = float(number)
        except ValueError:
            raise ValueError(f"{pick!r} is not understood; write for instance within 0.1") from None
        return cheapest_member(front, limit).genotype
    if word == "near" and number.isdigit():
        raise ValueError(f"this front has no {pick!r}; it has {', '.join(role for role in sorted(roles) if role)}")
    if not pick[:1].isdigit():
        raise ValueError(f"{pick!r} is not understood; write knee, near 1, within 0.1 or a genotype "
                         f"such as {format_genotype(space.teacher)}")
    return parse_genotype(pick, space)


def cheapest_member(front: Front, limit: float) -> Measurement:
    """The member of least cost (first objective that is no PSNR drop) whose PSNR drop is at most `limit` dB."""
    if "psnr_drop_db" not in front.objectives:
        raise ValueError(f"within needs the objective psnr_drop_db; this run has {', '.join(front.objectives)}")
    drop = front.values[:, front.objectives.index("psnr_drop_db")]
    cost = front.values[:, next(index for index, name in enumerate(front.objectives) if name != "psnr_drop_db")]
    return front.members[cheapest_within(drop, cost, limit)]


def front_table(front: Front, *, space: SearchSpace) -> pd.DataFrame:
    """One row a member: role, genotype, objectives, the other values, mean PSNR in dB, and the label in every slot."""
    rows = []
    for index, member in enumerate(front.members):
        labels = {slot.name: choice.label
                  for slot, choice in zip(space.slots, space.choices(member.genotype), strict=True)}
        others = {name: value for name, value in member.values.items() if name not in front.objectives}
        rows.append({"role": front.role(index), "genotype": format_genotype(member.genotype),
                     **{name: member.values[name] for name in front.objectives}, **others,
                     "psnr_db": float(np.mean(member.psnr_db)) if member.psnr_db else others.get("psnr_db"), **labels})
    return pd.DataFrame(rows)
