"""The figures of a report: one matplotlib PNG, and plotly figures as JSON for the HTML page.

Heavy packages are imported by the function that draws with them: a run that has nothing left to do draws nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ens.objectives import find_objective, label_value, list_objectives, objective_values
from ens.pareto.front import hypervolume_history
from ens.pareto.selection import Front
from ens.pareto.tables import drop_text, tuned_drop_db
from ens.space import Measurement, SearchSpace, format_genotype

if TYPE_CHECKING:
    import plotly.graph_objects as go

_GREY, _LINE, _KNEE, _NEAR, _TUNED, _TEACHER = "#9aa5b1", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#1b2430"
_MOST_TEXTS = 3000
"""Measured points that are not on the front carry a hover text up to this many: more would make the page slow."""


def draw_png(*, title: str, measurements: Sequence[Measurement], front: Front) -> bytes:
    """All measurements, the front with ±1 standard error, its knee and nearest, teacher, degraded input and fine-tuned
    members, as a PNG of 1200×750 pixels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    x, y, colour = _axes(front.objectives)
    others, values = objective_values([item for item in measurements if item.valid], front.objectives), front.values
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.scatter(others[:, x], others[:, y], s=14, color=_GREY, alpha=0.6, linewidths=0, label="measured")
    axes.errorbar(values[:, x], values[:, y], yerr=_errors(front, y), fmt="none", ecolor=_LINE, elinewidth=1, capsize=2)
    if colour is None:
        axes.step(values[::-1, x], values[::-1, y], where="post", color=_LINE, linewidth=1)
        axes.scatter(values[:, x], values[:, y], s=30, color=_LINE, label="front", zorder=3)
    else:
        points = axes.scatter(values[:, x], values[:, y], s=30, c=values[:, colour], cmap="cividis", label="front",
                              zorder=3)
        objective = find_objective(front.objectives[colour])
        figure.colorbar(points, format=EngFormatter() if objective.si else None, label=objective.label)
    near = values[list(front.nearest)]
    axes.scatter(near[:, x], near[:, y], s=90, facecolors="none", edgecolors=_NEAR, linewidths=1.8,
                 label="nearest to the knee", zorder=4)
    axes.scatter(values[front.knee, x], values[front.knee, y], s=190, marker="*", color=_KNEE, label="knee", zorder=5)
    for label, points_x, points_y, marker, shade in _extras(front, x, y):
        axes.scatter(points_x, points_y, marker=marker, s=50, color=shade, label=label, zorder=5)
    if (limit := _input_drop(front, y)) is not None:
        axes.axhline(limit, color=_TEACHER, linewidth=1, linestyle="--", label="degraded input")
    for name, set_label, axis in ((front.objectives[x], axes.set_xlabel, axes.xaxis),
                                  (front.objectives[y], axes.set_ylabel, axes.yaxis)):
        set_label(find_objective(name).label)
        if find_objective(name).si:
            axis.set_major_formatter(EngFormatter())
    axes.set_title(title, fontsize=11)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def front_figure(*, measurements: Sequence[Measurement], front: Front, space: SearchSpace) -> str:
    """Plotly JSON of the scatter. Trace `front` carries the members in order, so that a click selects one."""
    import plotly.graph_objects as go

    x, y, colour = _axes(front.objectives)
    on_front = {member.genotype for member in front.members}
    rest = [item for item in measurements if item.valid and item.genotype not in on_front]
    others, values = objective_values(rest, front.objectives), front.values
    figure = go.Figure()
    figure.add_scatter(x=others[:, x], y=others[:, y], mode="markers", name="measured",
                       hoverinfo="text" if len(rest) <= _MOST_TEXTS else "skip",
                       hovertext=[hover_text(item, space) for item in rest] if len(rest) <= _MOST_TEXTS else None,
                       marker={"color": _GREY, "size": 6, "opacity": 0.65})
    marker: dict[str, object] = {"color": _LINE, "size": 9}
    if colour is not None:
        title = {"text": find_objective(front.objectives[colour]).label, "side": "right"}
        marker = {"color": values[:, colour], "colorscale": "Cividis", "size": 10,
                  "colorbar": {"title": title, "thickness": 12}}
    errors = _errors(front, y)
    figure.add_scatter(x=values[:, x], y=values[:, y], name="front, before fine-tuning", marker=marker,
                       hoverinfo="text", mode="lines+markers" if colour is None else "markers",
                       error_y=None if errors is None else {"array": errors, "thickness": 1, "width": 3},
                       line={"color": _LINE, "width": 1, "shape": "vh"},
                       hovertext=[hover_text(item, space) for item in front.members])
    near = values[list(front.nearest)]
    figure.add_scatter(x=near[:, x], y=near[:, y], mode="markers", name="nearest to the knee", hoverinfo="skip",
                       marker={"symbol": "circle-open", "size": 15, "color": _NEAR, "line": {"width": 2.5}})
    figure.add_scatter(x=[values[front.knee, x]], y=[values[front.knee, y]], mode="markers", name="knee",
                       hoverinfo="skip", marker={"symbol": "star", "size": 18, "color": _KNEE})
    for label, points_x, points_y, _, shade in _extras(front, x, y):
        figure.add_scatter(x=points_x, y=points_y, mode="markers", name=label, hoverinfo="name",
                           marker={"symbol": "diamond", "size": 11, "color": shade})
    if (limit := _input_drop(front, y)) is not None:
        figure.add_hline(y=limit, line={"color": _TEACHER, "width": 1, "dash": "dash"},
                         annotation={"text": "degraded input", "font": {"size": 11}})
    return _styled(figure, xaxis=label_value(front.objectives[x]), yaxis=label_value(front.objectives[y]))


