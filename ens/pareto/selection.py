"""From measurements to the front that a person chooses from: its members, the knee, the nearest, the cheapest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ens.objectives import (
    LATENCY,
    QUALITY,
    Objective,
    find_objective,
    find_objectives,
    format_value,
    list_objectives,
    objective_values,
    psnr_drop_db,
    psnr_drop_se_db,
    read_quantity,
)
from ens.pareto.baseline import Baseline
from ens.pareto.front import cheapest_within, knee, nearest, non_dominated
from ens.space import Genotype, Measurement, SearchSpace, format_genotype, parse_genotype


@dataclass(frozen=True, repr=False)
class Front:
    """The non-dominated ones of the valid measurements `measured`, first objective rising; `knee` and `nearest` are
    indices into `members`. `teacher` holds the teacher's own values by objective name, as far as they are known,
    `meters` what an objective's values were counted or timed on.
    """

    objectives: tuple[str, ...]
    members: tuple[Measurement, ...]
    knee: int
    nearest: tuple[int, ...]
    baseline: Baseline | None
    teacher: Mapping[str, float]
    measured: tuple[Measurement, ...]
    meters: Mapping[str, str]

    def __repr__(self) -> str:
        knee = format_genotype(self.members[self.knee].genotype)
        return f"<Front of {self.caption}: {len(self.members)} of {len(self.measured)} valid ones, knee {knee}>"

    @property
    def values(self) -> np.ndarray:
        """Objectives of the members, (members, objectives)."""
        return objective_values(self.members, self.objectives)

    @property
    def caption(self) -> str:
        """What is drawn against what, in people's words."""
        return " against ".join(map(self.label, self.objectives))

    def label(self, name: str) -> str:
        """What people read over the values of an objective, with the size of the image that they refer to."""
        label, size = find_objective(name).label, re.search(r"(\d+)[x×](\d+)", self.meters.get(name, ""))
        return f"{label} at {size[1]}×{size[2]}" if size and "×" not in label else label

    def describe(self, index: int) -> str:
        """A member in a few words: role, genotype, and its first cost."""
        member = self.members[index]
        costs = [name for name in self.objectives if name != QUALITY][:1]
        words = [self.role(index), format_genotype(member.genotype),
                 *(f"{find_objective(name).label}: {format_value(name, member.values[name])}" for name in costs)]
        return ", ".join(filter(None, words))

    @property
    def reference(self) -> tuple[float, ...] | None:
        """Fixed reference point of the hypervolume, in the order of the objectives; None without a teacher's values."""
        limits = _limits(self.objectives, self.teacher)
        return tuple(limits) if np.isfinite(limits).all() else None

    def role(self, index: int) -> str:
        """`knee`, `near 1` to `near 5` (nearest to the knee first), or an empty text; no role below the input."""
        if self.below_input(index):
            return ""
        if index == self.knee:
            return "knee"
        return f"near {self.nearest.index(index) + 1}" if index in self.nearest else ""

    def below_input(self, index: int) -> bool:
        """Whether a member is worse than leaving the image as it is: mean PSNR, fine-tuned where it has been."""
        return is_below_input(self.members[index], self.baseline)

    def above_teacher(self, index: int) -> tuple[str, ...]:
        """Costs (macs, params…) of which a member has more than the teacher."""
        return exceeded_costs(self.members[index], self.teacher)

    def same_as_next(self, index: int) -> bool:
        """Whether a member's PSNR cannot be told from that of the next one: their mean difference over the images is
        within two of its paired standard errors. Unknown, so False, with fewer than two images.
        """
        if index + 1 >= len(self.members):
            return False
        one, next_one = (self.members[number].psnr_db for number in (index, index + 1))
        if len(one) != len(next_one) or len(one) < 2:
            return False
        difference = psnr_drop_db(teacher_psnr_db=one, psnr_db=next_one)
        return abs(difference) <= 2 * psnr_drop_se_db(teacher_psnr_db=one, psnr_db=next_one)


