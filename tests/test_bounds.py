"""Bounds: no engine asks for what exceeds one, every allowed genotype is found, and what nobody can meet is refused."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from ens.search import ENGINES, create_engine
from ens.search.bounds import Bound, narrow_space
from ens.space import Choice, Genotype, SearchSpace, Slot, Tally


def space_of(*sizes: int) -> SearchSpace:
    return SearchSpace("s", tuple(
        Slot(f"slot{number}", (Choice("restormer", 2, teacher=True), *(Choice("conv", 1 + index)
                                                                      for index in range(size - 1))))
        for number, size in enumerate(sizes)))


def bound(name: str, value: float, tally: Tally) -> Bound:
    def measure(genotype: Genotype) -> float:
        return tally.join(tally.rest, *(row[index] for row, index in zip(tally.entries, genotype, strict=True)))

    return Bound(name, value, measure, tally)


def random_tally(space: SearchSpace, seed: int, *, is_maximum: bool = False) -> Tally:
    rng = np.random.default_rng(seed)
    return Tally(1.0, tuple(tuple(rng.uniform(0, 10, size).tolist()) for size in space.sizes), is_maximum)


SMALL = space_of(3, 3, 3, 3)
SUM = random_tally(SMALL, 1)
PEAK = random_tally(SMALL, 2, is_maximum=True)
BOUNDS = [bound("macs", SUM.least + 12, SUM), bound("peak_bytes", 8.0, PEAK)]
ALLOWED = [genotype for genotype in SMALL.enumerate() if all(one.measure(genotype) <= one.value for one in BOUNDS)]


def test_enumeration_count_and_samples_are_those_that_keep_the_bounds() -> None:
    narrow, rng = narrow_space(SMALL, BOUNDS), np.random.default_rng(0)
    assert 0 < len(ALLOWED) < 40
    assert list(narrow.enumerate()) == ALLOWED and narrow.num_genotypes == len(ALLOWED)
    assert {narrow.sample(rng) for _ in range(40 * len(ALLOWED))} == set(ALLOWED)
    assert all(narrow.repair(genotype, rng) == genotype for genotype in ALLOWED)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_asks_for_all_that_is_allowed_and_nothing_else(engine: str) -> None:
    subject, asked = create_engine(engine, narrow_space(SMALL, BOUNDS), seed=3), []
    while batch := subject.ask(3):
        asked += batch
        subject.tell(batch, np.array([[BOUNDS[0].measure(genotype), -sum(genotype)] for genotype in batch]))
    assert sorted(asked) == ALLOWED


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ehvi"])
def test_a_needle_in_a_large_space_is_found_in_no_time(engine: str) -> None:
    """5^20 genotypes, of which one in billions is within the bound."""
    space = space_of(*(5,) * 20)
    tally = random_tally(space, 5)
    narrow, asked, began = narrow_space(space, [bound("macs", tally.least + 1.5, tally)]), set(), time.monotonic()
    subject = create_engine(engine, narrow, seed=0)
    for _ in range(20):
        (genotype,) = subject.ask(1)
        subject.tell([genotype], np.array([[tally.join(*genotype), 1.0 + sum(genotype)]]))
        assert narrow.allows(genotype)
        asked.add(genotype)
    assert len(asked) == 20 and time.monotonic() - began < 20


def test_bounds_hold_in_slots_that_are_closed_to_the_teacher() -> None:
    slots = (replace(SMALL.slots[0], closed=True), *SMALL.slots[1:])
    subject, asked = create_engine("random", narrow_space(replace(SMALL, slots=slots), BOUNDS), seed=3), []
    while batch := subject.ask(3):
        asked += batch
        subject.tell(batch, np.array([[1.0, -sum(genotype)] for genotype in batch]))
    assert sorted(asked) == [genotype for genotype in ALLOWED if genotype[0]]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bounded", [False, True])
def test_every_engine_keeps_to_what_is_fixed_and_forbidden(engine: str, bounded: bool) -> None:
    """Also where others measure, or have measured, what is left out."""
    left = SMALL.restrict(fix={"slot1": "conv×2"}, forbid=["restormer"])
    bounds = [bound("macs", SUM.least + 12, SUM)] if bounded else []
    expected = [one for one in SMALL.enumerate()
                if all(one) and one[1] == 2 and all(limit.measure(one) <= limit.value for limit in bounds)]
    narrow, rng = narrow_space(left, bounds), np.random.default_rng(0)
    assert 2 < len(expected) <= (7 if bounded else 8)
    assert list(narrow.enumerate()) == expected and narrow.num_genotypes == len(expected)
    assert {narrow.sample(rng) for _ in range(40 * len(expected))} == set(expected)
    subject, asked = create_engine(engine, narrow, seed=3), list[Genotype]()
    subject.tell([(0, 0, 0, 0), (1, 1, 1, 1)], np.array([[1.0, 2.0], [3.0, 4.0]]))
    while batch := subject.ask(3, [(0, 1, 2, 0)]):
        asked += batch
        subject.tell(batch, np.array([[SUM.value(genotype), -sum(genotype)] for genotype in batch]))
    assert sorted(asked) == expected


@pytest.mark.parametrize(("fix", "forbid", "message"), [
    ({"slot9": "conv×1"}, [], "searches no slot 'slot9' .did you mean slot.\\?.; it has slot0, slot1"),
    ({}, ["cnov"], "searches no family 'cnov' .did you mean conv\\?.; it has conv, restormer"),
    ({"slot1": "conv×9"}, [], "conv×1, conv×2: it is fixed to conv×9 .did you mean conv×.\\?.$"),
    ({"slot1": "conv×1"}, ["conv"], r"it is fixed to conv×1; forbidden: conv$"),
    ({"slot1": "conv"}, [], "choice 'conv' is not understood")])
def test_what_cannot_be_fixed_or_forbidden_is_refused(fix: dict[str, str], forbid: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.restrict(fix=fix, forbid=forbid)


def test_what_no_genotype_can_meet_is_refused_with_the_least_there_is() -> None:
    with pytest.raises(ValueError, match=r"no genotype has macs of at most 0.1; the least there is, is [\d.]+$"):
        narrow_space(SMALL, [bound("macs", 0.1, SUM)])
    cheap = Tally(0.0, ((0.0, 1.0), (0.0, 1.0)))
    dear = Tally(0.0, ((1.0, 0.0), (1.0, 0.0)))
    with pytest.raises(ValueError, match=r"all bounds at once: macs 0.5 \(the least alone is 0\), params 0.5"):
        narrow_space(space_of(2, 2), [bound("macs", 0.5, cheap), bound("params", 0.5, dear)])


def test_without_bounds_the_space_is_what_it_was() -> None:
    assert narrow_space(SMALL, []) is SMALL
