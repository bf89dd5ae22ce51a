"""The figure of a front as PNG. The HTML page draws its own, with the same colours (`report.css`)."""

from __future__ import annotations

import io

from ens.objectives import QUALITY, find_objective, objective_values
from ens.pareto.selection import Front
from ens.pareto.tables import tuned_drop_db

_GREY, _LINE, _KNEE, _NEAR, _TUNED, _TEACHER = "#9aa5b1", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#1b2430"


def draw_png(*, title: str, front: Front) -> bytes:
    """All measurements, the front with ±1 standard error, its knee and nearest, teacher, degraded input and fine-tuned
    members, as a PNG of 1200×750 pixels.
    """
    from matplotlib.figure import Figure  # half a second, for whoever draws
    from matplotlib.ticker import EngFormatter

    x, y, colour = choose_axes(front.objectives)
    others, values = objective_values(front.measured, front.objectives), front.values
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.scatter(others[:, x], others[:, y], s=14, color=_GREY, alpha=0.6, linewidths=0, label="measured")
    errors = [member.values.get("psnr_drop_se_db", 0.0) for member in front.members]
    axes.errorbar(values[:, x], values[:, y], yerr=errors if front.objectives[y] == QUALITY else None, fmt="none",
                  ecolor=_LINE, elinewidth=1, capsize=2)
    if colour is None:
        axes.step(values[::-1, x], values[::-1, y], where="post", color=_LINE, linewidth=1)
        axes.scatter(values[:, x], values[:, y], s=30, color=_LINE, label="front", zorder=3)
    else:
        points = axes.scatter(values[:, x], values[:, y], s=30, c=values[:, colour], cmap="cividis", label="front",
                              zorder=3)
        name = front.objectives[colour]
        figure.colorbar(points, format=EngFormatter() if find_objective(name).si else None, label=front.label(name))
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
        set_label(front.label(name))
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


def choose_axes(objectives: tuple[str, ...]) -> tuple[int, int, int | None]:
    """Indices of the objectives on x, y and colour: quality upwards, the first cost to the right."""
    y = objectives.index(QUALITY) if QUALITY in objectives else 0
    costs = [index for index in range(len(objectives)) if index != y]
    return costs[0], y, costs[1] if len(costs) > 1 else None


def _input_drop(front: Front, y: int) -> float | None:
    """Drop of the degraded input, unless it is so far above the front that the front would be a line."""
    if front.baseline is None or front.objectives[y] != QUALITY:
        return None
    drop = front.baseline.input_drop_db
    return drop if drop is not None and drop < 3 * max(1.0, float(front.values[:, y].max())) else None


def _extras(front: Front, x: int, y: int) -> list[tuple[str, list[float], list[float], str, str]]:
    """The teacher, and members after fine-tuning: label, x, y, marker, colour."""
    found = []
    names = front.objectives[x], front.objectives[y]
    teacher = {QUALITY: 0.0, **front.teacher}
    if all(name in teacher for name in names):
        found.append(("teacher", [teacher[names[0]]], [teacher[names[1]]], "D", _TEACHER))
    tuned = [(member.values[names[0]], drop) for member in front.measured
             if names[1] == QUALITY and (drop := tuned_drop_db(member, front)) is not None]
    if tuned:
        found.append(("fine-tuned", [point for point, _ in tuned], [drop for _, drop in tuned], "^", _TUNED))
    return found
