"""Ray: two nodes distil and search, one of them dies at each, and what comes out is what one process makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from test_pipeline import STUDY

from ens import pipeline, workers
from ens.config import StudyConfig, load_study
from ens.run_folder import RunFolder
from ens.runtime.process import Control, Interrupted
from ens.workers import join_cluster

ROOT = Path(__file__).resolve().parents[1]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def make_study(folder: Path) -> StudyConfig:
    path = folder / "tiny.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return load_study(path, {"threads": 1, "distill": {"steps": 40, "patch_px": 24}, "search": {"race": True},
                             "data": {"limit": 4}})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A head and a second node, each with one process and this checkout."""
    # Workers are niced to 15 otherwise: on a busy machine they would not get as far as importing PyTorch.
    for name, value in {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}.items():
        monkeypatch.setenv(name, value)
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a dead node is missed
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": soon})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_distils_and_finds_what_one_process_does(
        tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study, lost = make_study(tmp_path), list[str]()
    run = RunFolder.start(study, tmp_path / "there")

    def lose_when(is_busy: Callable[[], bool], verb: str) -> Control:
        node = cluster.add_node(**NODE)

        def look(*_: object) -> bool:
            if verb not in lost and is_busy():
                cluster.remove_node(node, allow_graceful=False)
                lost.append(verb)
            return False

        return Control(progress=look, should_stop=look)

    join_cluster(cluster.address)
    pipeline.distill_spread(run, lose_when(lambda: len(list(run.path.glob("library.*/manifest.json"))) == 2, "distill"))
    # Ctrl-C while every process of the cluster is at work.
    monkeypatch.setattr(workers, "_LOOK_S", 0.01)
    with pytest.raises(Interrupted):
        pipeline.search(run, Control(should_stop=lambda: True), ray=True)
    assert not run.archive.known()
    found = pipeline.search(run, lose_when(lambda: run.has_archive and bool(run.archive.known()), "search"), ray=True)
    assert lost == ["distill", "search"]
    alone = RunFolder.start(study, tmp_path / "here")
    assert found == pipeline.search(alone) and len(found) == 9
    assert run.library.surrogates == alone.library.surrogates and len(run.library.surrogates) == 4
    assert sorted(path.name for path in run.path.iterdir()) == sorted(path.name for path in alone.path.iterdir())
