"""The engine `exact`: its expected gain against simulation, costs in any order, large spaces, resuming."""

from __future__ import annotations

import itertools

import moocore
import numpy as np
import pytest

from ens.pareto.front import hypervolume
from ens.search import create_engine
from ens.search.exact import ExactEngine, _Chooser
from ens.search.predictor import Predictor, learn
from ens.space import Choice, Genotype, SearchSpace, Slot, Tally


def space_of(*sizes: int) -> SearchSpace:
    return SearchSpace("table", tuple(
        Slot(f"slot{number}", (Choice("restormer", 4, teacher=True), *(Choice("vssd", d) for d in range(1, size))))
        for number, size in enumerate(sizes)))


def tally_of(space: SearchSpace, rng: np.random.Generator, *, dearer: bool) -> Tally:
    """Effects or prices a choice; the teacher's is the best of the one and the dearest of the other."""
    return Tally(0.0, tuple(tuple(np.sort(rng.uniform(0.1, 1.0, size))[::-1 if dearer else 1].tolist())
                            for size in space.sizes))


@pytest.mark.parametrize("num_costs", [1, 2])
def test_the_expected_improvement_is_the_mean_over_what_may_be_measured(num_costs: int) -> None:
    """Closed form against drawing values and computing hypervolumes by moocore."""
    rng = np.random.default_rng(0)
    sizes = (3, 3, 3)
    genotypes = list(itertools.product(range(3), repeat=3))
    measured, asked = genotypes[::3], [genotypes[1], genotypes[14], genotypes[26]]
    drops = np.array([0.3 * sum(genotype) + rng.normal(0, 0.1) for genotype in measured])
    predictor = Predictor(sizes, measured, drops, learn(sizes, measured, drops))
    costs = rng.uniform(0.2, 0.8, (len(asked), num_costs))
    points = np.column_stack([predictor.warp.warp(drops), rng.uniform(0.2, 1.0, (len(drops), num_costs))])
    corner = np.array([points[:, 0].max(), *[1.1] * num_costs])
    belief = predictor.predict(predictor._encoding.encode(asked))
    gains = _Chooser(belief, costs, points, corner)._improvement()
    base = moocore.hypervolume(points, ref=corner)
    for index in range(len(asked)):
        draws = rng.normal(belief.means[index], belief.deviations[index], 4000)
        more = [moocore.hypervolume(np.vstack([points, [value, *costs[index]]]), ref=corner) - base for value in draws]
        assert gains[index] == pytest.approx(np.mean(more), abs=4 * np.std(more) / np.sqrt(len(more)) + 1e-9)


def test_what_is_taken_for_measured_is_uncertain_no_more_and_its_relatives_less() -> None:
    sizes, rng = (3, 3, 3), np.random.default_rng(1)
    genotypes = list(itertools.product(range(3), repeat=3))
    measured, values = genotypes[:6], rng.normal(size=6)
    learned = learn(sizes, measured, values)
    predictor = Predictor(sizes, measured, values, learned)
    belief = predictor.predict(predictor._encoding.encode(genotypes))
    before, means = belief.deviations, belief.means.copy()
    belief.take(26)
    assert belief.deviations[26] < 0.7 * before[26] and np.all(belief.deviations <= before + 1e-9)
    more = Predictor(sizes, [*measured, genotypes[26]], np.append(values, predictor.warp.unwarp(means[26:27])), learned)
    assert np.array_equal(belief.means, means)
    again = more.predict(more._encoding.encode(genotypes)).deviations / more._scale
    assert again == pytest.approx(belief.deviations / predictor._scale, rel=1e-6)


def replay(engine: ExactEngine, drops: Tally, costs: Tally, budget: int, *, swapped: bool = False) -> list[Genotype]:
    order: list[Genotype] = []
    while len(order) < budget:
        batch = engine.ask(min(4, budget - len(order)))
        rows = np.array([[drops.value(genotype), costs.value(genotype)] for genotype in batch])
        engine.tell(batch, rows[:, ::-1] if swapped else rows)
        order += batch
    return order


def test_the_order_of_the_objectives_changes_nothing() -> None:
    space, rng = space_of(3, 3, 3, 3), np.random.default_rng(2)
    drops, costs = tally_of(space, rng, dearer=False), tally_of(space, rng, dearer=True)
    usual = ExactEngine(space, seed=0, costs=[None, costs], reference=[3.0, 5.0])
    other = ExactEngine(space, seed=0, costs=[costs, None], reference=[5.0, 3.0])
    assert replay(usual, drops, costs, 30) == replay(other, drops, costs, 30, swapped=True)


def test_a_replayed_history_asks_for_the_same_however_often_it_was_asked() -> None:
    space, rng = space_of(3, 3, 3, 3), np.random.default_rng(3)
    drops, costs = tally_of(space, rng, dearer=False), tally_of(space, rng, dearer=True)
    first = ExactEngine(space, seed=0, costs=[None, costs])
    order = replay(first, drops, costs, 40)
    again = ExactEngine(space, seed=0, costs=[None, costs])
    for start in range(0, 40, 4):
        again.tell(order[start:start + 4], np.array([[drops.value(g), costs.value(g)] for g in order[start:start + 4]]))
    assert again.ask(4) == first.ask(4)


def test_the_front_of_a_space_too_large_to_list_is_found() -> None:
    """20 slots of 4: 10^12 genotypes, whose additive front is known exactly."""
    from ens.search.additive import find_additive_front

    space, rng = space_of(*[4] * 20), np.random.default_rng(4)
    drops, costs = tally_of(space, rng, dearer=False), tally_of(space, rng, dearer=True)
    entries = [np.column_stack(pair) for pair in zip(drops.entries, costs.entries, strict=True)]
    values = find_additive_front(entries)[1]
    corner = values.max(axis=0) * 1.1
    engine = create_engine("exact", space, seed=0, costs=[None, costs], reference=corner.tolist())
    assert isinstance(engine, ExactEngine)
    order = replay(engine, drops, costs, 80)
    reached = hypervolume(np.array([[drops.value(g), costs.value(g)] for g in order]), corner.tolist())
    assert reached >= 0.9 * hypervolume(values, corner.tolist())


def test_costs_that_nobody_gave_are_sums_fitted_to_what_was_measured() -> None:
    space, rng = space_of(3, 3, 3, 3), np.random.default_rng(5)
    drops, costs = tally_of(space, rng, dearer=False), tally_of(space, rng, dearer=True)
    order = replay(ExactEngine(space, seed=0), drops, costs, 40)
    values = np.array([[drops.value(g), costs.value(g)] for g in space.enumerate()])
    corner = (values.max(axis=0) * 1.1).tolist()
    reached = hypervolume(np.array([[drops.value(g), costs.value(g)] for g in order]), corner)
    assert reached >= 0.99 * hypervolume(values, corner)