def is_below_input(measurement: Measurement, baseline: Baseline | None) -> bool:
    """Whether a measurement's mean PSNR, fine-tuned where it has been, is below that of the degraded input."""
    psnr_db = measurement.psnr_db_tuned or measurement.psnr_db
    if baseline is None or not baseline.input_psnr_db or not psnr_db:
        return False
    return psnr_drop_db(teacher_psnr_db=baseline.input_psnr_db, psnr_db=psnr_db) > 0


def exceeded_costs(measurement: Measurement, teacher: Mapping[str, float]) -> tuple[str, ...]:
    """Costs of which a measurement has more than the teacher, whose values are given by name."""
    return tuple(objective.name for objective in list_objectives(teacher) if objective.relative
                 and measurement.values.get(objective.name, 0.0) > teacher[objective.name])


def known_objectives(measurements: Sequence[Measurement]) -> tuple[Objective, ...]:
    """The objectives that every valid measurement holds, in the order of `OBJECTIVES`."""
    valid = [item for item in measurements if item.valid]
    return tuple(objective for objective in list_objectives(valid[0].values if valid else ())
                 if all(objective.name in item.values for item in valid))


def check_any_valid(measurements: Sequence[Measurement]) -> None:
    """Raises ValueError, with the reason of the first, where every genotype that was measured is invalid."""
    if not any(item.valid for item in measurements):
        reason = "".join(f": {format_genotype(one.genotype)} has “{one.note}”" for one in measurements[:1])
        raise ValueError(f"none of the {len(measurements)} measurements is valid, so there is no front{reason}")


def select_front(measurements: Sequence[Measurement], objectives: Sequence[str], *, baseline: Baseline | None = None,
                 meters: Mapping[str, str] | None = None) -> Front:
    """Front of the valid measurements in any two or three objectives that they hold, with its knee.

    The knee is the member nearest to the ideal corner (`front.knee`), every objective scaled to 0..1 over that part of
    the front which lies within the fixed reference point of `OBJECTIVES` (6 dB below the teacher, 1.1 times its
    costs) and, where `baseline` knows the input, not below it: between the teacher and the cheapest such member, so
    that one extreme hybrid does not move it. The teacher itself is it only where nothing else is left. `nearest` are
    the five of the same members nearest to it, on the same scale.

    Raises ValueError when no measurement is valid, or for an objective that does not exist or was not measured.
    """
    find_objectives(objectives)
    check_any_valid(measurements)
    valid = [measurement for measurement in measurements if measurement.valid]
    count = max(len(measurement.psnr_db) for measurement in valid)
    valid = [measurement for measurement in valid if len(measurement.psnr_db) == count]  # others lost a race
    _check_measured(valid, objectives)
    teacher = baseline.values if baseline is not None else _own_values(valid)
    mask = non_dominated(objective_values(valid, objectives))
    members = [measurement for measurement, keep in zip(valid, mask, strict=True) if keep]
    members.sort(key=lambda member: (*(member.values[name] for name in objectives), member.genotype))
    middle, near = _find_knee(members, objectives, teacher=teacher, baseline=baseline)
    return Front(tuple(objectives), tuple(members), middle, near, baseline, teacher, tuple(valid), meters or {})


def _find_knee(members: Sequence[Measurement], objectives: Sequence[str], *, teacher: Mapping[str, float],
               baseline: Baseline | None) -> tuple[int, tuple[int, ...]]:
    """Indices of the knee and of the five nearest to it, as select_front says."""
    values = objective_values(members, objectives)
    pool = list_usable(members, objectives, teacher=teacher, baseline=baseline)
    others = np.array([any(members[int(index)].genotype) for index in pool])
    middle = knee(values[pool], others if others.any() else None)
    near = [index for index in nearest(values[pool], middle, k=len(pool)) if others[index]][:5]
    return int(pool[middle]), tuple(int(pool[index]) for index in near)


