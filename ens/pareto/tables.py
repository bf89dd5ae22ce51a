"""A front as rows: with every digit for machines, and as people read it on the terminal, in Markdown and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ens.objectives import format_value, label_value, mean_psnr_db, psnr_drop_db
from ens.pareto.baseline import REPORT_KEYS, Tuned
from ens.pareto.selection import Front, known_objectives
from ens.space import Genotype, Measurement, SearchSpace, format_genotype

if TYPE_CHECKING:
    import pandas as pd

    from ens.pareto.archive import Archive

MORE, WORSE, SAME = "▲", "▼", "≈"
"""Marks behind a value: more than the teacher, below the degraded input, not told apart from the next line."""


def front_table(front: Front, *, space: SearchSpace) -> pd.DataFrame:
    """One row a member: role, genotype, objectives, every other value, mean PSNR in dB before and after fine-tuning,
    the drop after it, marks, and the label in every slot. Full precision; empty where there is none.
    """
    import pandas as pd  # half a second, for the file alone

    rows = []
    for index, member in enumerate(front.members):
        others = {name: value for name, value in member.values.items() if name not in front.objectives}
        rows.append({
            "role": front.role(index), "genotype": format_genotype(member.genotype),
            **{name: member.values[name] for name in front.objectives}, **others,
            "psnr_db": mean_psnr_db(member.psnr_db) if member.psnr_db else None,
            "psnr_db_tuned": mean_psnr_db(member.psnr_db_tuned) if member.psnr_db_tuned else None,
            "psnr_drop_db_tuned": tuned_drop_db(member, front), "below_input": front.below_input(index),
            "above_teacher": " ".join(front.above_teacher(index)), "same_as_next": front.same_as_next(index),
            **{slot.name: choice.label
               for slot, choice in zip(space.slots, space.choices(member.genotype), strict=True)}})
    return pd.DataFrame(rows)


def front_data(front: Front, *, archive: Archive) -> dict[str, Any]:
    """A front as JSON values at full precision: its members, what they are compared with, and what was fine-tuned."""
    space, baseline, every = archive.space, front.baseline, range(len(front.members))
    measured = archive.measurements()
    return {
        "study": archive.manifest.get("study", space.name), "objectives": list(front.objectives),
        "labels": {name: front.label(name) for name in front.objectives},
        "knee": format_genotype(front.members[front.knee].genotype), "measured": len(measured),
        "invalid": sum(not item.valid for item in measured), "teacher": dict(front.teacher),
        "teacher_psnr_db": baseline and baseline.teacher_mean_db, "input_psnr_db": baseline and baseline.input_mean_db,
        "members": [{
            "genotype": format_genotype(member.genotype), "role": front.role(index), "values": dict(member.values),
            "psnr_db": mean_psnr_db(member.psnr_db) if member.psnr_db else None,
            "psnr_db_tuned": mean_psnr_db(member.psnr_db_tuned) if member.psnr_db_tuned else None,
            "psnr_drop_db_tuned": tuned_drop_db(member, front), "below_input": front.below_input(index),
            "above_teacher": list(front.above_teacher(index)), "same_as_next": front.same_as_next(index),
            "choices": {slot.name: choice.label for slot, choice in
                        zip(space.slots, space.choices(member.genotype), strict=True)}}
            for index, member in zip(every, front.members, strict=True)],
        "tuned": [{"genotype": format_genotype(genotype), "psnr_db": result.mean_db,
                   "report_psnr_db": dict(result.report)} for genotype, result in archive.tuned.items()],
        "notes": front_notes(front)}


def tuned_drop_db(member: Measurement, front: Front) -> float | None:
    """PSNR drop of a member after fine-tuning, dB; None without one or without a baseline."""
    if front.baseline is None or not member.psnr_db_tuned:
        return None
    return psnr_drop_db(teacher_psnr_db=front.baseline.teacher_psnr_db, psnr_db=member.psnr_db_tuned)


def front_rows(front: Front, *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headers and one row of texts a member: role, genotype, objectives, what else was measured, PSNR.

    The drop stands with its standard error, `0.123 ± 0.011`; the marks are those that `front_notes` explains. `short`
    fits 80 columns: one other cost, and no PSNR where the drop says it.
    """
    others = [one.name for one in known_objectives(front.members) if one.name not in front.objectives]
    names = [*front.objectives, *(others[:1] if short else others)]
    columns = {"PSNR (dB) before fine-tuning": [_mean_text(member.psnr_db) for member in front.members],
               "PSNR (dB) fine-tuned": [_mean_text(member.psnr_db_tuned) for member in front.members]}
    if not any(member.psnr_db_tuned for member in front.members):
        del columns["PSNR (dB) fine-tuned"]
    if short and "psnr_drop_db" in names:
        columns = {}
    headers = ["", "genotype", *map(front.label, names), *columns]
    rows = []
    for index, member in enumerate(front.members):
        worse = f" {WORSE}" if front.below_input(index) else ""
        rows.append([front.role(index), format_genotype(member.genotype) + worse,
                     *(_value_text(front, index, name) for name in names),
                     *(texts[index] for texts in columns.values())])
    return headers, rows


def front_notes(front: Front) -> list[str]:
    """One sentence for every mark that occurs in the rows of a front, and the PSNRs to compare them with."""
    every, notes = range(len(front.members)), _list_meters(front)
    if front.baseline is not None:
        given = front.baseline.input_mean_db
        notes.append(f"Teacher {front.baseline.teacher_mean_db:.2f} dB"
                     + ("." if given is None else f", degraded input {given:.2f} dB."))
        notes += [front.baseline.left_out] if front.baseline.left_out else []
    if any(front.same_as_next(index) for index in every):
        notes.append(f"{SAME} its PSNR cannot be told from that of the next line: within two standard errors of the "
                     "paired difference.")
    if any(front.above_teacher(index) for index in every):
        notes.append(f"{MORE} more than the teacher has.")
    if any(front.below_input(index) for index in every):
        notes.append(f"{WORSE} below the degraded input; never picked.")
    return notes


def _list_meters(front: Front) -> list[str]:
    """A sentence on what an objective was taken on, where its name does not say all."""
    return [f"{label_value(name)}: {front.meters[name]}." for name in front.objectives
            if front.label(name) != label_value(name)]


def tuned_rows(tuned: Mapping[Genotype, Tuned]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of mean PSNR in dB on the report images, which chose nothing: degraded input, before and after
    fine-tuning, teacher. Without rows where no genotype has them.
    """
    return (["genotype", "degraded input (dB)", "before fine-tuning (dB)", "fine-tuned (dB)", "teacher (dB)"],
            [[format_genotype(genotype),
              *(f"{result.report[key]:.2f}" if key in result.report else "" for key in REPORT_KEYS)]
             for genotype, result in tuned.items() if result.report])


def drop_text(measurement: Measurement) -> str:
    """PSNR drop before fine-tuning with its standard error, dB: `0.123 ± 0.011`."""
    text = format_value("psnr_drop_db", measurement.values["psnr_drop_db"])
    error = measurement.values.get("psnr_drop_se_db")
    return text if error is None else f"{text} ± {format_value('psnr_drop_db', error)}"


def _value_text(front: Front, index: int, name: str) -> str:
    member = front.members[index]
    if name == "psnr_drop_db":
        return drop_text(member) + (f" {SAME}" if front.same_as_next(index) else "")
    return format_value(name, member.values[name]) + (f" {MORE}" if name in front.above_teacher(index) else "")


def _mean_text(psnr_db: tuple[float, ...]) -> str:
    return f"{mean_psnr_db(psnr_db):.2f}" if psnr_db else ""
