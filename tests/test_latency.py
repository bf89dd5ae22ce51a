"""Latency tables: what a sum of slots predicts, how far it holds, and which picks and fronts follow from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ens.evaluate.latency import (
    Check,
    Entry,
    LatencyError,
    LatencyTable,
    Protocol,
    checked_genotypes,
    kendall_tau,
    read_table,
    write_table,
)
from ens.evaluate.meters import build_latency
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.objectives import find_objectives, read_quantity
from ens.pareto.selection import keep_within, pick_genotype, pick_objectives, select_front
from ens.runtime.profiling import plan_profile, read_results, write_bundle
from ens.space import Choice, Measurement, SearchSpace, Slot

PROTOCOL = Protocol(device="d", runtime="ort", version="1", threads=1, dtype="float32", height=64, width=64, repeats=9,
                    load="0.1")
SPACE = SearchSpace("s", (Slot("a", (Choice("restormer", 2, teacher=True), Choice("conv", 1))),
                          Slot("b", (Choice("restormer", 1, teacher=True), Choice("conv", 1)))))
OPTIONS = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 1, 1]}


def entry(ms: float) -> Entry:
    return Entry(ms=ms, quartiles_ms=(ms, ms))


TABLE = LatencyTable(protocol=PROTOCOL, rest=entry(1.0), slots={
    "a": {"restormer×2": entry(20.0), "conv×1": entry(4.0)}, "b": {"restormer×1": entry(10.0), "conv×1": entry(2.0)}})


def test_a_prediction_is_the_rest_and_one_entry_a_slot() -> None:
    assert [TABLE.predict_ms(SPACE, genotype) for genotype in ((0, 0), (1, 0), (0, 1), (1, 1))] == [31, 15, 23, 7]
    with torch.device("meta"):
        network = create_network("restormer", **OPTIONS)
    with pytest.raises(LatencyError, match="no restormer×1 in slot encoder_level1"):
        build_latency(TABLE, build_space("s", network, choices=[Choice("conv", 1)]))


def test_a_table_beyond_a_tenth_is_rough_and_says_so() -> None:
    for measured, rough in ((31.0 / 1.09, False), (31.0 / 1.12, True)):
        table = TABLE.model_copy(update={"checks": {"0-0": Check(predicted_ms=31.0, measured_ms=measured)}})
        assert table.is_rough == rough and table.quality.endswith("rough") == rough
        assert math.isclose(table.median_error, 31.0 / measured - 1)
        assert table.identity != TABLE.identity, "another table, another meter"
    assert "not checked" in TABLE.quality


def test_kendall_tau_counts_pairs() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert math.isclose(kendall_tau([1, 2, 3], [1, 3, 2]), 1 / 3) and math.isnan(kendall_tau([1], [1]))


def test_tables_come_back_from_disk_and_others_are_named(tmp_path: Path) -> None:
    write_table(tmp_path / "t.json", TABLE)
    assert read_table(tmp_path / "t.json") == TABLE
    (tmp_path / "t.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LatencyError, match="is no latency table"):
        read_table(tmp_path / "t.json")
    with pytest.raises(LatencyError, match="`ens profile` makes one"):
        read_table(tmp_path / "absent.json")


def test_slots_that_differ_in_nothing_share_a_file_and_sizes_share_it_too() -> None:
    with torch.device("meta"):
        network = create_network("restormer", **OPTIONS)
    space = build_space("s", network, choices=[Choice("conv", 1)])
    plan = plan_profile(network, space, height=64, width=60, checks=2, seed=0)
    parts = {part.name: part for group in plan.groups for part in group}
    assert plan.entries["decoder_level1"] == plan.entries["refinement"] != plan.entries["encoder_level1"]
    assert parts[plan.entries["latent"]["conv×1"]].shape == (1, 64, 8, 8), "60 is padded to 64"
    by_size = [plan.entries[slot]["conv×1"] for slot in ("encoder_level2", "decoder_level1")]
    assert by_size[0] != by_size[1] and parts[by_size[0]].stem == parts[by_size[1]].stem, "16 channels at two sizes"
    assert len(plan.groups[0]) == 3, "the rest and two hybrids"


@pytest.mark.slow
def test_a_bundle_runs_without_ens_and_its_results_are_a_table(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = create_network("restormer", **OPTIONS)
    space = build_space("s", network, slots={"latent": [Choice("conv", 1)]})
    plan = plan_profile(network, space, height=16, width=24, checks=1, seed=0)
    done: list[int] = []

    def write(stopped: bool) -> bool:
        return write_bundle(plan, tmp_path, runtime="ort", threads=1, repeats=2, passes=2,
                            should_stop=lambda: stopped, on_step=lambda number, total: done.append(number))

    assert not write(True) and write(False), "what is written stays"
    assert done == [1, 1, 2, 3, 4]
    with pytest.raises(LatencyError, match="is no result"):
        read_results(tmp_path / "results.json", space)
    subprocess.run([sys.executable, "-c", "import sys; sys.modules['ens'] = None; import runpy; "
                    f"runpy.run_path({str(tmp_path / 'run.py')!r}, run_name='__main__')"], check=True)
    table = read_results(tmp_path / "results.json", space)
    assert (table.protocol.height, table.protocol.width, table.protocol.repeats) == (16, 24, 4)
    assert table.rest.ms > 0 and all(one.ms > 0 for one in table.slots["latent"].values()) and len(table.checks) == 1
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    del results["done"]["1.0"]
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(LatencyError, match="1 groups of files were not timed"):
        read_results(tmp_path / "results.json", space)


def test_the_factor_of_slots_between_neighbours_comes_from_hybrids_that_check_nothing(tmp_path: Path) -> None:
    alone = {"restormer-2": 20.0, "conv-1a": 4.0, "restormer-1": 10.0, "conv-1b": 2.0}
    whole = {"fit-0-0": 1 + 0.8 * 30, "fit-1-1": 1 + 0.8 * 6, "fit-0-1": 1 + 0.7 * 22, "hybrid-1-0": 1 + 0.8 * 14}
    entries = {"a": {"restormer×2": "restormer-2", "conv×1": "conv-1a"},
               "b": {"restormer×1": "restormer-1", "conv×1": "conv-1b"}}
    plan = {"runtime": "ort", "threads": 1, "repeats": 1, "passes": 1, "entries": entries,
            "groups": [[{"name": "rest", "file": "rest.onnx", "shape": [1, 3, 64, 64]}]]}
    results = {"plan": plan, "facts": {"device": "d", "version": "1", "load": "0"},
               "done": {"0.0": {name: [ms] for name, ms in {"rest": 1.0, **alone, **whole}.items()}}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    table = read_results(path, SPACE)
    assert math.isclose(table.factor, 0.8) and math.isclose(table.slots["a"]["conv×1"].ms, 0.8 * 4)
    assert set(table.checks) == {"1-0"} and table.median_error < 1e-9
    results["done"]["0.0"]["rest"] = [90.0]
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(LatencyError, match="profile again"):
        read_results(path, SPACE)


def test_a_quarter_as_many_hybrids_give_the_factor_as_check_it() -> None:
    with torch.device("meta"):
        network = create_network("restormer", **OPTIONS)
    plan = plan_profile(network, build_space("s", network, choices=[Choice("conv", 1)]), height=64, width=64, checks=20,
                        seed=0)
    kinds = [part.name.partition("-")[0] for part in plan.groups[0]]
    assert (kinds.count("fit"), kinds.count("hybrid")) == (5, 20) and len(set(plan.groups[0])) == 26


def test_checked_genotypes_differ_and_end_with_the_space() -> None:
    assert sorted(checked_genotypes(SPACE, 20, 0)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert checked_genotypes(SPACE, 2, 0) == checked_genotypes(SPACE, 2, 0)


def test_an_objective_may_name_another_table() -> None:
    names = ("psnr_drop_db", "latency_ms", "latency_ms@phone")
    assert tuple(one.name for one in find_objectives(names)) == names
    with pytest.raises(ValueError, match="'macs@phone' does not exist"):
        find_objectives(("psnr_drop_db", "macs@phone"))


def measured() -> list[Measurement]:
    drops = {(0, 0): 0.0, (1, 0): 0.08, (0, 1): 0.3, (1, 1): 0.5}
    return [Measurement(genotype, {"psnr_drop_db": drop, "penalty": 4.0 - sum(genotype),
                                   "latency_ms": TABLE.predict_ms(SPACE, genotype)})
            for genotype, drop in drops.items()]


@pytest.mark.parametrize(("pick", "genotype"), [
    ("fastest-within=0.1", (1, 0)), ("fastest-within=1", (1, 1)), ("best-under=latency_ms:15", (1, 0)),
    ("best-under=latency_ms:100", (0, 0)), ("best-under=latency_ms:7", (1, 1)), ("within 0.1", (1, 0)),
    ("0-1", (0, 1))])
def test_picks_by_milliseconds(pick: str, genotype: tuple[int, ...]) -> None:
    front = select_front(measured(), pick_objectives(pick, ()) or ("psnr_drop_db", "latency_ms"))
    assert pick_genotype(pick, front=front, space=SPACE) == genotype


def test_the_fastest_is_that_of_the_device_that_was_searched_for() -> None:
    assert pick_objectives("fastest-within=0.1", ("psnr_drop_db", "latency_ms@phone"))[1] == "latency_ms@phone"
    assert pick_objectives("fastest-within=0.1", ("psnr_drop_db", "penalty"))[1] == "latency_ms"
    assert pick_objectives("best-under=latency_ms:5", ("psnr_drop_db", "latency_ms@phone"))[1] == "latency_ms"


@pytest.mark.parametrize(("pick", "words"), [
    ("best-under=latency_ms:5", "the least is 7"), ("best-under=flops:5", "'flops' does not exist"),
    ("fastest-within=fast", "is not understood"), ("best-under=5", "is not understood"), ("fastest", "not understood")])
def test_picks_that_cannot_be_are_told_why(pick: str, words: str) -> None:
    front = select_front(measured(), ("psnr_drop_db", "latency_ms"))
    with pytest.raises(ValueError, match=words):
        pick_genotype(pick, front=front, space=SPACE)


def test_bounds_leave_out_what_exceeds_them_and_keep_the_invalid() -> None:
    every = [*measured()[:3], replace(measured()[3], valid=False, note="x")]
    assert [one.genotype for one in keep_within(every, {"latency_ms": 20.0})] == [(1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"keeps within latency_ms 3 \(least: 15\)"):
        keep_within(every, {"latency_ms": 3.0})
    assert [read_quantity(text) for text in ("120", "200M", "1.5 G", "2k")] == [120, 2e8, 1.5e9, 2e3]
    for text in ("", "M", "1e400", "ten"):
        with pytest.raises(ValueError, match="is no number"):
            read_quantity(text)
