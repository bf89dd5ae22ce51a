"""Files are timed in turn, and the ratio is of what ran side by side."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ens.networks import create_network
from ens.networks.checkpoints import save_checkpoint
from ens.runtime.bench import bench_files, quartiles
from ens.runtime.runner import time_in_turn


def test_runs_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    spent = time_in_turn([lambda: order.append("a"), lambda: order.append("b")], repeats=3)
    assert order == ["a", "b"] * 4 and [len(times) for times in spent] == [3, 3]


def test_a_slow_run_is_timed_once_a_pass_and_never_at_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run of a large image touches its memory for the first time, and takes several times as long."""
    monkeypatch.setattr("ens.runtime.runner.SLOW_MS", 1.0)
    naps = iter([0.2, 0.005])
    slow, fast = time_in_turn([lambda: time.sleep(next(naps)), lambda: None], repeats=6)
    assert len(slow) == 1 and len(fast) == 6 and slow[0] < 100


def test_the_larger_network_is_slower_and_the_first_is_the_measure(tmp_path: Path) -> None:
    for name, dim in (("small", 8), ("large", 32)):
        network = create_network("restormer", dim=dim, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1)
        save_checkpoint(tmp_path / f"{name}.safetensors", network, facts={})
    large, small = bench_files([tmp_path / "large.safetensors", tmp_path / "small.safetensors"], height=64, width=48,
                               threads=1, repeats=5)
    assert large.times_as_fast == 1.0 and small.times_as_fast > 1.5 and small.median_ms < large.median_ms
    with pytest.raises(ValueError, match="multiples of 8, not 60x48"):
        bench_files([tmp_path / "small.safetensors"], height=60, width=48)


def test_quartiles_are_those_of_the_middle_half() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0) and quartiles([7.0]) == (7.0, 7.0)
