"""kill -9 at random moments of every verb, the short form of scripts/kill.py: the same command ends the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kill_nine_loses_only_the_work_in_flight(tmp_path: Path) -> None:
    """Same results as uninterrupted, no evaluation recorded twice, no stray file after the next run."""
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).parents[1] / "scripts" / "kill.py")
    assert spec is not None and spec.loader is not None
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    assert kill.campaign(tmp_path, kills=1, seed=20261121) == len(kill.VERBS)
