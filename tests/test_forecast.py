"""What a study takes: in proportion to its keys, for what is left of it, and what makes it shorter is said."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ens.config import build_study
from ens.forecast import Cost, Forecast, forecast
from ens.networks.steps import Network
from ens.run_folder import RunFolder
from ens.runtime.process import format_duration

STUDY = {"name": "s", "task": {"name": "denoise"}, "choices": ["conv×1", "restormer×1"], "granularity": "block",
         "network": {"name": "restormer", "dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1,
                     "heads": [1, 1, 1, 1]},
         "data": {"train": "builtin:train-photos", "crop_px": 32, "limit": 2},
         "train": {"steps": 100, "phases": [[0, 16, 2], [50, 32, 2]]},
         "distill": {"steps": 10, "batch_size": 2, "patch_px": 16, "group_size": 5},
         "search": {"objectives": ["psnr_drop_db", "macs"], "budget": 20},
         "finetune": {"steps": 10, "phases": [[0, 16, 2]]}}


def costs(folder: Path, **changes: Any) -> dict[str, Cost]:
    """Costs by verb where every piece of the pilot takes a second."""
    ticks = itertools.count()
    run = RunFolder(folder, build_study({**STUDY, **changes}, folder=folder))
    found = forecast(run, clock=lambda: float(next(ticks)))
    assert found is not None and found.memory_bytes > 0 and found.disk_bytes > 0
    return {cost.verb: cost for cost in found.costs}


def test_a_cost_is_the_seconds_of_its_pieces_times_their_number(tmp_path: Path) -> None:
    found = costs(tmp_path)
    assert list(found) == ["train", "distill", "search", "finetune", "export"]
    jobs, groups, patches, unseen = 8, 2, 2, 4  # restormer×1 is what the teacher has
    step = (groups + jobs) * patches
    assert found["distill"].seconds == pytest.approx(10 * step + unseen * (groups + jobs / 3) * patches)
    assert found["train"].seconds == pytest.approx(50 * 2 + 50 * 4 * 2), "twice the side is four times as many pixels"
    twice = costs(tmp_path, distill={**STUDY["distill"], "steps": 20}, search={**STUDY["search"], "budget": 40})
    assert twice["distill"].seconds - found["distill"].seconds == pytest.approx(10 * step)
    teacher = 2 * 1.0  # two crops
    assert twice["search"].seconds - teacher == pytest.approx(2 * (found["search"].seconds - teacher))


def test_networks_that_are_timed_together_are_held_together(tmp_path: Path) -> None:
    def held(side: int, checks: int) -> float:
        study = build_study({**STUDY, "search": {"objectives": ["psnr_drop_db", "latency_ms"], "budget": 20},
                             "latency": {"size": [side, side], "checks": checks}}, folder=tmp_path)
        found = forecast(RunFolder(tmp_path, study), clock=itertools.count().__next__)
        assert found is not None
        return found.memory_bytes

    # 1 + 4 + 1 whole networks of at least the widest map in four copies; of 16 + 4, four times as many.
    few, many = held(512, 4), held(512, 16)
    assert few > held(64, 4) + 6 * 4 * (4 * 8 * 512**2) / 2 and many - few > 2 * 8 * 4 * (4 * 8 * 512**2) / 2


def test_a_search_alone_costs_what_comes_until_it() -> None:
    costs = tuple(Cost(verb, 60.0, "") for verb in ("distill", "search", "finetune"))
    assert Forecast(costs, 0.0, 0.0).until("search") == Forecast(costs[:2], 0.0, 0.0)


def test_what_is_there_already_costs_nothing(tmp_path: Path) -> None:
    found = costs(tmp_path, network={}, library="builtin:denoise_demo", choices=["conv×1"], granularity="stage")
    assert list(found) == ["search", "finetune", "export"]


def test_a_pilot_leaves_no_file_and_the_network_as_it_is(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, build_study({**STUDY, "network": {}, "library": "builtin:denoise_demo",
                                           "choices": ["conv×1"], "granularity": "stage"}, folder=tmp_path))
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    assert forecast(run) is not None
    assert isinstance(run.teacher, Network) and not run.teacher.training and not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], value) for name, value in run.teacher.state_dict().items())


def test_a_long_study_is_told_what_would_make_it_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    distill = Cost("distill", 10 * 86400.0, "", "distill.steps", 20000, 43.2)
    search = Cost("search", 10 * 3600.0, "", "search.budget", 500, 72.0)
    long = Forecast((distill, search), 2**31, 2**30)
    assert long.describe() == ("about 10 days on this machine (distill 10 days, search 10 hours), 2.0 GiB of memory, "
                               "1.0 GiB of disk; `distill.steps=2000` would take 34 hours")
    assert not Forecast((search,), 0, 0).suggest(), "what takes a night is not long"
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.5, 0.5))
    assert long.describe().startswith("about 10 days on this machine, as busy as it is now (load 99)")
    phases = Cost("finetune", 4e6, "", "finetune.steps", 300000, 1.0, " `finetune.phases=[[0, 128, 8]]`")
    assert "`finetune.steps=30000` `finetune.phases=[[0, 128, 8]]` would take 8 hours" in Forecast(
        (phases,), 0, 0).describe()


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"),
                                               (93600, "26 hours"), (11 * 86400, "11 days"), (1e9, "11,574 days")])
def test_durations_are_in_the_unit_people_count_in(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
