"""The front a person chooses from: knee, picks, what is below the input, what cannot be told apart."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ens.pareto.baseline import Baseline
from ens.pareto.selection import diverse_members, nearest_members, pick_genotype, select_front
from ens.space import Choice, Measurement, SearchSpace, Slot

CHOICES = (Choice("restormer", 2, teacher=True), *(Choice("conv", depth) for depth in range(1, 12)))
SPACE = SearchSpace("s", (Slot("a", CHOICES),))
TWO = ("psnr_drop_db", "penalty")
BASELINE = Baseline((30.0, 32.0), (20.0, 22.0), {"penalty": 10.0})


def front_of(*points: tuple[float, float], baseline: Baseline | None = BASELINE):  # type: ignore[no-untyped-def]
    """One member a point (drop, penalty), the teacher first; PSNRs of two images follow from the drop."""
    return select_front([Measurement((number,), dict(zip(TWO, point, strict=True)), (30.0 - point[0], 32.0 - point[0]))
                         for number, point in enumerate(points)], TWO, baseline=baseline)


@pytest.mark.parametrize("points", [  # two points, concave, linear
    [(0.0, 10.0), (1.0, 5.0)], [(0.0, 10.0), (1.0, 9.0), (2.0, 7.0), (3.0, 3.0)], [(0.0, 10.0), (1.0, 5.0), (2.0, 0.0)],
])
def test_the_knee_is_not_the_teacher_while_another_member_is_left(points: list[tuple[float, float]]) -> None:
    front = front_of(*points)
    assert any(front.members[front.knee].genotype)
    assert all(any(front.members[index].genotype) for index in front.nearest)


def test_the_teacher_is_the_knee_where_it_is_alone() -> None:
    assert front_of((0.0, 10.0)).knee == 0


@given(st.lists(st.tuples(st.floats(0.05, 5.5), st.floats(0.5, 9.5)), min_size=2, max_size=6), st.floats(6.5, 60.0))
@settings(deadline=None, max_examples=60)
def test_a_member_beyond_the_reference_does_not_move_the_knee(points: list[tuple[float, float]], drop: float) -> None:
    """6 dB is the reference: a member far below, however cheap, changes no scale."""
    baseline = Baseline((80.0, 82.0), (10.0, 12.0), {"penalty": 10.0})
    plain = front_of((0.0, 10.0), *points, baseline=baseline)
    extreme = front_of((0.0, 10.0), *points, (drop, 1e-6), baseline=baseline)
    assert extreme.members[extreme.knee].genotype == plain.members[plain.knee].genotype


@given(st.floats(0.01, 100.0))
def test_the_knee_ignores_the_unit_of_the_cost(unit: float) -> None:
    points = [(0.0, 10.0), (0.2, 6.0), (0.9, 3.0), (2.5, 1.0)]
    scaled = front_of(*((drop, cost * unit) for drop, cost in points),
                      baseline=Baseline((30.0, 32.0), (20.0, 22.0), {"penalty": 10.0 * unit}))
    assert scaled.members[scaled.knee].genotype == front_of(*points).members[front_of(*points).knee].genotype


def test_members_below_the_degraded_input_are_marked_and_never_picked() -> None:
    weak = Baseline((21.0, 23.0), (20.0, 22.0), {"penalty": 10.0})
    points = [(0.0, 10.0), (0.5, 6.0), (1.5, 1.0)]
    measured = [Measurement((number,), dict(zip(TWO, point, strict=True)), (21.0 - point[0], 23.0 - point[0]))
                for number, point in enumerate(points)]
    front = select_front(measured, TWO, baseline=weak)
    assert [front.below_input(index) for index in range(3)] == [False, False, True]
    for pick in ("knee", "within 2"):
        assert pick_genotype(pick, front=front, space=SPACE) == (1,)
    assert (2,) not in nearest_members(front, (1,), count=5)
    assert pick_genotype("2", front=front, space=SPACE) == (2,), "written out it may be had"
    with pytest.raises(ValueError, match="every member of the front is below the degraded input"):
        pick_genotype("knee", front=select_front(measured[2:], TWO, baseline=weak), space=SPACE)


def test_neighbours_are_told_apart_by_the_paired_difference_over_images() -> None:
    values = [{"psnr_drop_db": 0.0, "penalty": 3.0}, {"psnr_drop_db": 0.5, "penalty": 2.0},
              {"psnr_drop_db": 0.6, "penalty": 1.0}]
    psnr_db = [(30.0, 40.0, 20.0), (29.5, 39.5, 19.5), (29.0, 39.9, 19.0)]
    front = select_front([Measurement((number,), *pair) for number, pair in
                          enumerate(zip(values, psnr_db, strict=True))], TWO)
    assert [front.same_as_next(index) for index in range(3)] == [False, True, False]


def test_candidates_are_the_pick_and_its_neighbours_without_the_teacher() -> None:
    front = front_of((0.0, 10.0), (0.2, 6.0), (0.9, 3.0), (2.5, 1.0))
    assert nearest_members(front, (2,), count=1) == [(2,)]
    assert nearest_members(front, (2,), count=3)[0] == (2,) and len(nearest_members(front, (2,), count=3)) == 3
    assert (0,) not in nearest_members(front, (2,), count=9)
    assert nearest_members(front, (7,), count=3) == [(7,)], "a genotype off the front has no neighbours on it"


def test_diverse_members_are_as_far_apart_as_the_front_allows() -> None:
    """Against brute force for three: the second is farthest from the knee, the third from both."""
    genotypes = [(0, 0, 0, 0), (1, 1, 1, 0), (1, 1, 0, 0), (2, 2, 2, 2), (1, 2, 2, 2)]
    front = select_front([Measurement(genotype, {"psnr_drop_db": 0.1 * number, "penalty": 9.0 - number}, (30.0, 32.0))
                          for number, genotype in enumerate(genotypes)], TWO)
    found = diverse_members(front, count=3)
    knee = front.members[front.knee].genotype
    assert found[0] == (knee, 0) and len({genotype for genotype, _ in found}) == 3 and (0, 0, 0, 0) not in dict(found)

    def apart(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return sum(a != b for a, b in zip(one, other, strict=True))

    others = [genotype for genotype in genotypes[1:] if genotype != knee]
    assert found[1][1] == apart(knee, found[1][0]) == max(apart(knee, one) for one in others)
    assert found[2][1] == max(min(apart(knee, one), apart(found[1][0], one)) for one in others if one != found[1][0])
    assert len(diverse_members(front, count=99)) == 4


def test_an_objective_that_was_not_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"1 of 1 measurements have no macs, for instance 1; all have psnr_drop_db"):
        select_front([Measurement((1,), {"psnr_drop_db": 0.0, "penalty": 1.0})], ("psnr_drop_db", "macs"))
