"""The archive: an Optuna study that survives kill -9, refuses other configurations and second writers."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.process
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from ens.pareto.archive import Archive, ArchiveLocked, ArchiveMismatch, open_archive, read_archive
from ens.search import create_engine
from ens.search.loop import run_search
from ens.space import Choice, Genotype, Measurement, SearchSpace, Slot

NAMES = ("psnr_drop_db", "macs")
MANIFEST = {"seed": 3, "engine": "random", "protocol": {"name": "denoise-color-awgn", "sigma_255": 25}}


def space_of(*labels: str) -> SearchSpace:
    choices = (Choice("restormer", 2, teacher=True), *(Choice(label, 1) for label in labels))
    return SearchSpace("archive", tuple(Slot(name, choices) for name in ("encoder", "latent", "decoder")))


SPACE = space_of("vssd", "conv")
GOOD = Measurement((0, 2, 1), {"psnr_drop_db": 0.1 + 0.2, "macs": 12345678901.0, "params": 1.5}, (30.1, 1 / 3))
BAD = Measurement((1, 1, 1), {"psnr_drop_db": math.nan, "macs": 2.0}, (29.0, math.inf), valid=False,
                  note="PSNR is not finite")


def opened(path: Path | str, **changes: object) -> Archive:
    return open_archive(path, space=SPACE, objectives=NAMES, manifest={**MANIFEST, **changes})


def test_measurements_come_back_bit_for_bit_and_in_order(tmp_path: Path) -> None:
    with opened(tmp_path / "archive.db") as archive:
        archive.record(BAD)
        archive.record(GOOD)
        assert archive.measurements() == [BAD, GOOD]
    again = read_archive(tmp_path / "archive.db")
    assert repr(again.measurements()) == repr([BAD, GOOD]), "repr, because NaN differs from itself"
    assert list(again.known()) == [BAD.genotype, GOOD.genotype] and again.objectives == NAMES
    assert again.slots["latent"] == ["restormer×2", "vssd×1", "conv×1"] and again.manifest["seed"] == 3


def test_it_is_an_ordinary_optuna_study(tmp_path: Path) -> None:
    with opened(tmp_path / "archive.db") as archive:
        archive.record(BAD)
        archive.record(GOOD)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/archive.db")
    bad, good = study.trials
    assert (bad.state.name, good.state.name) == ("FAIL", "COMPLETE")
    assert good.params == {"encoder": "restormer×2", "latent": "conv×1", "decoder": "vssd×1"}
    assert good.values == [GOOD.values[name] for name in NAMES] and study.metric_names == list(NAMES)
    assert good.user_attrs["genotype"] == "0-2-1" and good.user_attrs["engine"] == "random"
    assert [trial.number for trial in study.best_trials] == [1]


def test_it_is_on_disk_when_record_returns(tmp_path: Path) -> None:
    with opened(tmp_path / "archive.db") as archive:
        archive.record(GOOD)
        with sqlite3.connect(tmp_path / "archive.db") as other:
            assert other.execute("select count(*) from trials").fetchone() == (1,)
        assert read_archive(tmp_path / "archive.db").measurements() == [GOOD], "reading needs no lock"


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    opened(path).close()
    with pytest.raises(ArchiveMismatch, match=r"seed was 3, is now 4$"):
        opened(path, seed=4)
    with pytest.raises(ArchiveMismatch, match=r"protocol.sigma_255 was 25, is now 50; library was null, is now \"x\""):
        opened(path, protocol={"name": "denoise-color-awgn", "sigma_255": 50}, library="x")
    with pytest.raises(ArchiveMismatch, match=r"slots.latent was .*conv×1.* is now"):
        open_archive(path, space=space_of("vssd"), objectives=NAMES, manifest=MANIFEST)
    with pytest.raises(ArchiveMismatch, match=r"objectives was .*psnr_drop_db"):
        open_archive(path, space=SPACE, objectives=NAMES[::-1], manifest=MANIFEST)
    swapped = SearchSpace("archive", SPACE.slots[::-1])
    with pytest.raises(ArchiveMismatch, match="slot_order"):
        open_archive(path, space=swapped, objectives=NAMES, manifest=MANIFEST)
    opened(path).close()


def test_a_second_writer_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    with opened(path):
        with pytest.raises(ArchiveLocked, match=f"process {os.getpid()} on "):
            opened(path)
        with pytest.raises(ArchiveLocked):
            opened(f"sqlite:///{path}")
    opened(path).close()


def test_a_failed_opening_leaves_no_lock(tmp_path: Path) -> None:
    opened(tmp_path / "archive.db").close()
    with pytest.raises(ArchiveMismatch):
        opened(tmp_path / "archive.db", seed=4)
    opened(tmp_path / "archive.db").close()


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "page.db").write_text("<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="cannot be opened as an archive: file is not a database"):
        read_archive(tmp_path / "page.db")
    with pytest.raises(FileNotFoundError, match="no archive at"):
        read_archive(tmp_path / "none.db")
    optuna.create_study(study_name="ens", storage=f"sqlite:///{tmp_path}/foreign.db").add_trial(
        optuna.create_trial(value=1.0))
    with pytest.raises(ValueError, match="not recorded by ens"):
        read_archive(tmp_path / "foreign.db")
    with pytest.raises(ArchiveMismatch, match="not recorded by ens"):
        opened(tmp_path / "foreign.db")
    with opened(tmp_path / "archive.db") as archive:
        archive.record(GOOD)
        with pytest.raises(ValueError, match="0-2-1 was recorded before"):
            archive.record(GOOD)
        with pytest.raises(ValueError, match="needs finite psnr_drop_db, macs"):
            archive.record(Measurement((0, 0, 0), {"macs": 1.0}))
        with pytest.raises(ValueError, match="has 3 entries, got 2"):
            archive.record(Measurement((0, 0), {"psnr_drop_db": 0.0, "macs": 1.0}))
    with pytest.raises(RuntimeError, match="opened for reading"):
        archive.record(Measurement((0, 0, 0), {"psnr_drop_db": 0.0, "macs": 1.0}))


def test_a_trial_left_running_by_someone_else_is_no_measurement(tmp_path: Path) -> None:
    opened(tmp_path / "archive.db").close()
    optuna.load_study(study_name="ens", storage=f"sqlite:///{tmp_path}/archive.db").ask()
    assert read_archive(tmp_path / "archive.db").measurements() == []


def search(path: Path, ledger: Path) -> None:
    """A whole search in a process of its own; every evaluation leaves a line in the ledger before it starts."""
    choices = (Choice("restormer", 2, teacher=True), Choice("vssd", 1), Choice("conv", 1))
    space = SearchSpace("killed", tuple(Slot(name, choices) for name in "abcde"))

    def evaluate(batch: list[Genotype]) -> Iterator[Measurement]:
        for genotype in batch:
            with ledger.open("a") as file:
                file.write(f"{genotype}\n")
            time.sleep(0.005)
            yield Measurement(genotype, {"psnr_drop_db": float(sum(genotype)) ** 2, "macs": 9.0 - genotype[0]})

    with open_archive(path, space=space, objectives=NAMES, manifest={"seed": 0}) as archive:
        run_search(engine=create_engine("nsga2", space, seed=0), objectives=NAMES, known=archive.known(),
                   evaluate=evaluate, record=archive.record, budget=40, batch_size=4)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kill_9_five_times_then_the_same_archive_as_an_uninterrupted_search(tmp_path: Path) -> None:
    def start(name: str) -> multiprocessing.process.BaseProcess:
        process = multiprocessing.get_context("fork").Process(
            target=search, args=(tmp_path / f"{name}.db", tmp_path / name))
        process.start()
        return process

    for kill in range(5):
        broken = start("broken")
        while _lines(tmp_path / "broken") < 7 * (kill + 1) and broken.is_alive():
            time.sleep(0.002)
        broken.kill()
        broken.join()
        assert broken.exitcode == -signal.SIGKILL
    for name in ("whole", "broken"):
        process = start(name)
        process.join()
        assert process.exitcode == 0
    expected = read_archive(tmp_path / "whole.db").measurements()
    assert len(expected) == 40 and read_archive(tmp_path / "broken.db").measurements() == expected
    assert _lines(tmp_path / "broken") <= 40 + 5, "at most the one genotype in flight is measured again for each kill"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
