"""The search loop: budget, duplicates, resume, invalid measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest

from ens.search import ENGINES, create_engine
from ens.search.loop import run_search
from ens.space import Choice, Genotype, Measurement, SearchSpace, Slot

SPACE = SearchSpace("loop", tuple(Slot(name, (Choice("restormer", 2, teacher=True), Choice("vssd", 1),
                                              Choice("conv", 1))) for name in "abcd"))
NAMES = ("psnr_drop_db", "macs")


class Killed(BaseException):
    """What a killed process looks like from inside: nothing after it runs."""


def measure(genotype: Genotype) -> Measurement:
    drop = sum((slot + 1) * index ** 1.5 for slot, index in enumerate(genotype)) + genotype[0] * genotype[2]
    if genotype[:2] == (1, 2):
        return Measurement(genotype, {"psnr_drop_db": math.nan, "macs": 1.0}, valid=False, note="PSNR is not finite")
    return Measurement(genotype, {"psnr_drop_db": drop, "macs": 9.0 - sum(genotype)})


class Run:
    """An archive in memory, an evaluator that counts, and a process that dies after some records."""

    def __init__(self) -> None:
        self.archive: dict[Genotype, Measurement] = {}
        self.evaluated: list[Genotype] = []

    def go(self, engine: str, *, budget: int, batch_size: int, die_after: int | None = None) -> None:
        def evaluate(batch: list[Genotype]) -> Iterator[Measurement]:
            for genotype in batch:
                self.evaluated.append(genotype)
                yield measure(genotype)

        def record(measurement: Measurement) -> None:
            self.archive[measurement.genotype] = measurement
            if die_after is not None and len(self.archive) >= die_after:
                raise Killed

        run_search(engine=create_engine(engine, SPACE, seed=1), objectives=NAMES, known=dict(self.archive),
                   evaluate=evaluate, record=record, budget=budget, batch_size=batch_size)


@pytest.mark.parametrize(("engine", "batch_size"), [
    *((engine, 1) for engine in ENGINES), *((engine, 4) for engine in ENGINES if engine != "ehvi"),
    pytest.param("ehvi", 4, marks=pytest.mark.slow)])
def test_a_killed_search_ends_with_the_archive_of_one_that_ran_through(engine: str, batch_size: int) -> None:
    whole, broken = Run(), Run()
    whole.go(engine, budget=22, batch_size=batch_size)
    for die_after in (1, 6, 7, 15, 20):
        with pytest.raises(Killed):
            broken.go(engine, budget=22, batch_size=batch_size, die_after=die_after)
    broken.go(engine, budget=22, batch_size=batch_size)
    assert list(broken.archive.items()) == list(whole.archive.items())
    assert len(set(broken.evaluated)) == len(broken.evaluated) == 22, "nothing is measured twice"


@pytest.mark.parametrize("engine", ["nsga2", "tpe"])
def test_a_larger_budget_continues_as_if_it_had_been_given_at_once(engine: str) -> None:
    at_once, extended = Run(), Run()
    at_once.go(engine, budget=26, batch_size=4)
    for budget in (10, 11, 26):
        extended.go(engine, budget=budget, batch_size=4)
    assert set(extended.archive) == set(at_once.archive)


def test_exhaustive_search_equals_a_brute_force_loop_and_stops_at_the_end() -> None:
    run = Run()
    run.go("exhaustive", budget=1000, batch_size=7)
    brute_force = {(a, b, c, d): measure((a, b, c, d))
                   for a in range(3) for b in range(3) for c in range(3) for d in range(3)}
    assert repr(run.archive) == repr(brute_force)


def test_a_finished_search_measures_nothing() -> None:
    run = Run()
    run.go("random", budget=9, batch_size=2)
    run.go("random", budget=9, batch_size=2)
    assert len(run.evaluated) == 9


class Spy:
    """An engine that only writes down what it is told."""

    def __init__(self) -> None:
        self.inner = create_engine("random", SPACE, seed=0)
        self.asked = 0
        self.rows: dict[Genotype, list[float]] = {}

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        self.asked += 1
        return self.inner.ask(n, pending)

    def tell(self, genotypes: list[Genotype], values: object) -> None:
        self.rows.update(zip(genotypes, values.tolist(), strict=True))
        self.inner.tell(genotypes, values)


def test_replay_asks_only_for_what_is_not_known_and_tells_invalid_as_nan() -> None:
    known = {genotype: measure(genotype) for genotype in list(SPACE.enumerate())[30:70]}
    spy = Spy()
    run_search(engine=spy, objectives=NAMES, known=known, evaluate=lambda batch: map(measure, batch),
               record=lambda _: None, budget=42, batch_size=1)
    assert spy.asked == 2 and set(known) <= set(spy.rows)
    for genotype, row in spy.rows.items():
        assert all(map(math.isnan, row)) == (genotype[:2] == (1, 2))


def test_progress_counts_every_measurement() -> None:
    steps: list[tuple[int, int]] = []
    run_search(engine=create_engine("random", SPACE, seed=0), objectives=NAMES, known={},
               evaluate=lambda batch: map(measure, batch), record=lambda _: None, budget=5, batch_size=2,
               progress=lambda done, budget: steps.append((done, budget)))
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_an_evaluator_that_skips_or_swaps_genotypes_is_an_error() -> None:
    for evaluate, message in ((lambda batch: [], "no measurement"),
                              (lambda batch: [measure((2, 2, 2, 2))], "not asked for"),
                              (lambda batch: [measure(batch[0])] * 2, "not asked for")):
        with pytest.raises(RuntimeError, match=message):
            run_search(engine=create_engine("exhaustive", SPACE, seed=0), objectives=NAMES, known={},
                       evaluate=evaluate, record=lambda _: None, budget=5, batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_patience_ends_a_search_where_the_front_stopped_growing_however_often_it_is_resumed(batch_size: int) -> None:
    """In lexicographic order the first row of the table holds the front: every later drop is larger."""
    def go(known: dict[Genotype, Measurement], budget: int) -> list[Measurement]:
        return run_search(engine=create_engine("exhaustive", SPACE, seed=0), objectives=NAMES, known=known,
                          record=lambda _: None, budget=budget, batch_size=batch_size, patience=8,
                          evaluate=lambda batch: [Measurement(one, {"psnr_drop_db": float(10 * one[0] + sum(one)),
                                                                    "macs": float(sum(one))}) for one in batch])

    whole = go({}, 80)
    assert len(whole) == (9 if batch_size == 1 else 12), "nothing is better than the first; whole batches are told"
    for budget in (3, 7, 80):
        part = go({one.genotype: one for one in whole[:budget]}, 80)
        assert part == whole


def test_mistakes_are_told() -> None:
    for budget, batch_size, names, message in ((0, 1, NAMES, "at least 1"), (5, 0, NAMES, "at least 1"),
                                               (5, 1, ("psnr",) * 2, "'psnr' does not exist")):
        with pytest.raises(ValueError, match=message):
            run_search(engine=create_engine("random", SPACE, seed=0), objectives=names, known={},
                       evaluate=lambda batch: [], record=lambda _: None, budget=budget, batch_size=batch_size)


def test_an_exhaustive_search_looks_at_every_genotype_once() -> None:
    """Entries looked at, not seconds: a quadratic walk would look at thirty million."""
    looked = 0

    class CountedSpace(SearchSpace):
        def enumerate(self) -> Iterator[Genotype]:
            nonlocal looked
            for genotype in super().enumerate():
                looked += 1
                yield genotype

    choices = (Choice("restormer", 1, teacher=True), *(Choice("conv", depth) for depth in range(1, 6)))
    space = CountedSpace("table", tuple(Slot(str(index), choices) for index in range(5)))  # 7,776
    engine = create_engine("exhaustive", space, seed=0)
    measured = run_search(engine=engine, objectives=("psnr_drop_db", "macs"), known={},
                          evaluate=lambda batch: [Measurement(genotype, {"psnr_drop_db": 0.0, "macs": 1.0})
                                                  for genotype in batch],
                          record=lambda measurement: None, budget=10_000)
    assert len(measured) == looked == space.num_genotypes
