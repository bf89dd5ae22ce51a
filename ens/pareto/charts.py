"""The figures of a report: one matplotlib PNG, and plotly figures as JSON for the HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ens.objectives import format_value
from ens.pareto.front import hypervolume_history
from ens.pareto.selection import Front, measured_values
from ens.space import Measurement, SearchSpace, format_genotype

_GREY, _LINE, _KNEE, _NEAR = "#9aa5b1", "#0072B2", "#D55E00", "#E69F00"

_AXES = {"psnr_drop_db": "PSNR drop from the teacher (dB)", "penalty": "transformer usage penalty",
         "macs": "multiply-adds (MACs)", "params": "parameters"}


def draw_png(*, title: str, measurements: Sequence[Measurement], front: Front) -> bytes:
    """All measurements, the front, its knee and the nearest as a PNG of 1200×750 pixels."""
    x, y, colour = _axes(front.objectives)
    others = measured_values([item for item in measurements if item.valid], front.objectives)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.scatter(others[:, x], others[:, y], s=14, color=_GREY, alpha=0.6, linewidths=0, label="measured")
    values = front.values
    if colour is None:
        axes.step(values[::-1, x], values[::-1, y], where="post", color=_LINE, linewidth=1)
        axes.scatter(values[:, x], values[:, y], s=30, color=_LINE, label="front", zorder=3)
    else:
        points = axes.scatter(values[:, x], values[:, y], s=30, c=values[:, colour], cmap="cividis", label="front",
                              zorder=3)
        figure.colorbar(points, format=EngFormatter() if front.objectives[colour] in ("macs", "params") else None,
                        label=_AXES.get(front.objectives[colour], front.objectives[colour]))
    near = values[list(front.nearest)]
    axes.scatter(near[:, x], near[:, y], s=90, facecolors="none", edgecolors=_NEAR, linewidths=1.8,
                 label="five nearest", zorder=4)
    axes.scatter(values[front.knee, x], values[front.knee, y], s=190, marker="*", color=_KNEE, label="knee", zorder=5)
    axes.set_xlabel(_AXES.get(front.objectives[x], front.objectives[x]))
    axes.set_ylabel(_AXES.get(front.objectives[y], front.objectives[y]))
    if front.objectives[x] in ("macs", "params"):
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_title(title, fontsize=11)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def front_figure(*, measurements: Sequence[Measurement], front: Front, space: SearchSpace) -> str:
    """Plotly JSON of the scatter. Trace `front` carries the members in order, so that a click selects one."""
    x, y, colour = _axes(front.objectives)
    on_front = {member.genotype for member in front.members}
    rest = [item for item in measurements if item.valid and item.genotype not in on_front]
    others, values = measured_values(rest, front.objectives), front.values
    figure = go.Figure()
    figure.add_scatter(x=others[:, x], y=others[:, y], mode="markers", name="measured", hoverinfo="text",
                       hovertext=[hover_text(item, front.objectives, space) for item in rest],
                       marker={"color": _GREY, "size": 6, "opacity": 0.65})
    marker: dict[str, object] = {"color": _LINE, "size": 9}
    if colour is not None:
        name = front.objectives[colour]
        marker = {"color": values[:, colour], "colorscale": "Cividis", "size": 10,
                  "colorbar": {"title": {"text": _AXES.get(name, name), "side": "right"}, "thickness": 12}}
    figure.add_scatter(x=values[:, x], y=values[:, y], name="front", marker=marker, hoverinfo="text",
                       mode="lines+markers" if colour is None else "markers",
                       line={"color": _LINE, "width": 1, "shape": "vh"},
                       hovertext=[hover_text(item, front.objectives, space) for item in front.members])
    near = values[list(front.nearest)]
    figure.add_scatter(x=near[:, x], y=near[:, y], mode="markers", name="five nearest", hoverinfo="skip",
                       marker={"symbol": "circle-open", "size": 15, "color": _NEAR, "line": {"width": 2.5}})
    figure.add_scatter(x=[values[front.knee, x]], y=[values[front.knee, y]], mode="markers", name="knee",
                       hoverinfo="skip", marker={"symbol": "star", "size": 18, "color": _KNEE})
    return _styled(figure, xaxis=front.objectives[x], yaxis=front.objectives[y])


def hypervolume_figure(*, measurements: Sequence[Measurement], front: Front, reference: Sequence[float]) -> str:
    """Plotly JSON of the hypervolume after each measurement, as a percentage of the last."""
    valid = [(number, item) for number, item in enumerate(measurements, start=1) if item.valid]
    history = hypervolume_history(measured_values([item for _, item in valid], front.objectives), reference)
    share = 100 * history / history[-1] if history[-1] > 0 else np.zeros(len(history))
    figure = go.Figure()
    figure.add_scatter(x=[number for number, _ in valid], y=share, mode="lines", name="hypervolume",
                       line={"color": _LINE, "width": 2, "shape": "hv"}, customdata=history,
                       hovertemplate="after %{x}: %{y:.2f} % (%{customdata:.5g})<extra></extra>")
    return _styled(figure, xaxis="measurements", yaxis="hypervolume (% of the last)")


def hover_text(measurement: Measurement, objectives: Sequence[str], space: SearchSpace) -> str:
    """Genotype, objectives and the choice of every slot that is not the teacher's, as plotly's line-broken text."""
    lines = [f"<b>{format_genotype(measurement.genotype)}</b>"]
    lines += [f"{_AXES.get(name, name)}: {format_value(name, measurement.values[name])}" for name in objectives]
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


def _styled(figure: go.Figure, *, xaxis: str, yaxis: str) -> str:
    axis = {"gridcolor": "#e4e8ec", "zerolinecolor": "#cbd2d9", "linecolor": "#9aa5b1", "automargin": True,
            "exponentformat": "SI"}
    figure.update_layout(
        template="none", margin={"l": 10, "r": 10, "t": 10, "b": 10}, hovermode="closest", paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff", font={"family": "system-ui, sans-serif", "size": 13, "color": "#1b2430"},
        hoverlabel={"align": "left", "bgcolor": "#ffffff", "font": {"color": "#1b2430"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={**axis, "title": {"text": _AXES.get(xaxis, xaxis)}},
        yaxis={**axis, "title": {"text": _AXES.get(yaxis, yaxis)}})
    return str(figure.to_json())
