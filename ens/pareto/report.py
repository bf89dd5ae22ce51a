"""A front on disk: CSV, Markdown, PNG and one HTML page that opens without a network."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ens.atomic import write_atomic
from ens.objectives import QUALITY, find_objective, format_value, mean_psnr_db, objective_values
from ens.pareto.archive import Archive
from ens.pareto.charts import choose_axes, draw_png
from ens.pareto.front import hypervolume_history, spread
from ens.pareto.palette import choice_colours, text_colour
from ens.pareto.selection import (
    Front,
    exceeded_costs,
    is_below_input,
    known_objectives,
    list_usable,
    select_front,
)
from ens.pareto.storage import Storage
from ens.pareto.tables import MORE, drop_text, front_notes, front_rows, front_table, tuned_drop_db, tuned_rows
from ens.space import Measurement, SearchSpace, Slot, format_genotype

Crops = Mapping[str, Sequence[tuple[str, bytes]]]
"""Image name -> captions and PNG bytes in display order."""
_MOST_POINTS = 3000
"""So many measurements that are on no front are drawn: more would make the page slow and no clearer."""


def write_front(folder: Path, *, front: Front, archive: Archive, crops: Crops, storage: str | Path = "",
                options: Sequence[str] = ()) -> None:
    """Write `front.csv`, `front.md`, `front.png`, and last `report.html`, which says what archive it shows.

    The page spells the command that exports a member: with `options`, and with `storage` where that is an URL.
    """
    title = str(archive.manifest.get("study", archive.space.name))
    url = ["--storage", str(Storage(storage))] if storage and isinstance(storage, str) else []
    page = draw_report(title, front=front, archive=archive, crops=crops,
                       command=shlex.join(["ens", "export", str(folder), *url, *options]))
    write_atomic(folder / "front.csv", front_table(front, space=archive.space).to_csv(index=False).encode())
    write_atomic(folder / "front.md", _markdown(f"{title}: {front.caption}", front, archive).encode())
    write_atomic(folder / "front.png", draw_png(title=f"{title}: {front.caption}", front=front))
    write_atomic(folder / "report.html", page.encode())


def spread_members(front: Front, *, count: int = 3) -> list[int]:
    """Indices of up to `count` members far apart on the front, the knee among them, in its order. Neither the teacher
    nor what is below the degraded input or beyond the reference point.
    """
    usable = list_usable(front.members, front.objectives, teacher=front.teacher, baseline=front.baseline)
    pool = [int(index) for index in usable if index == front.knee or any(front.members[index].genotype)]
    return sorted(pool[place] for place in spread(front.values[pool], pool.index(front.knee), count=count))


def telling_images(front: Front, indices: Sequence[int], *, count: int = 3) -> list[int]:
    """Numbers of the validation images on which these members of a front differ most in PSNR, most first."""
    psnr_db: np.ndarray = np.array([front.members[index].psnr_db for index in indices])
    return [int(number) for number in np.argsort(-np.ptp(np.nan_to_num(psnr_db), axis=0), kind="stable")[:count]]


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


def draw_report(title: str, *, front: Front, archive: Archive, crops: Crops, command: str) -> str:
    """The offline HTML page: scatter over any two objectives, slot map, fine-tuned figures, crops, hypervolume.

    `command` exports a member once `--pick` is added to it.
    """
    environment = Environment(loader=PackageLoader("ens.pareto", "."), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    reference, baseline = front.reference, front.baseline
    return environment.get_template("report.html.j2").render(
        title=title, caption=front.caption, fingerprint=archive.fingerprint, space=archive.space, front=front,
        baseline=baseline, facts=_facts(archive), meters=_meters(front), notes=front_notes(front),
        tuned=tuned_rows(archive.tuned), num_measured=len(archive.known()), format_genotype=format_genotype,
        invalid=[item for item in archive.measurements() if not item.valid], legend=_legend(archive.space),
        reference=[f"{front.label(name)} {format_value(name, value)}"
                   for name, value in zip(front.objectives, reference or (), strict=False)],
        crops={name: [(caption, base64.b64encode(png).decode()) for caption, png in row]
               for name, row in crops.items()},
        state=_inline(json.dumps(_describe_state(front, archive, command), separators=(",", ":"))))


def _describe_state(front: Front, archive: Archive, command: str) -> dict[str, Any]:
    """What the page's script draws: measurements once, and every view of them by their numbers."""
    space, names = archive.space, [one.name for one in known_objectives(front.measured)]
    pairs = [pair for pair in itertools.combinations(names, 2) if set(pair) != set(front.objectives)]
    fronts = [front, *(select_front(front.measured, pair, baseline=front.baseline, meters=front.meters)
                       for pair in pairs)]
    kept = {member.genotype for view in fronts for member in view.members}
    kept |= {item.genotype for item in front.measured if item.psnr_db_tuned}
    others = [item.genotype for item in front.measured if item.genotype not in kept]
    kept |= set(others[::-(-len(others) // _MOST_POINTS) or 1])
    drawn = [item for item in front.measured if item.genotype in kept]
    numbers = {item.genotype: number for number, item in enumerate(drawn)}
    drop = front.baseline.input_drop_db if front.baseline else None
    return {
        "command": command, "levels": slot_levels(space), "measured": len(front.measured),
        "objectives": [{"label": front.label(name), "si": find_objective(name).si, "quality": name == QUALITY}
                       for name in names],
        "teacher": [{QUALITY: 0.0, **front.teacher}.get(name) for name in names], "input": drop,
        "items": [_describe_item(front, item, names) for item in drawn],
        "views": [_describe_view(view, names, [numbers[member.genotype] for member in view.members])
                  for view in fronts],
        "growth": _growth(front), "slots": [
            {"name": _plain_name(slot), "choices": [
                {"label": choice.label, "short": _short_label(slot, index), "fill": fill, "ink": text_colour(fill)}
                for index, (choice, fill) in enumerate(zip(slot.choices, row, strict=True))]}
            for slot, row in zip(space.slots, choice_colours(space), strict=True)]}


def _describe_item(front: Front, item: Measurement, names: Sequence[str]) -> dict[str, Any]:
    """A measurement: values to draw and as people read them, PSNR before and after fine-tuning."""
    exceeded, tuned = exceeded_costs(item, front.teacher), tuned_drop_db(item, front)
    texts = [drop_text(item) if name == QUALITY else
             format_value(name, item.values[name]) + (f" {MORE}" if name in exceeded else "") for name in names]
    described: dict[str, Any] = {"genotype": format_genotype(item.genotype), "texts": texts,
                                 "values": [float(f"{item.values[name]:.6g}") for name in names]}
    if item.psnr_db:
        described["psnr"] = f"{mean_psnr_db(item.psnr_db):.2f}"
    if item.psnr_db_tuned:
        described["tuned"] = f"{mean_psnr_db(item.psnr_db_tuned):.2f}"
    if tuned is not None:
        described["tuned_drop"] = round(tuned, 4)
    if is_below_input(item, front.baseline):
        described["worse"] = True
    return described


def _describe_view(view: Front, names: Sequence[str], members: Sequence[int]) -> dict[str, Any]:
    """A front: which objectives go where, its members by number, their errors and roles."""
    x, y, colour = (None if index is None else names.index(view.objectives[index])
                    for index in choose_axes(view.objectives))
    every = range(len(members))
    return {"label": view.caption, "x": x, "y": y, "colour": colour, "members": members, "knee": view.knee,
            "roles": [view.role(index) for index in every], "same": [view.same_as_next(index) for index in every],
            "errors": [round(member.values.get("psnr_drop_se_db", 0.0), 4) for member in view.members]}


def _growth(front: Front) -> list[tuple[int, float]]:
    """Hypervolume after the n-th valid measurement, as a percentage of the last, where it grows; and at the end."""
    if front.reference is None:
        return []
    history = hypervolume_history(objective_values(front.measured, front.objectives), front.reference)
    steps = [(number, round(100 * float(value / (history[-1] or 1)), 3)) for number, value in enumerate(history, 1)]
    return [step for step, before in zip(steps, [(0, -1.0), *steps], strict=False)
            if step[1] != before[1] or step[0] == len(steps)]


def _facts(archive: Archive) -> dict[str, str]:
    """How the values came about, by words for people."""
    shown = {"protocol": "protocol", "data": "validation images", "engine": "search engine", "seed": "seed"}
    facts = {label: str(archive.manifest[name]) for name, label in shown.items() if name in archive.manifest}
    task = str(archive.manifest.get("task", ""))
    name, _, options = task.rstrip(")").partition("(")
    given = [option.split("=") for option in options.split(", ") if option and not option.endswith("=None")]
    words = [f"{key.removesuffix('_255').replace('_', ' ')} {value}" + ("/255" if key.endswith("_255") else "")
             for key, value in given]
    return {**({"task": ", ".join([name, *words])} if task else {}), **facts}


def _meters(front: Front) -> dict[str, str]:
    """What costs were counted or timed on, by the labels of their objectives."""
    return {front.label(one.name): front.meters[one.name] for one in known_objectives(front.measured)
            if one.name in front.meters}


def slot_levels(space: SearchSpace) -> list[int]:
    """Depth of every slot in the drawing, 0 at full resolution.

    `…level2…` in a slot's name is depth 1; nameless slots between two of equal depth lie one deeper (the latent
    stage), others beside their neighbour (the refinement). Other encoders and decoders form a symmetrical U, all other
    networks are flat.
    """
    named = [int(match[1]) - 1 if (match := re.search(r"level(\d+)", slot.name)) else None for slot in space.slots]
    if all(level is None for level in named):
        shaped = any(re.match("encoder|decoder", slot.name) for slot in space.slots)
        return [min(index, len(named) - 1 - index) if shaped else 0 for index in range(len(named))]
    levels = []
    for index, level in enumerate(named):
        left = next((other for other in reversed(named[:index]) if other is not None), None)
        right = next((other for other in named[index:] if other is not None), None)
        if level is None:
            level = left + 1 if left is not None and left == right else left if left is not None else right
        assert level is not None, "some slot has a level"
        levels.append(level)
    return levels


def _plain_name(slot: Slot) -> str:
    """`encoder level 1` for `encoder_level1`."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", slot.name.replace("_", " "))


def _short_label(slot: Slot, index: int) -> str:
    """`vssd×1` for `vssd×1(state=16)`, unless another choice of the slot differs in its options only."""
    shorts = [choice.label.partition("(")[0] for choice in slot.choices]
    return shorts[index] if shorts.count(shorts[index]) == 1 else slot.choices[index].label


def _legend(space: SearchSpace) -> dict[str, str]:
    """Family -> the colour of its deepest choice; the teacher first."""
    legend: dict[str, tuple[int, str]] = {}
    for slot, row in zip(space.slots, choice_colours(space), strict=True):
        for choice, fill in zip(slot.choices, row, strict=True):
            name = f"{choice.family} (teacher)" if choice.teacher else choice.family
            if choice.depth >= legend.get(name, (0, ""))[0]:
                legend[name] = (choice.depth, fill)
    return {name: fill for name, (_, fill) in legend.items()}


def _inline(text: str) -> Markup:
    """JSON that may stand inside <script>: no character in it can close the element or open a comment."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
