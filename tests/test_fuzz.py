"""Damaged files of every kind, the short form of scripts/fuzz.py: each opens or ends in a sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_damaged_file_opens_or_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    spec = importlib.util.spec_from_file_location("fuzz", root / "scripts" / "fuzz.py")
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    assert fuzz.fuzz(220, seed=1, seconds=120, folder=tmp_path / "cases") == []