def hypervolume_figure(*, measurements: Sequence[Measurement], front: Front, reference: Sequence[float]) -> str:
    """Plotly JSON of the hypervolume after each measurement, as a percentage of the last."""
    import plotly.graph_objects as go

    valid = [(number, item) for number, item in enumerate(measurements, start=1) if item.valid]
    history = hypervolume_history(objective_values([item for _, item in valid], front.objectives), reference)
    share = 100 * history / history[-1] if history[-1] > 0 else np.zeros(len(history))
    figure = go.Figure()
    figure.add_scatter(x=[number for number, _ in valid], y=share, mode="lines", name="hypervolume",
                       line={"color": _LINE, "width": 2, "shape": "hv"},
                       hovertemplate="after %{x}: %{y:.2f} %<extra></extra>")
    return _styled(figure, xaxis="measurements", yaxis="hypervolume (% of the last)")


def hover_text(measurement: Measurement, space: SearchSpace) -> str:
    """Genotype, objectives and the choice of every slot that is not the teacher's, as plotly's line-broken text."""
    lines = [f"<b>{format_genotype(measurement.genotype)}</b>"]
    lines += [f"{objective.label}: " + (drop_text(measurement) if objective.name == "psnr_drop_db" else
                                        objective.format(measurement.values[objective.name]))
              for objective in list_objectives(measurement.values)]
    changed = [f"{slot.name}: {choice.label}"
               for slot, choice in zip(space.slots, space.choices(measurement.genotype), strict=True)
               if not choice.teacher]
    lines += changed[:12] + ([f"and {len(changed) - 12} more slots"] if len(changed) > 12 else [])
    return "<br>".join(lines if changed else [*lines, "the teacher in every slot"])


def _axes(objectives: Sequence[str]) -> tuple[int, int, int | None]:
    """Indices of the objectives on x, y and colour: quality upwards, the first cost to the right."""
    y = objectives.index("psnr_drop_db") if "psnr_drop_db" in objectives else 0
    costs = [index for index in range(len(objectives)) if index != y]
    return costs[0], y, costs[1] if len(costs) > 1 else None


def _errors(front: Front, y: int) -> list[float] | None:
    """One standard error of every member's drop, where the drop is what goes upwards."""
    if front.objectives[y] != "psnr_drop_db":
        return None
    return [member.values.get("psnr_drop_se_db", 0.0) for member in front.members]


def _input_drop(front: Front, y: int) -> float | None:
    """Drop of the degraded input, unless it is so far above the front that the front would be a line."""
    if front.baseline is None or front.objectives[y] != "psnr_drop_db":
        return None
    drop = front.baseline.input_drop_db
    return drop if drop is not None and drop < 3 * max(1.0, float(front.values[:, y].max())) else None


def _extras(front: Front, x: int, y: int) -> list[tuple[str, list[float], list[float], str, str]]:
    """The teacher, and members after fine-tuning: label, x, y, marker, colour."""
    found = []
    names = front.objectives[x], front.objectives[y]
    teacher = {"psnr_drop_db": 0.0, **front.teacher}
    if all(name in teacher for name in names):
        found.append(("teacher", [teacher[names[0]]], [teacher[names[1]]], "D", _TEACHER))
    tuned = [(member.values[names[0]], drop) for member in front.members
             if names[1] == "psnr_drop_db" and (drop := tuned_drop_db(member, front)) is not None]
    if tuned:
        found.append(("fine-tuned", [point for point, _ in tuned], [drop for _, drop in tuned], "^", _TUNED))
    return found


def _styled(figure: go.Figure, *, xaxis: str, yaxis: str) -> str:
    axis: dict[str, Any] = {"gridcolor": "#e4e8ec", "zerolinecolor": "#cbd2d9", "linecolor": "#9aa5b1",
                            "automargin": True, "exponentformat": "SI"}
    figure.update_layout(
        template="none", margin={"l": 10, "r": 10, "t": 10, "b": 10}, hovermode="closest", paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff", font={"family": "system-ui, sans-serif", "size": 13, "color": "#1b2430"},
        hoverlabel={"align": "left", "bgcolor": "#ffffff", "font": {"color": "#1b2430"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={**axis, "title": {"text": xaxis}}, yaxis={**axis, "title": {"text": yaxis}})
    return str(figure.to_json())
