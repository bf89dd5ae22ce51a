"""A front on disk: CSV, Markdown, PNG and one HTML page that opens without a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ens.atomic import write_atomic
from ens.objectives import format_value
from ens.pareto.charts import draw_png, front_figure, hypervolume_figure
from ens.pareto.front import hypervolume
from ens.pareto.palette import choice_colours, text_colour
from ens.pareto.selection import Front, front_table
from ens.space import Measurement, SearchSpace, Slot, format_genotype


def write_csv(path: Path, *, front: Front, space: SearchSpace) -> None:
    """The front as CSV, full precision, one row a member."""
    write_atomic(path, front_table(front, space=space).to_csv(index=False).encode())


def write_markdown(path: Path, *, title: str, front: Front) -> None:
    """The front as a Markdown table of role, genotype and objectives."""
    lines = [f"# {title}", "", "| | genotype | " + " | ".join(front.objectives) + " |",
             "|---|---|" + "---:|" * len(front.objectives)]
    for index, member in enumerate(front.members):
        values = " | ".join(format_value(name, member.values[name]) for name in front.objectives)
        lines.append(f"| {front.role(index)} | `{format_genotype(member.genotype)}` | {values} |")
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def write_png(path: Path, *, title: str, measurements: Sequence[Measurement], front: Front) -> None:
    """All measurements and the front as a PNG."""
    write_atomic(path, draw_png(title=title, measurements=measurements, front=front))


def write_report(path: Path, *, title: str, space: SearchSpace, measurements: Sequence[Measurement], front: Front,
                 reference: Sequence[float], facts: Mapping[str, str],
                 crops: Mapping[str, Sequence[tuple[str, bytes]]]) -> None:
    """The offline HTML page: scatter, slot map, hypervolume history and restored crops.

    `reference` is the fixed reference point of the hypervolume, in the order of front.objectives; `facts` are printed
    under the title (protocol, engine, seed…); `crops` maps an image name to captions and PNG bytes in display order.
    """
    environment = Environment(loader=PackageLoader("ens.pareto", "."), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    colours = choice_colours(space)
    page = environment.get_template("report.html.j2").render(
        title=title, space=space, front=front, facts=facts, members=_members(front, space=space),
        plotly_js=Markup(get_plotlyjs()), names=front.objectives,
        num_measured=len(measurements), invalid=[item for item in measurements if not item.valid],
        format_genotype=format_genotype, hypervolume=hypervolume(front.values, reference),
        reference=[format_value(name, value) for name, value in zip(front.objectives, reference, strict=True)],
        legend=_legend(space, colours),
        crops={name: [(caption, base64.b64encode(png).decode()) for caption, png in row]
               for name, row in crops.items()},
        charts={"front": _inline(front_figure(measurements=measurements, front=front, space=space)),
                "history": _inline(hypervolume_figure(measurements=measurements, front=front, reference=reference))},
        state=_inline(json.dumps({
            "members": _members(front, space=space), "knee": front.knee, "levels": slot_levels(space),
            "slots": [{"name": slot.name, "choices": [
                {"label": choice.label, "fill": fill, "ink": text_colour(fill)}
                for choice, fill in zip(slot.choices, row, strict=True)]}
                for slot, row in zip(space.slots, colours, strict=True)]})))
    write_atomic(path, page.encode())


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
    return [{"genotype": format_genotype(member.genotype), "indices": list(member.genotype),
             "labels": [_short_label(slot, choice) for slot, choice in zip(space.slots, member.genotype, strict=True)],
             "role": front.role(index),
             "objectives": [format_value(name, member.values[name]) for name in front.objectives],
             "values": {name: format_value(name, value) for name, value in member.values.items()}}
            for index, member in enumerate(front.members)]


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
