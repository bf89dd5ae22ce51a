"""A front on disk: CSV, Markdown, PNG and one HTML page that opens without a network."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ens.atomic import write_atomic
from ens.objectives import find_objective, format_value
from ens.pareto.archive import Archive
from ens.pareto.charts import draw_png, front_figure, hypervolume_figure
from ens.pareto.front import hypervolume
from ens.pareto.palette import choice_colours, text_colour
from ens.pareto.selection import Front, known_objectives, select_front
from ens.pareto.tables import front_notes, front_rows, front_table, member_facts, tuned_rows
from ens.space import SearchSpace, Slot, format_genotype

Crops = Mapping[str, Sequence[tuple[str, bytes]]]
"""Image name -> captions and PNG bytes in display order."""


def write_front(folder: Path, *, front: Front, archive: Archive, crops: Crops) -> None:
    """Write `front.csv`, `front.md`, `front.png`, and last `report.html`, which says what archive it shows."""
    title = f"{archive.manifest.get('study', archive.space.name)}: {front.caption}"
    write_atomic(folder / "front.csv", front_table(front, space=archive.space).to_csv(index=False).encode())
    write_atomic(folder / "front.md", _markdown(title, front, archive).encode())
    write_atomic(folder / "front.png", draw_png(title=title, measurements=archive.measurements(), front=front))
    write_atomic(folder / "report.html", draw_report(title, front=front, archive=archive, crops=crops).encode())


def drawn_fingerprint(path: Path) -> str:
    """Fingerprint of the archive that a report shows; "" where there is no report."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        match = re.search(r'<meta name="archive" content="([0-9a-f]+)">', file.read(2000))
    return match[1] if match else ""


def _markdown(title: str, front: Front, archive: Archive) -> str:
    """The front, what its marks mean, and the figures of report images, as Markdown."""
    lines = [f"# {title}", "", *_markdown_table(*front_rows(front)), "", *front_notes(front)]
    headers, rows = tuned_rows(archive.tuned)
    if rows:
        lines += ["", "On the report images, which chose nothing:", "", *_markdown_table(headers, rows)]
    return "\n".join(lines) + "\n"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (headers, ["---"] * len(headers), *rows)]


def draw_report(title: str, *, front: Front, archive: Archive, crops: Crops) -> str:
    """The offline HTML page: scatter over any two objectives, slot map, fine-tuned figures, crops, hypervolume."""
    environment = Environment(loader=PackageLoader("ens.pareto", "."), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    from plotly.offline import get_plotlyjs

    space, measurements, reference = archive.space, archive.measurements(), front.reference
    colours, headers = choice_colours(space), [find_objective(name).label for name in front.objectives]
    history = hypervolume_figure(measurements=measurements, front=front, reference=reference) if reference else "null"
    return environment.get_template("report.html.j2").render(
        title=title, fingerprint=archive.fingerprint, space=space, facts=_facts(archive, front), names=headers,
        members=_members(front, space=space), notes=front_notes(front), tuned=tuned_rows(archive.tuned),
        plotly_js=Markup(get_plotlyjs()), num_measured=len(measurements), format_genotype=format_genotype,
        invalid=[item for item in measurements if not item.valid],
        hypervolume=hypervolume(front.values, reference) if reference else None,
        reference=[format_value(name, value) for name, value in zip(front.objectives, reference or (), strict=False)],
        legend=_legend(space, colours), history=_inline(history),
        crops={name: [(caption, base64.b64encode(png).decode()) for caption, png in row]
               for name, row in crops.items()},
        state=_inline(json.dumps({
            "views": _views(front, archive), "levels": slot_levels(space),
            "slots": [{"name": slot.name, "choices": [
                {"label": choice.label, "fill": fill, "ink": text_colour(fill)}
                for choice, fill in zip(slot.choices, row, strict=True)]}
                for slot, row in zip(space.slots, colours, strict=True)]})))


def _views(front: Front, archive: Archive) -> list[dict[str, object]]:
    """The front that was asked for, then that of every other two objectives: figure, members and knee."""
    measurements, names = archive.measurements(), [one.name for one in known_objectives(archive.measurements())]
    others = [pair for pair in itertools.combinations(names, 2) if set(pair) != set(front.objectives)]
    fronts = [front, *(select_front(measurements, pair, baseline=archive.baseline) for pair in others)]
    return [{"label": view.caption, "members": _members(view, space=archive.space), "knee": view.knee,
             "figure": json.loads(front_figure(measurements=measurements, front=view, space=archive.space))}
            for view in fronts]


def _facts(archive: Archive, front: Front) -> dict[str, str]:
    """What stands under the title."""
    manifest, baseline = archive.manifest, archive.baseline
    shown = ("task", "protocol", "data", "engine", "seed")
    facts: dict[str, str] = {name: str(manifest[name]) for name in shown if name in manifest}
    if baseline is not None:
        facts["teacher"] = f"{baseline.teacher_mean_db:.2f} dB"
        if baseline.input_mean_db is not None:
            facts["degraded input"] = f"{baseline.input_mean_db:.2f} dB"
    return facts


def slot_levels(space: SearchSpace) -> list[int]:
    """Depth of every slot in the U of the drawing, 0 at full resolution.

    `…level2…` in a slot's name is depth 1; nameless slots between two of equal depth lie one deeper (the latent
    stage), others beside their neighbour (the refinement). Without such names the slots form a symmetrical U.
    """
    named = [int(match[1]) - 1 if (match := re.search(r"level(\d+)", slot.name)) else None for slot in space.slots]
    if all(level is None for level in named):
        return [min(index, len(named) - 1 - index) for index in range(len(named))]
    levels = []
    for index, level in enumerate(named):
        left = next((other for other in reversed(named[:index]) if other is not None), None)
        right = next((other for other in named[index:] if other is not None), None)
        if level is None:
            level = left + 1 if left is not None and left == right else left if left is not None else right
        assert level is not None, "some slot has a level"
        levels.append(level)
    return levels


def _members(front: Front, *, space: SearchSpace) -> list[dict[str, object]]:
    """What page and script show of every member of the front."""
    headers, rows = front_rows(front)
    labels = [find_objective(name).label for name in front.objectives]
    return [{"genotype": format_genotype(member.genotype), "indices": list(member.genotype),
             "labels": [_short_label(slot, choice) for slot, choice in zip(space.slots, member.genotype, strict=True)],
             "role": front.role(index), "objectives": [row[headers.index(label)] for label in labels],
             "values": member_facts(front, index)}
            for index, (member, row) in enumerate(zip(front.members, rows, strict=True))]


def _short_label(slot: Slot, index: int) -> str:
    """`vssd×1` for `vssd×1(state=16)`, unless another choice of the slot differs in its options only."""
    shorts = [choice.label.partition("(")[0] for choice in slot.choices]
    return shorts[index] if shorts.count(shorts[index]) == 1 else slot.choices[index].label


def _legend(space: SearchSpace, colours: Sequence[Sequence[str]]) -> dict[str, str]:
    """Family -> the colour of its deepest choice; the teacher first."""
    legend: dict[str, tuple[int, str]] = {}
    for slot, row in zip(space.slots, colours, strict=True):
        for choice, fill in zip(slot.choices, row, strict=True):
            name = f"{choice.family} (teacher)" if choice.teacher else choice.family
            if choice.depth >= legend.get(name, (0, ""))[0]:
                legend[name] = (choice.depth, fill)
    return {name: fill for name, (_, fill) in legend.items()}


def _inline(text: str) -> Markup:
    """JSON that may stand inside <script>: no character in it can close the element or open a comment."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
