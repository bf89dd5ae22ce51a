"""Front maths against closed forms and a quadratic-time oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ens.pareto.front import cheapest_within, hypervolume, hypervolume_history, knee, nearest, non_dominated

points_2d = st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=25).map(np.array)
points_3d = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=20).map(np.array)


def brute_force_mask(points: np.ndarray) -> list[bool]:
    return [not any((other <= point).all() and (other < point).any() for other in points) for point in points]


@given(st.one_of(points_2d, points_3d))
@settings(deadline=None, max_examples=60)
def test_non_dominated_equals_the_definition(points: np.ndarray) -> None:
    assert non_dominated(points).tolist() == brute_force_mask(points)


@given(st.one_of(points_2d, points_3d))
@settings(deadline=None, max_examples=60)
def test_hypervolume_equals_counting_unit_cells(points: np.ndarray) -> None:
    reference = (5,) * points.shape[1]
    cells = itertools.product(range(5), repeat=points.shape[1])
    assert hypervolume(points, reference) == sum((points <= np.array(cell)).all(axis=1).any() for cell in cells)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_hypervolume_of_a_staircase(steps: int) -> None:
    staircase = np.array([[i, steps - 1 - i] for i in range(steps)], dtype=float)
    assert hypervolume(staircase, (steps, steps)) == pytest.approx(steps * (steps + 1) / 2)


def test_points_at_or_beyond_the_reference_add_nothing() -> None:
    assert hypervolume(np.array([[2.0, 0.0], [0.0, 3.0]]), (2, 3)) == 0
    assert hypervolume(np.array([[1.0, 1.0], [9.0, -9.0]]), (2, 3)) == 2


@given(points_2d, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_order_and_duplicates_change_nothing(points: np.ndarray, random: object) -> None:
    shuffled = np.vstack([points, points])[np.random.default_rng(len(points)).permutation(2 * len(points))]
    assert hypervolume(shuffled, (7, 7)) == hypervolume(points, (7, 7))
    kept, kept_shuffled = points[non_dominated(points)], shuffled[non_dominated(shuffled)]
    assert set(map(tuple, kept)) == set(map(tuple, kept_shuffled))
    assert tuple(kept[knee(kept)]) == tuple(kept_shuffled[knee(kept_shuffled)])


def test_history_never_falls_and_ends_at_the_whole() -> None:
    points = np.random.default_rng(0).random((40, 3))
    history = hypervolume_history(points, (1, 1, 1))
    assert (np.diff(history) >= 0).all() and history[-1] == pytest.approx(hypervolume(points, (1, 1, 1)))


def test_the_knee_is_the_point_nearest_to_the_ideal_corner() -> None:
    front = np.array([[0.0, 10.0], [0.1, 6.0], [0.3, 2.0], [0.7, 1.5], [1.0, 0.0]])
    distance = np.hypot(front[:, 0], front[:, 1] / 10)
    assert knee(front) == int(distance.argmin()) == 2


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_concave_linear_and_convex_fronts_have_their_knee_where_it_may_be(power: float) -> None:
    """Concave (0.5): no member is below the line between the extremes; the first may be left out as the teacher."""
    drop = np.linspace(0, 1, 11)
    front = np.stack([drop, (1 - drop) ** power], axis=1)
    assert knee(front, np.arange(11) > 0) > 0
    if power >= 1:
        assert 0 < knee(front) < 10


def test_the_knee_of_a_linear_front_is_its_middle() -> None:
    drop = np.linspace(0, 1, 11)
    assert knee(np.stack([drop, 1 - drop], axis=1)) == 5


def test_only_a_candidate_is_the_knee() -> None:
    bent = np.array([[0.0, 10.0], [0.1, 6.0], [0.3, 2.0], [0.7, 1.5], [1.0, 0.0]])
    assert knee(bent, np.array([True, True, False, True, False])) == 1
    assert knee(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([False, True])) == 1


def test_the_knee_ignores_units() -> None:
    front = np.array([[0.0, 10.0], [0.1, 6.0], [0.3, 2.0], [0.7, 1.5], [1.0, 0.0]])
    assert knee(front * [1e9, 1e-6] + [5, -3]) == knee(front)


def test_two_costs_that_move_together_leave_the_knee_inside() -> None:
    drop = np.linspace(0, 1, 11)
    cost = (1 - drop) ** 1.2
    assert 0 < knee(np.stack([drop, cost, 7 * cost], axis=1)) < 10


def test_a_front_of_one_point_or_two_has_a_knee_and_an_empty_one_none() -> None:
    assert knee(np.array([[3.0, 4.0]])) == 0
    assert knee(np.array([[1.0, 0.0], [0.0, 1.0]])) == 1, "a tie goes to the smaller first objective"
    with pytest.raises(ValueError, match="empty"):
        knee(np.empty((0, 2)))


def test_nearest_are_sorted_and_leave_the_point_itself_out() -> None:
    front = np.array([[0.0, 100.0], [1.0, 90.0], [2.0, 80.0], [5.0, 50.0], [10.0, 0.0]])
    assert nearest(front, 1, k=2) in ([0, 2], [2, 0]) and nearest(front, 3, k=9) == [2, 1, 0, 4]


def test_cheapest_within() -> None:
    drop, cost = np.array([0.0, 0.05, 0.09, 0.2]), np.array([10.0, 7.0, 7.0, 1.0])
    assert cheapest_within(drop, cost, 0.1) == 1 and cheapest_within(drop, cost, 0.0) == 0
    with pytest.raises(ValueError, match="within -1; the smallest is 0"):
        cheapest_within(drop, cost, -1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_raise(bad: float) -> None:
    points = np.array([[0.0, 1.0], [bad, 0.0]])
    for call in (non_dominated, knee, lambda x: hypervolume(x, (2, 2)), lambda x: nearest(x, 0),
                 lambda x: hypervolume_history(x, (2, 2)), lambda x: cheapest_within(x[:, 0], x[:, 1], 1.0)):
        with pytest.raises(ValueError, match="point 1 is not finite"):
            call(points)
    with pytest.raises(ValueError, match="reference"):
        hypervolume(points[:1], (bad, 1))
    with pytest.raises(ValueError, match="reference"):
        hypervolume(points[:1], (1, 1, 1))
