"""The additive front against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ens.pareto.front import non_dominated
from ens.search.additive import find_additive_front


def random_entries(slots: int, choices: int, objectives: int, seed: int) -> list[np.ndarray]:
    return [row for row in np.random.default_rng(seed).uniform(size=(slots, choices, objectives))]


def enumerate_front(entries: list[np.ndarray], pairs: list[np.ndarray]) -> np.ndarray:
    values = []
    for genotype in itertools.product(*(range(len(entry)) for entry in entries)):
        total = sum(entry[index] for entry, index in zip(entries, genotype, strict=True))
        values.append(total + sum(pair[genotype[slot], genotype[slot + 1]] for slot, pair in enumerate(pairs)))
    points = np.array(values)
    return points[non_dominated(points)]


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("start", range(0, 44, 6))
def test_the_front_of_every_window_of_a_table_is_that_of_enumeration(objectives: int, joined: bool, start: int) -> None:
    entries = random_entries(44, 5, objectives, seed=1)[start:start + 5]
    rng = np.random.default_rng(start)
    pairs = [rng.normal(0, 0.3, (5, 5, objectives)) for _ in entries[1:]] if joined else []
    genotypes, values = find_additive_front(entries, pairs)
    expected = enumerate_front(entries, pairs)
    assert np.sort(values, axis=0) == pytest.approx(np.sort(expected, axis=0))
    for genotype, value in zip(genotypes, values, strict=True):
        total = sum(entry[index] for entry, index in zip(entries, genotype, strict=True))
        total = total + sum(pair[genotype[slot], genotype[slot + 1]] for slot, pair in enumerate(pairs))
        assert total == pytest.approx(value)


def test_equal_choices_leave_one_genotype() -> None:
    genotypes, values = find_additive_front([np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])] * 2)
    assert len(genotypes) == len(values) == 3


def test_a_space_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="without slots"):
        find_additive_front([])