def list_usable(members: Sequence[Measurement], objectives: Sequence[str], *, teacher: Mapping[str, float],
                baseline: Baseline | None) -> np.ndarray:
    """Indices of the members above the degraded input and within the reference point, as far as there are any."""
    pool = np.arange(len(members))
    above: np.ndarray = np.array([not is_below_input(member, baseline) for member in members])
    limits = np.asarray(_limits(objectives, teacher))
    within: np.ndarray = np.all(objective_values(members, objectives) <= limits, axis=1)
    for mask in (above, within):
        pool = pool[mask[pool]] if mask[pool].any() else pool
    return pool


def _limits(objectives: Sequence[str], teacher: Mapping[str, float]) -> list[float]:
    """Reference of every objective; infinite where it is relative to a value of the teacher that is not known."""
    return [objective.reference * (teacher.get(objective.name, math.inf) if objective.relative else 1.0)
            for objective in find_objectives(objectives)]


def _own_values(measurements: Sequence[Measurement]) -> Mapping[str, float]:
    """Values of the all-teacher genotype where it was measured, else none."""
    return next((item.values for item in measurements if not any(item.genotype)), {})


def _check_measured(measurements: Sequence[Measurement], objectives: Sequence[str]) -> None:
    for name in objectives:
        lacking = [item for item in measurements if name not in item.values]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(measurements)} measurements have no {name}, for instance "
                f"{format_genotype(lacking[0].genotype)}; all have "
                f"{', '.join(objective.name for objective in known_objectives(measurements)) or 'no objective'}")


PICKS = ("knee, near 1 to near 5, within 0.1 (dB; least of the first cost), fastest-within=0.1 (dB; least latency_ms), "
         "best-under=latency_ms:120 (least drop) or a genotype such as 0-2-1")


def check_pick(pick: str, space: SearchSpace) -> None:
    """Raises ValueError for a pick that no front could understand: known before there is one."""
    if pick[:1].isdigit():
        parse_genotype(pick, space)
    elif not _read_pick(pick) and pick not in ("knee", *(f"near {rank}" for rank in range(1, 6))):
        raise ValueError(f"{pick!r} is not understood; write {PICKS}")


def _read_pick(pick: str) -> tuple[str, str, float] | None:
    """Kind, objective and bound of `within 0.1`, `fastest-within=0.1`, `best-under=latency_ms:120`; None for others."""
    match = re.fullmatch(r"(within|fastest-within|best-under)[ =](?:([a-z_]+(?:@[\w.-]+)?):)?(.+)", pick)
    if match is None or bool(match[2]) != (match[1] == "best-under"):
        return None
    name = match[2] or (LATENCY if match[1] == "fastest-within" else "")
    if name:
        find_objective(name)
    try:
        return match[1], name, read_quantity(match[3])
    except ValueError:
        raise ValueError(f"{pick!r} is not understood; write for instance within 0.1 or best-under=latency_ms:120"
                         ) from None


def pick_objectives(pick: str, searched: Sequence[str]) -> tuple[str, ...]:
    """The objectives of the front that a pick looks at; none where it is the search's own. `fastest-within` looks at
    the milliseconds that were `searched`, of whichever device, else at this machine's.
    """
    found = _read_pick(pick)
    if not found or not found[1]:
        return ()
    timed = [name for name in searched if name.partition("@")[0] == LATENCY]
    return ("psnr_drop_db", timed[0] if found[0] == "fastest-within" and timed else found[1])


def pick_genotype(pick: str, *, front: Front, space: SearchSpace) -> Genotype:
    """Genotype meant by one of `PICKS`; raises ValueError. `front` is that of `pick_objectives`.

    Only a genotype written out may be below the degraded input.
    """
    check_pick(pick, space)
    if pick[:1].isdigit():
        return parse_genotype(pick, space)
    _check_above_input(front)
    if found := _read_pick(pick):
        kind, name, bound = found
        return (best_member(front, name, bound) if kind == "best-under" else cheapest_member(front, bound)).genotype
    roles = {front.role(index): member.genotype for index, member in enumerate(front.members)}
    if pick not in roles:
        raise ValueError(f"this front has no {pick!r}; it has {', '.join(role for role in sorted(roles) if role)}")
    return roles[pick]


