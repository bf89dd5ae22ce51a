"""Objectives: the sign changes once, wrong names are told, invalid measurements become NaN rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ens.objectives import (
    OBJECTIVES,
    add_quality,
    count_perfect,
    find_objectives,
    mean_psnr_db,
    objective_values,
    psnr_drop_db,
    psnr_drop_se_db,
    reference_point,
)
from ens.space import Measurement


def test_a_better_hybrid_has_a_negative_drop() -> None:
    assert psnr_drop_db(teacher_psnr_db=(30.0, 32.0), psnr_db=(29.0, 32.5)) == pytest.approx(0.25)
    assert psnr_drop_db(teacher_psnr_db=(30.0,), psnr_db=(31.0,)) == -1.0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_psnr_that_is_not_finite_makes_a_measurement_invalid(bad: float) -> None:
    measured = add_quality(Measurement((1, 0), {"macs": 5.0}, (30.0, bad)), teacher_psnr_db=(31.0, 31.0))
    assert not measured.valid and "not finite" in measured.note and "psnr_drop_db" not in measured.values


def test_the_drop_and_its_paired_standard_error_join_what_was_counted() -> None:
    """Drops 1, 0 and 2: mean 1, sample deviation 1, over √3."""
    measured = add_quality(Measurement((1, 0), {"macs": 5.0}, (30.0, 40.0, 20.0)), teacher_psnr_db=(31.0, 40.0, 22.0))
    assert measured.valid and measured.values["macs"] == 5.0 and measured.values["psnr_drop_db"] == pytest.approx(1.0)
    assert measured.values["psnr_drop_se_db"] == pytest.approx(1 / math.sqrt(3))


def test_the_standard_error_is_of_the_pairs_not_of_the_images() -> None:
    assert psnr_drop_se_db(teacher_psnr_db=(20.0, 40.0), psnr_db=(19.5, 39.5)) == 0.0
    assert psnr_drop_se_db(teacher_psnr_db=(20.0,), psnr_db=(19.0,)) == 0.0


def test_numbers_of_images_must_agree() -> None:
    with pytest.raises(ValueError, match="2 PSNRs and the hybrid 1"):
        psnr_drop_db(teacher_psnr_db=(30.0, 31.0), psnr_db=(30.0,))


@pytest.mark.parametrize("names", [("psnr_drop_db",), ("macs", "macs"), tuple(OBJECTIVES)])
def test_two_or_three_different_objectives(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two or three different"):
        find_objectives(names)


def test_an_unknown_objective_is_told_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'flops' does not exist.*psnr_drop_db.*macs"):
        find_objectives(("flops", "macs"))


def test_values_follow_the_names_and_invalid_rows_are_nan() -> None:
    good, broken = Measurement((0, 1), {"macs": 2.0, "params": 3.0}), Measurement((0, 0), {}, valid=False)
    values = objective_values([good, broken], ("params", "macs"))
    assert values[0].tolist() == [3.0, 2.0] and np.isnan(values[1]).all()


def test_a_missing_or_infinite_value_of_a_valid_measurement_raises() -> None:
    with pytest.raises(KeyError, match="no value of macs"):
        objective_values([Measurement((0, 1), {"params": 3.0})], ("params", "macs"))
    with pytest.raises(ValueError, match="not finite"):
        objective_values([Measurement((0, 1), {"params": 3.0, "macs": math.inf})], ("params", "macs"))


def test_the_reference_point_is_beyond_the_teacher() -> None:
    reference = reference_point(("psnr_drop_db", "macs", "params"), teacher_values=(0.0, 200.0, 10.0))
    assert reference == (6.0, pytest.approx(220.0), pytest.approx(11.0))


def test_images_restored_perfectly_are_left_out_of_every_mean_and_counted() -> None:
    teacher, hybrid, given = (30.0, math.inf, 34.0, 20.0), (29.0, 31.0, 32.0, math.inf), (20.0, 21.0, 25.0, math.inf)
    assert mean_psnr_db(teacher) == 28.0 and mean_psnr_db((math.inf, math.inf)) == math.inf
    assert math.isnan(mean_psnr_db((30.0, math.nan, math.inf)))
    assert psnr_drop_db(teacher_psnr_db=teacher, psnr_db=hybrid) == 1.5  # of the first and the third alone
    assert psnr_drop_se_db(teacher_psnr_db=teacher, psnr_db=hybrid) == pytest.approx(0.5)
    assert math.isnan(psnr_drop_db(teacher_psnr_db=(math.inf,), psnr_db=(math.inf,)))
    assert count_perfect(teacher, given) == 2 and count_perfect(teacher, ()) == 1 and count_perfect((1.0,)) == 0
    measured = add_quality(Measurement((1,), {}, hybrid), teacher_psnr_db=teacher)
    assert measured.valid and measured.values["psnr_drop_db"] == 1.5
