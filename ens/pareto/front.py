"""Fronts of minimised objectives: arrays (points, objectives) in, masks, indices and volumes out.

Legend: N points, M objectives (two or more), every one smaller-is-better. A value that is not finite raises
ValueError everywhere: an invalid measurement has to be left out by the caller, never compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np


def non_dominated(values: np.ndarray) -> np.ndarray:
    """Mask (N,) of the points that no other point beats: equal points are all on the front or all off it."""
    points = _check(values)
    return np.asarray(moocore.is_nondominated(points, keep_weakly=True), dtype=bool)


def hypervolume(values: np.ndarray, reference: Sequence[float]) -> float:
    """Volume that the points dominate below the fixed `reference` point (M,); points beyond it add nothing."""
    points = _check(values)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != (points.shape[1],) or not np.isfinite(corner).all():
        raise ValueError(f"the reference point needs {points.shape[1]} finite values, got {list(reference)}")
    inside = points[(points < corner).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=corner)) if len(inside) else 0.0


def hypervolume_history(values: np.ndarray, reference: Sequence[float]) -> np.ndarray:
    """Hypervolume after each point, in the order given: (N,), never falling."""
    points = _check(values)
    history = np.zeros(len(points))
    front, volume = points[:0], 0.0
    for index, point in enumerate(points):
        # Most points are dominated: one comparison then spares the front and its volume.
        if not (front <= point).all(axis=1).any():
            front = np.vstack([front, point])
            front = front[non_dominated(front)]
            volume = hypervolume(front, reference)
        history[index] = volume
    return history


def knee(front: np.ndarray, candidates: np.ndarray | None = None) -> int:
    """Index of the knee: the candidate nearest to the ideal corner, every objective scaled to 0..1 over the points.

    The ideal corner has the smallest value of every objective (the compromise solution of multi-criteria decision
    making; Zeleny, 1973). Unlike the distance from the line between the extremes it is one rule for any number of
    objectives, needs no plane where two costs share an extreme, and on a linear front means the middle, not a tie.
    `candidates` is a mask (N,): which points may be it. Ties go to the smaller values in objective order, so that the
    order of the points does not matter.
    """
    points = _check(front)
    if not len(points):
        raise ValueError("an empty front has no knee")
    allowed = np.arange(len(points)) if candidates is None else np.flatnonzero(candidates)
    distance = np.linalg.norm(_scale(points)[allowed], axis=1).round(12)
    return int(allowed[np.lexsort([*points[allowed].T[::-1], distance])[0]])


def nearest(front: np.ndarray, index: int, *, k: int = 5) -> list[int]:
    """Indices of the `k` points nearest to point `index`, itself excluded, nearest first, objectives scaled to 0..1."""
    points = _check(front)
    scaled = _scale(points)
    distance = np.linalg.norm(scaled - scaled[index], axis=1).round(12)
    order = np.lexsort([*points.T[::-1], distance])
    return [int(other) for other in order if other != index][:k]


def spread(front: np.ndarray, first: int, *, count: int) -> list[int]:
    """Indices of up to `count` points far apart: `first`, then always the one farthest from all before it, objectives
    scaled to 0..1 over the points.
    """
    scaled, found = _scale(_check(front)), [first]
    while len(found) < min(count, len(scaled)):
        distance = np.linalg.norm(scaled[:, None] - scaled[found], axis=2).min(axis=1).round(12)
        distance[found] = -1.0
        found.append(int(distance.argmax()))
    return found


def cheapest_within(drop: np.ndarray, cost: np.ndarray, limit: float) -> int:
    """Index of the cheapest point whose `drop` (N,) is at most `limit`; equal costs go to the smaller drop.

    Raises ValueError naming the smallest drop there is when none is within the limit.
    """
    points = _check(np.stack([np.asarray(cost), np.asarray(drop)], axis=1))
    if not (points[:, 1] <= limit).any():
        smallest = f"the smallest is {points[:, 1].min():g}" if len(points) else "there are no points"
        raise ValueError(f"no point is within {limit:g}; {smallest}")
    allowed = np.flatnonzero(points[:, 1] <= limit)
    return int(allowed[np.lexsort([points[allowed, 1], points[allowed, 0]])[0]])


def _scale(points: np.ndarray) -> np.ndarray:
    """Objectives scaled to 0..1 over the points; an objective without range becomes 0."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    scaled: np.ndarray = (points - low) / span
    return scaled


def _check(values: np.ndarray) -> np.ndarray:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] < 2:
        raise ValueError(f"expected an array (points, two or more objectives), got shape {points.shape}")
    if not np.isfinite(points).all():
        bad = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise ValueError(f"point {bad} is not finite: {points[bad].tolist()}; leave invalid measurements out")
    return points
