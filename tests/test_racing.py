"""Racing: on every PSNR of 4,096 measured hybrids it changes no member of the front; what is stopped stays behind."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from ens.evaluate.racing import Race
from ens.objectives import objective_values, psnr_drop_db
from ens.pareto.archive import Archive
from ens.pareto.front import non_dominated
from ens.pareto.selection import select_front
from ens.run_folder import RunFolder
from ens.space import Choice, Genotype, Measurement, SearchSpace, Slot
from ens.workers import _start_race

TABLE = Path(__file__).resolve().parents[1] / "results" / "tables" / "denoise_demo.csv"
NAMES = ("psnr_drop_db", "latency_ms@one")


def read_table() -> dict[Genotype, Measurement]:
    """Hybrids of the shipped teacher on twelve photos, every one on all of them."""
    found = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            genotype = tuple(map(int, row["genotype"].split("-")))
            psnr_db = tuple(float(row[f"psnr_db_{index}"]) for index in range(12))
            found[genotype] = Measurement(genotype, {name: float(row[name]) for name in NAMES}, psnr_db)
    teacher = found[(0,) * 8].psnr_db
    return {genotype: Measurement(genotype, {**one.values, NAMES[0]: psnr_drop_db(
        teacher_psnr_db=teacher, psnr_db=one.psnr_db)}, one.psnr_db) for genotype, one in found.items()}


def race(table: dict[Genotype, Measurement], order: list[Genotype], batch: int) -> Iterator[Measurement]:
    """Every genotype in turn, image after image, against the front of the batches before."""
    front: list[Measurement] = []
    for start in range(0, len(order), batch):
        rivals, new = Race(front, NAMES[1:]), list[Measurement]()
        for one in map(table.__getitem__, order[start:start + batch]):
            new.append(one)
            for seen in range(1, len(one.psnr_db)):
                if found := rivals.judge(one.psnr_db[:seen], one.values):
                    new[-1] = Measurement(one.genotype, {**one.values, NAMES[0]: found[0]}, one.psnr_db[:seen],
                                          note=found[1])
                    break
        yield from new
        front += [one for one in new if len(one.psnr_db) == 12]
        front = [one for one, keep in zip(front, non_dominated(objective_values(front, NAMES)), strict=True) if keep]


@pytest.mark.parametrize("seed", [None, 0])
def test_racing_changes_no_member_of_the_front_and_saves_a_third_of_the_images(seed: int | None) -> None:
    table = read_table()
    order = sorted(table)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    raced = list(race(table, order, 64))
    images = sum(len(one.psnr_db) for one in raced)
    assert images <= 0.7 * 12 * 4096
    assert select_front(raced, NAMES).members == select_front(list(table.values()), NAMES).members
    stopped = [one for one in raced if len(one.psnr_db) < 12]
    errors = [one.values[NAMES[0]] - table[one.genotype].values[NAMES[0]] for one in stopped]
    assert all("is better" in one.note for one in stopped) and np.abs(errors).mean() < 0.1, "dB of the estimated drop"


def test_what_is_cheaper_or_may_be_better_is_never_stopped() -> None:
    rival = Measurement((1,), {"psnr_drop_db": 1.0, "macs": 5.0, "params": 2.0}, (30.0, 31.0, 29.0, 30.5))
    subject = Race([rival], ("macs", "params"))
    worse = (29.0, 29.9, 28.05)
    drop, note = subject.judge(worse, {"macs": 5.0, "params": 2.0}) or (0.0, "")
    assert drop == pytest.approx(1.0 + np.mean([1.0, 1.1, 0.95])) and note == "stopped after 3 of 4 images: 1 is better"
    assert subject.judge(worse, {"macs": 4.9, "params": 3.0}) is None, "it costs less of one of them"
    assert subject.judge(worse[:1], {"macs": 5.0, "params": 2.0}) is None, "one image says nothing of others"
    assert subject.judge((29.0, 31.5, 28.05), {"macs": 5.0, "params": 2.0}) is None, "images disagree"
    assert subject.judge((29.0, 30.0, float("inf")), {"macs": 5.0, "params": 2.0}) is None
    assert Race([], ("macs",)).judge(worse, {"macs": 5.0}) is None


def test_images_that_happen_to_agree_stop_nothing() -> None:
    """Front members differ by tenths of a dB from image to image; three images on which a genotype lacks 0.02 dB of one
    of them, again and again, say less than their own spread does. A lack of 1 dB is told by as few.
    """
    rng = np.random.default_rng(0)
    members = 30 + rng.normal(0, 2, 12) + rng.normal(0, 0.1, (6, 12))
    front = [Measurement((index,), {"psnr_drop_db": 1.0, "macs": 5.0}, tuple(psnr_db))
             for index, psnr_db in enumerate(members)]
    subject, spread = Race(front, ("macs",)), np.array([1e-4, -1e-4, 0.0])
    assert subject.judge((members[0, :3] - 0.02 + spread).tolist(), {"macs": 5.0}) is None
    assert subject.judge((members[0, :3] - 1.0 + spread).tolist(), {"macs": 5.0})


def test_the_front_to_beat_follows_from_whole_batches_alone_and_from_what_may_still_be_searched() -> None:
    """Whoever shares a batch or goes on with it after a kill races against the same rivals."""
    table = list(read_table().values())[:20]
    space = SearchSpace("raced", tuple(Slot(f"slot{number}", (Choice("restormer", 1, teacher=True),
                                                              *(Choice("conv", depth) for depth in range(1, 4))))
                                       for number in range(8)))
    study = SimpleNamespace(search=SimpleNamespace(objectives=NAMES, batch_size=8))
    run = cast(RunFolder, SimpleNamespace(study=study, validation=SimpleNamespace(images=range(12))))

    def rivals(count: int, searched: SearchSpace = space) -> set[Genotype]:
        archive = cast(Archive, SimpleNamespace(measurements=lambda: table[:count]))
        found = _start_race(run, archive, searched)
        return {one.genotype for one in found._front} if found else set()

    assert rivals(7) == set() and rivals(8) == rivals(15) and rivals(16) == rivals(20)
    assert rivals(16) == {one.genotype for one in select_front(table[:16], NAMES).members}
    assert not any(genotype[7] == 3 for genotype in rivals(16, space.restrict(fix={"slot7": "conv×1"}, forbid=())))
