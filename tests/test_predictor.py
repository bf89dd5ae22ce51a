"""The predictor against what it is made to find: sums over slots, pairs, and how sure it may be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ens.search.predictor import Predictor, Warp, _likelihood, describe_fit, judge_predictor, learn, liken
from ens.space import Genotype, Measurement, Tally

SIZES = (3, 3, 3, 3)
GENOTYPES: list[Genotype] = list(itertools.product(range(3), repeat=4))
PRICES = Tally(0.0, ((0.0, 1.0, 1.1), (0.0, 1.0, 1.1), (2.0, 2.0, 7.0), (3.0, 1.0, 2.0)))


def table(seed: int, *, pairs: float) -> np.ndarray:
    """A sum over slots, and over all pairs of slots times `pairs`."""
    rng = np.random.default_rng(seed)
    alone = rng.exponential(size=(4, 3))
    joint = {both: rng.normal(size=(3, 3)) for both in itertools.combinations(range(4), 2)}
    return np.array([sum(alone[slot, index] for slot, index in enumerate(g))
                     + pairs * sum(effect[g[a], g[b]] for (a, b), effect in joint.items()) for g in GENOTYPES])


def fit(values: np.ndarray, count: int) -> tuple[Predictor, list[int], list[int]]:
    order = np.random.default_rng(0).permutation(len(GENOTYPES)).tolist()
    known, rest = order[:count], order[count:]
    given = [GENOTYPES[index] for index in known]
    return Predictor(SIZES, given, values[known], learn(SIZES, given, values[known])), known, rest


def test_a_sum_over_slots_is_known_from_little_more_than_a_measurement_a_choice() -> None:
    values = table(0, pairs=0.0)
    predictor, _, rest = fit(values, 20)
    rows = predictor._encoding.encode([GENOTYPES[index] for index in rest])
    error = np.abs(predictor.warp.unwarp(predictor.predict(rows).means) - values[rest])
    assert np.median(error) < 0.2 * values.std()


def test_pairs_are_learned_where_there_are_pairs() -> None:
    values = table(1, pairs=0.8)
    predictor, known, rest = fit(values, 60)
    predicted = predictor.warp.unwarp(predictor.predict(
        predictor._encoding.encode([GENOTYPES[index] for index in rest])).means)
    x = predictor._encoding.encode(GENOTYPES)
    sums = x @ np.linalg.lstsq(x[known], values[known], rcond=None)[0]
    assert np.abs(predicted - values[rest]).mean() < 0.6 * np.abs(sums[rest] - values[rest]).mean()


def test_deviations_are_as_large_as_errors_are() -> None:
    """Two thirds of a normal distribution lie within one deviation."""
    inside = []
    for seed in range(6):
        values = table(seed, pairs=0.4)
        predictor, _, rest = fit(values, 40)
        belief = predictor.predict(predictor._encoding.encode([GENOTYPES[index] for index in rest]))
        inside += (np.abs(predictor.warp.warp(values[rest]) - belief.means) <= belief.deviations).tolist()
    assert 0.5 < np.mean(inside) < 0.9


def test_the_gradient_of_the_likelihood_is_its_slope() -> None:
    predictor, _, _ = fit(table(2, pairs=0.5), 25)
    near, of = liken(SIZES, [PRICES]), [predictor.x[:, 3 * slot:3 * slot + 3] for slot in range(4)]
    same = np.stack([(x @ x.T).ravel() for x in of])
    alike = np.stack([(x @ near[3 * slot:3 * slot + 3, 3 * slot:3 * slot + 3] @ x.T).ravel()
                      for slot, x in enumerate(of)])
    theta, y = np.random.default_rng(0).normal(-1, 0.5, 8), predictor._y
    gradient = _likelihood(theta, same, alike, y)[1]
    for index in range(8):
        step = np.zeros(8)
        step[index] = 1e-5
        slope = (_likelihood(theta + step, same, alike, y)[0] - _likelihood(theta - step, same, alike, y)[0]) / 2e-5
        assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_leaving_one_out_is_fitting_without_it() -> None:
    """The closed form against fitting anew, variances and warp kept."""
    values = table(3, pairs=0.3)
    predictor, known, _ = fit(values, 15)
    without = predictor.leave_one_out()
    warped = predictor.warp.warp(values[known])
    y = (warped - warped.mean()) / warped.std()
    covariance = predictor._kernel(predictor.x, predictor.x) + np.eye(15) * np.exp(predictor._theta[-1])
    for index in range(15):
        others = [other for other in range(15) if other != index]
        mean = covariance[index, others] @ np.linalg.solve(covariance[np.ix_(others, others)], y[others])
        expected = predictor.warp.unwarp(mean * warped.std() + warped.mean())
        assert without[index] == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_effects_of_choices_and_neighbours_are_found() -> None:
    """What `explain` adds up, for a table of neighbouring pairs alone, orders genotypes as the table does."""
    rng = np.random.default_rng(4)
    joint = rng.normal(size=(3, 3, 3))
    values = np.array([sum(joint[slot, g[slot], g[slot + 1]] for slot in range(3)) for g in GENOTYPES])
    predictor, _, rest = fit(values, 70)
    alone, pairs = predictor.explain()
    sums = np.array([sum(effect[i] for effect, i in zip(alone, g, strict=True))
                     + sum(pairs[slot][g[slot], g[slot + 1]] for slot in range(3)) for g in GENOTYPES])
    assert np.corrcoef(sums[rest], values[rest])[0, 1] > 0.7


def test_a_space_that_is_not_additive_says_so() -> None:
    sums, products = table(5, pairs=0.0), table(5, pairs=1.0)
    known = np.random.default_rng(0).permutation(81)[:50].tolist()
    genotypes = [GENOTYPES[index] for index in known]
    tau, error, additive = judge_predictor(SIZES, genotypes, sums[known])
    assert tau > 0.95 and additive < 0.1 * sums.std()
    tau, error, additive = judge_predictor(SIZES, genotypes, products[known])
    assert additive > 1.3 * error and 0.3 < tau < 1
    for values, says in ((sums, False), (products, True)):
        measured = [Measurement(GENOTYPES[index], {"psnr_drop_db": values[index]}) for index in known]
        assert ("the space is not additive" in describe_fit(SIZES, measured)) == says
        assert describe_fit(SIZES, measured[:5]) == ""


def test_a_warp_is_undone_and_keeps_the_order() -> None:
    values = np.array([0.1, 0.2, 0.25, 3.0, 50.0])
    warp = Warp(values, 1.0)
    assert warp.unwarp(warp.warp(values)) == pytest.approx(values)
    assert np.all(np.diff(warp.warp(values)) > 0) and np.ptp(warp.warp(values)) < 0.1 * np.ptp(values)


def test_slopes_of_a_warp_are_its_slopes() -> None:
    values, step = np.array([0.1, 0.2, 0.25, 3.0, 50.0]), 1e-6
    warp = Warp(values, 0.3)
    assert warp.slopes(values[1:]) == pytest.approx((warp.warp(values + step) - warp.warp(values - step))[1:] / 2e-6,
                                                    rel=1e-4)


def test_choices_are_as_alike_as_their_costs() -> None:
    near = liken(SIZES, [PRICES])
    assert np.array_equal(near, near.T) and np.all(np.diag(near) == 1.0) and np.all(np.linalg.eigvalsh(near) > -1e-9)
    assert near[1, 2] > 0.7 and near[0, 2] < 0.05 and near[6, 7] == 1.0 and near[7, 8] < 0.05
    assert not near[:3, 3:].any() and np.array_equal(liken(SIZES, []), np.eye(12))
    both = liken(SIZES, [PRICES, Tally(0.0, ((0.0, 1.0, 0.0),) * 4)])
    assert both[1, 2] < 0.05 and np.all(both <= near)


def test_what_is_alike_is_predicted_better_where_costs_tell_and_no_worse_where_they_do_not() -> None:
    """Effects that follow costs, and effects drawn anew: after 12 of 1,296 genotypes, of slots of six choices."""
    rng, sizes = np.random.default_rng(0), (6, 6, 6, 6)
    genotypes: list[Genotype] = list(itertools.product(range(6), repeat=4))
    gains: dict[str, list[float]] = {"follow": [], "drawn": []}
    for _ in range(6):
        costs = np.sort(rng.uniform(size=(4, 6)))
        effects = {"follow": 1 - costs**0.7, "drawn": rng.uniform(size=(4, 6))}
        known = rng.permutation(len(genotypes))[:12].tolist()
        given = [genotypes[index] for index in known]
        for kind, effect in effects.items():
            values = np.array([effect[range(4), genotype].sum() for genotype in genotypes])
            errors = []
            for near in (None, liken(sizes, [Tally(0.0, tuple(map(tuple, costs.tolist())))])):
                predictor = Predictor(sizes, given, values[known], learn(sizes, given, values[known], near), near)
                means = predictor.predict(predictor._encoding.encode(genotypes)).means
                errors.append(np.abs(predictor.warp.unwarp(means) - values).mean())
            gains[kind].append(errors[1] / errors[0])
    assert np.median(gains["follow"]) < 0.85 and np.median(gains["drawn"]) < 1.15