def keep_within(measurements: Sequence[Measurement], bounds: Mapping[str, float]) -> list[Measurement]:
    """Measurements without the valid ones that exceed a bound; raises ValueError where every valid one does, or where
    one has no value of a bounded objective.
    """
    _check_measured([one for one in measurements if one.valid], tuple(bounds))
    kept = [one for one in measurements
            if not one.valid or all(one.values[name] <= bound for name, bound in bounds.items())]
    if bounds and any(one.valid for one in measurements) and not any(one.valid for one in kept):
        least = {name: min(one.values[name] for one in measurements if one.valid) for name in bounds}
        raise ValueError("no genotype that was measured keeps within " + ", ".join(
            f"{name} {format_value(name, bound)} (least: {format_value(name, least[name])})"
            for name, bound in bounds.items()))
    return kept


def nearest_members(front: Front, genotype: Genotype, *, count: int) -> list[Genotype]:
    """A genotype and the members nearest to it, `count` in all, fewer where the front has fewer.

    Objectives are scaled as for the knee; members below the degraded input and the teacher itself are no neighbours.
    A genotype that is not on the front has none.
    """
    names = [member.genotype for member in front.members]
    if genotype not in names or count == 1:
        return [genotype]
    order = nearest(front.values, names.index(genotype), k=len(names))
    return [genotype, *(names[index] for index in order if any(names[index]) and not front.below_input(index))][:count]


def diverse_members(front: Front, *, count: int) -> list[tuple[Genotype, int]]:
    """Up to `count` members, the knee first, then always the one that differs from those before in most slots, and in
    how many at least (0 for the knee). Members below the degraded input and the teacher itself are left out.
    """
    knee = front.members[front.knee].genotype
    others = [member.genotype for index, member in enumerate(front.members)
              if index != front.knee and any(member.genotype) and not front.below_input(index)]
    found = [(knee, 0)]
    while others and len(found) < count:
        distances = [min(sum(a != b for a, b in zip(one, other, strict=True)) for other, _ in found) for one in others]
        best = max(range(len(others)), key=distances.__getitem__)
        found.append((others.pop(best), distances[best]))
    return found


def cheapest_member(front: Front, limit: float) -> Measurement:
    """The member of least cost (first objective that is no PSNR drop) whose PSNR drop before fine-tuning is at most
    `limit` dB, and which is not below the degraded input.
    """
    if "psnr_drop_db" not in front.objectives:
        raise ValueError(f"within needs the objective psnr_drop_db; this run has {', '.join(front.objectives)}")
    _check_above_input(front)
    members = [member for index, member in enumerate(front.members) if not front.below_input(index)]
    values = objective_values(members, front.objectives)
    drop = values[:, front.objectives.index("psnr_drop_db")]
    cost = values[:, next(index for index, name in enumerate(front.objectives) if name != "psnr_drop_db")]
    return members[cheapest_within(drop, cost, limit)]


def best_member(front: Front, objective: str, bound: float) -> Measurement:
    """The member of least PSNR drop before fine-tuning whose value of `objective` is at most `bound`, and which is not
    below the degraded input; raises ValueError where there is none.
    """
    members = [member for index, member in enumerate(front.members)
               if member.values[objective] <= bound and not front.below_input(index)]
    if not members:
        least = min(member.values[objective] for member in front.members)
        raise ValueError(f"no member of the front has {objective} of at most {format_value(objective, bound)}; the "
                         f"least is {format_value(objective, least)}")
    return min(members, key=lambda member: (member.values["psnr_drop_db"], member.values[objective]))


def _check_above_input(front: Front) -> None:
    if all(front.below_input(index) for index in range(len(front.members))):
        assert front.baseline is not None and front.baseline.input_mean_db is not None
        raise ValueError(
            f"every member of the front is below the degraded input ({front.baseline.input_mean_db:.2f} dB; the "
            f"teacher reaches {front.baseline.teacher_mean_db:.2f} dB), so none is picked; use a better teacher, or "
            "write a genotype out to have it all the same")
