"""The archive: an Optuna study that survives kill -9, refuses other configurations and second writers."""

from __future__ import annotations

import dataclasses
import datetime
import math
import multiprocessing
import multiprocessing.process
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy

from ens.pareto import storage
from ens.pareto.archive import (
    Archive,
    mark_invalid,
    open_archive,
    read_archive,
    record_tuned,
)
from ens.pareto.baseline import Baseline, Tuned
from ens.pareto.records import space_manifest, to_trial
from ens.pareto.storage import ArchiveDamaged, ArchiveLocked, ArchiveMismatch, Storage
from ens.search import create_engine
from ens.search.loop import run_search
from ens.space import Choice, Genotype, Measurement, SearchSpace, Slot, parse_choice

NAMES = ("psnr_drop_db", "macs")
MANIFEST = {"seed": 3, "engine": "random", "protocol": {"name": "denoise-color-awgn", "sigma_255": 25}}


def space_of(*labels: str) -> SearchSpace:
    choices = (Choice("restormer", 2, teacher=True), *(Choice(label, 1) for label in labels))
    return SearchSpace("archive", tuple(Slot(name, choices) for name in ("encoder", "latent", "decoder")))


SPACE = space_of("vssd", "conv")
GOOD = Measurement((0, 2, 1), {"psnr_drop_db": 0.1 + 0.2, "macs": 12345678901.0, "params": 1.5}, (30.1, 1 / 3))
BAD = Measurement((1, 1, 1), {"psnr_drop_db": math.nan, "macs": 2.0}, (29.0, math.inf), valid=False,
                  note="PSNR is not finite")


MANY = SearchSpace("many", (Slot("latent", tuple(Choice("conv", depth, teacher=depth == 1)
                                                 for depth in range(1, 4001))),))


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


def test_whoever_opens_it_at_the_same_moment_waits_and_is_told_for_whom(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "archive.db"
    monkeypatch.setattr(storage, "_OPENING_S", 0.1)
    with Storage(path).alone(), pytest.raises(ArchiveLocked, match=f"process {os.getpid()} on "):
        opened(path)
    with opened(path) as first, opened(f"sqlite:///{path}") as second:
        assert first.record(GOOD) == [GOOD] and repr(second.record(BAD)) == repr([GOOD, BAD])
        assert repr(first.look()) == repr([BAD]) and second.look() == []


def test_a_failed_opening_leaves_no_lock(tmp_path: Path) -> None:
    opened(tmp_path / "archive.db").close()
    with pytest.raises(ArchiveMismatch):
        opened(tmp_path / "archive.db", seed=4)
    opened(tmp_path / "archive.db").close()


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "page.db").write_text("<html>not found</html>" * 100, encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be opened as an archive: file is not a database"):
        read_archive(tmp_path / "page.db")
    for call in (read_archive, lambda path: mark_invalid(path, (0, 0, 0), "why")):
        with pytest.raises(FileNotFoundError, match="no archive at"):
            call(tmp_path / "none.db")
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


def rows_of(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table of a study, times left out."""
    with sqlite3.connect(path) as connection:
        tables = {"trials": "trial_id, number, study_id, state", "trial_values": "*", "trial_params": "*",
                  "trial_user_attributes": "*", "trial_system_attributes": "*", "trial_intermediate_values": "*"}
        return {table: connection.execute(f"select {columns} from {table} order by 1").fetchall()
                for table, columns in tables.items()}


def test_recording_writes_the_rows_that_optuna_itself_would(tmp_path: Path) -> None:
    with opened(tmp_path / "ours.db") as archive:
        archive.record(BAD)
        archive.record(GOOD)
    study = optuna.create_study(study_name="ens", storage=f"sqlite:///{tmp_path}/theirs.db",
                                directions=["minimize", "minimize"])
    for measurement in (BAD, GOOD):
        study.add_trial(to_trial(measurement, slots=archive.slots, objectives=NAMES, engine="random",
                                 worker=f"{socket.gethostname()}:{os.getpid()}"))
    assert rows_of(tmp_path / "ours.db") == rows_of(tmp_path / "theirs.db")
    (first, second) = optuna.load_study(study_name="ens", storage=f"sqlite:///{tmp_path}/ours.db").trials
    now = datetime.datetime.now()
    assert all(trial.datetime_start and trial.datetime_complete and abs(now - trial.datetime_complete)
               < datetime.timedelta(minutes=5) for trial in (first, second)), "stored as UTC, shown as local time"


@pytest.fixture
def steps() -> Iterator[list[int]]:
    """A list that grows by one for every hundred instructions of SQLite's virtual machine."""
    counted: list[int] = []

    def listen(connection: sqlite3.Connection, record: object) -> None:
        connection.set_progress_handler(lambda: counted.append(1), 100)

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", listen)
    yield counted
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", listen)


def test_what_a_record_costs_does_not_grow_with_the_archive(tmp_path: Path, steps: list[int]) -> None:
    def record_some(path: Path) -> int:
        with opened(path) as archive:
            steps.clear()
            for index in range(3):
                archive.record(Measurement((index, 0, 0), {"psnr_drop_db": 0.0, "macs": 1.0}))
            return len(steps)

    for name, trials in (("empty.db", 0), ("full.db", 20_000)):
        opened(tmp_path / name).close()
        with sqlite3.connect(tmp_path / name) as other:
            other.executemany("insert into trials (number, study_id, state) values (?, 1, 'COMPLETE')",
                              ((number,) for number in range(trials)))
    assert record_some(tmp_path / "full.db") <= 1.5 * record_some(tmp_path / "empty.db") + 10


def test_reading_costs_as_much_for_each_of_many_measurements(tmp_path: Path, steps: list[int]) -> None:
    def read(number: int) -> float:
        path = tmp_path / f"{number}.db"
        open_archive(path, space=MANY, objectives=NAMES, manifest=MANIFEST).close()
        with sqlite3.connect(path) as other:
            other.executemany("insert into trials (trial_id, number, study_id, state) values (?, ?, 1, 'COMPLETE')",
                              ((index, index) for index in range(number)))
            other.executemany("insert into trial_user_attributes (trial_id, key, value_json) values (?, ?, ?)",
                              ((index, key, value) for index in range(number) for key, value in (
                                  ("genotype", f'"{index}"'), ("note", '""'), ("psnr_db", "[30.0]"),
                                  ("values", '{"psnr_drop_db": 0.0, "macs": 1.0}'))))
        steps.clear()
        assert len(read_archive(path).measurements()) == number
        return len(steps) / number

    assert read(4000) <= 1.3 * read(1000)


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a%3Fb", "a#b", "with space", "größe→日本", ":memory:", "{SCHEMA}",
                                  "a&b=c;d", "x@y:z", "'quoted\"", "-flag", "n" * 200, "file:x?mode=memory"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_folder_of_any_name_holds_its_own_archive(name: str, kind: type, tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("these names are not allowed there")
    if not name.isascii() and sys.getfilesystemencoding() != "utf-8":
        pytest.skip("this locale cannot write the name")
    plain, odd = (tmp_path / folder / "archive.db" for folder in ("a", name))
    opened(plain).close()
    with opened(kind(odd)) as archive:
        archive.record(GOOD)
    mark_invalid(kind(odd), GOOD.genotype, "no")
    assert [item.note for item in read_archive(kind(odd)).measurements()] == ["no"]
    assert read_archive(plain).measurements() == []
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"a", name}
    with sqlite3.connect(odd) as other:
        assert other.execute("select count(*) from trials").fetchone() == (1,)


def test_storages_that_sqlite_cannot_take_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="503 bytes at most"):
        Storage(tmp_path / "/".join(["n" * 100] * 6))
    with pytest.raises(ValueError, match="names no file"):
        read_archive("sqlite://")
    assert Storage("postgresql://me:secret@host/db?sslmode=require").url == "postgresql://me:secret@host/db?sslmode=require"


def test_a_server_that_does_not_answer_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"storage postgresql\+psycopg://me:\*\*\*@/x.* cannot be reached: ") as told:
        Storage(f"postgresql+psycopg://me:secret@/x?host={tmp_path}").check()
    assert "secret" not in str(told.value) and "No such file" in str(told.value)


def test_the_baseline_is_kept_as_first_given_and_never_compared(tmp_path: Path) -> None:
    first = Baseline((30.0, 1 / 3), (20.0, math.inf), {"params": 2.0, "macs": 3.0})
    path = tmp_path / "archive.db"
    opened(path).close()
    assert read_archive(path).baseline is None
    for baseline in (first, dataclasses.replace(first, teacher_psnr_db=(30.0, 1 / 3 + 1e-9))):
        with open_archive(path, space=SPACE, objectives=NAMES, manifest=MANIFEST, baseline=baseline) as archive:
            assert archive.baseline == first
    opened(path).close()
    assert read_archive(path).baseline == first
    assert Baseline((30.0, 32.0), (), {}).input_mean_db is None and Baseline((3.0,), (1.0,), {}).input_drop_db == 2.0


def test_every_recipe_is_kept_and_the_best_counts_also_while_a_search_writes(tmp_path: Path) -> None:
    path, genotype = tmp_path / "archive.db", GOOD.genotype
    report = {"input": 20.0, "before": 29.0, "after": 29.8, "teacher": 30.0}
    with opened(path) as archive:
        archive.record(GOOD)
        record_tuned(path, genotype, recipe="long:1", psnr_db=(31.0, 32.0), report=report)
        record_tuned(path, genotype, recipe="short", psnr_db=(31.0, 31.0), report={})
        archive.record(BAD)
    record_tuned(path, genotype, recipe="short", psnr_db=(30.5, 31.0), report={})
    again = read_archive(path)
    assert again.tuned == {genotype: Tuned("long:1", (31.0, 32.0), report)}
    assert [(result.recipe, result.psnr_db) for result in again.tuned_by_recipe[genotype]] == [
        ("long:1", (31.0, 32.0)), ("short", (30.5, 31.0))]
    assert [item.psnr_db_tuned for item in again.measurements()] == [(31.0, 32.0), ()]
    assert again.known()[genotype].values == GOOD.values, "the values before fine-tuning stay"


def test_fine_tuned_results_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    opened(path).close()
    for psnr_db, report, genotype, message in (
            ((), {}, (0, 2, 1), "finite"), ((math.nan,), {}, (0, 2, 1), "finite"),
            ((30.0,), {"after": -math.inf}, (0, 2, 1), "finite"),
            ((30.0,), {"afterwards": 1.0}, (0, 2, 1), "they have input"),
            ((30.0,), {}, (0, 2, 7), "latent|decoder"), ((30.0,), {}, (0,), "has 3 entries")):
        with pytest.raises(ValueError, match=message):
            record_tuned(path, genotype, recipe="r", psnr_db=psnr_db, report=report)
    with pytest.raises(FileNotFoundError):
        record_tuned(tmp_path / "none.db", (0, 2, 1), recipe="r", psnr_db=(1.0,), report={})
    assert read_archive(path).tuned == {}


def test_the_space_comes_back_without_a_network(tmp_path: Path) -> None:
    own = Choice("restormer", 4, teacher=True)
    others = ("vssd×1(expand=1.5,state=16)", "conv×2(gated=True)", "identity×1")
    space = SearchSpace("priced", (Slot("latent.1", (own, *map(parse_choice, others))), Slot("decoder", (own,))),
                        penalty_teacher=3.0, penalty_per_block=0.25, transformers=("restormer", "mine"))
    path = tmp_path / "archive.db"
    open_archive(path, space=space, objectives=NAMES, manifest=MANIFEST).close()
    assert read_archive(path).space == space
    with pytest.raises(ArchiveMismatch, match=r"penalty.transformers was \[\"restormer\", \"mine\"\], is now"):
        open_archive(path, space=dataclasses.replace(space, transformers=("uformer",)), objectives=NAMES,
                     manifest=MANIFEST)


def test_a_part_of_the_manifest_can_be_checked_alone(tmp_path: Path) -> None:
    opened(tmp_path / "archive.db").close()
    archive = read_archive(tmp_path / "archive.db")
    archive.check({"seed": 3, "objectives": NAMES, **space_manifest(SPACE)})
    archive.check({})
    with pytest.raises(ArchiveMismatch, match=r": seed was 3, is now 4; protocol.sigma_255 was 25, is now 50$"):
        archive.check({"seed": 4, "protocol": {"name": "denoise-color-awgn", "sigma_255": 50}, "engine": "random"})
    with pytest.raises(ArchiveMismatch, match=r"slots.latent was"):
        archive.check(space_manifest(space_of("vssd")))


def search(path: Path, ledger: Path) -> None:
    """A whole search in a process of its own; every evaluation leaves a line in the ledger before it starts."""
    choices = (Choice("restormer", 2, teacher=True), Choice("vssd", 1), Choice("conv", 1))
    space = SearchSpace("killed", tuple(Slot(name, choices) for name in "abcde"))

    def evaluate(batch: list[Genotype]) -> Iterator[Measurement]:
        for genotype in batch:
            with ledger.open("a", encoding="utf-8") as file:
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
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def test_reading_an_empty_or_foreign_file_writes_nothing_into_it(tmp_path: Path) -> None:
    """Optuna would make its tables in whatever it opens."""
    empty, foreign, begun = (tmp_path / name for name in ("empty.db", "foreign.db", "begun.db"))
    empty.touch()
    with sqlite3.connect(foreign) as other:
        other.execute("create table songs (title text)")
    with sqlite3.connect(begun) as other:  # killed while the tables were made
        other.execute("create table studies (study_id integer)")
    before = {path: path.read_bytes() for path in (empty, foreign, begun)}
    for path, kind, words in ((empty, FileNotFoundError, "is empty"), (begun, FileNotFoundError, "is empty"),
                              (foreign, ArchiveDamaged, "database of something else, with tables songs")):
        with pytest.raises(kind, match=words):
            read_archive(path)
    with pytest.raises(ArchiveDamaged, match="something else"):
        opened(foreign)
    assert {path: path.read_bytes() for path in before} == before
    with opened(empty) as archive:
        archive.record(GOOD)
    assert read_archive(empty).measurements() == [GOOD]


def test_a_process_killed_before_the_manifest_leaves_an_archive_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    optuna.create_study(study_name="ens", storage=f"sqlite:///{path}", directions=["minimize"] * 2)
    with pytest.raises(FileNotFoundError, match="holds nothing yet"):
        read_archive(path)
    with opened(path) as archive:
        archive.record(GOOD)
    assert read_archive(path).measurements() == [GOOD]


@pytest.mark.parametrize(("table", "key", "value", "words"), [
    ("study_user_attributes", "ens", "[1, 2]", "its manifest is damaged"),
    ("study_user_attributes", "ens", '{"space": 3}', "its manifest is damaged"),
    ("study_user_attributes", "ens", "{", "Expecting property name"),
    ("study_user_attributes", "ens:baseline", '{"teacher_psnr_db": "x"}', "its baseline is damaged .teacher_psnr_db"),
    ("study_user_attributes", "ens:tuned:0-2-1:r", "null", "a fine-tuned result is damaged"),
    ("study_user_attributes", "ens:unusable:a-b", '"why"', "invalid literal"),
    ("trial_user_attributes", "genotype", '"9-9-9"', "a measurement is damaged .*allows 0 to 2, got 9"),
    ("trial_user_attributes", "genotype", "17", "a measurement is damaged .genotype"),
    ("trial_user_attributes", "values", "{}", "a measurement is damaged .*psnr_drop_db, macs are not all there"),
    ("trial_user_attributes", "psnr_db", '["thirty"]', "a measurement is damaged .psnr_db"),
])
def test_a_damaged_archive_is_named_with_what_to_do(tmp_path: Path, table: str, key: str, value: str,
                                                    words: str) -> None:
    path = tmp_path / "archive.db"
    with open_archive(path, space=SPACE, objectives=NAMES, manifest=MANIFEST,
                      baseline=Baseline((30.0, 31.0), (), {})) as archive:
        archive.record(GOOD)
        record_tuned(path, GOOD.genotype, recipe="r", psnr_db=(30.0, 31.0), report={})
        mark_invalid(path, GOOD.genotype, "why")
    renamed = {"ens:unusable:a-b": "ens:unusable:0-2-1"}.get(key, key)
    with sqlite3.connect(path) as other:
        changed = other.execute(f"update {table} set key = ?, value_json = ? where key = ?", (key, value, renamed))
        assert changed.rowcount == 1
    with pytest.raises(ArchiveDamaged, match=f"archive.db cannot be opened as an archive: .*{words}.*search again in "
                                             "another run folder"):
        read_archive(path)


def test_no_damage_to_the_bytes_ends_in_another_error(tmp_path: Path) -> None:
    path, rng = tmp_path / "archive.db", np.random.default_rng(0)
    with opened(path) as archive:
        archive.record(GOOD)
        archive.record(BAD)
    whole, refused = path.read_bytes(), 0
    for number in range(60):
        data = bytearray(whole[:len(whole) // 2] if number % 10 == 0 else whole)
        for position in rng.integers(0, len(data), 40 if number % 2 else 4000):
            data[position] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            read = read_archive(path).measurements()
        except (ArchiveDamaged, ArchiveMismatch, FileNotFoundError) as error:
            assert "archive.db" in str(error)
            refused += 1
        else:
            assert {measurement.genotype for measurement in read} <= {GOOD.genotype, BAD.genotype}
    assert refused > 30


def test_a_mark_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    with opened(path) as archive:
        archive.record(GOOD)
    mark_invalid(path, GOOD.genotype, "why")
    assert read_archive(path).marked == {GOOD.genotype: "why"} and not read_archive(path).measurements()[0].valid
    mark_invalid(path, GOOD.genotype, "")
    assert read_archive(path).marked == {} and read_archive(path).measurements() == [GOOD]


@pytest.mark.parametrize(("storage", "words"), [
    ("postgres9://host/db", "Can't load plugin: sqlalchemy.dialects:postgres9"), ("://", "is no storage"),
    ("mysql+mysqldb://me:secret@host/db", r"mysqldb://me:\*\*\*@host/db needs the Python package MySQLdb"),
    ("sqlite://", "names no file")])
def test_a_storage_without_its_driver_is_found_by_its_name(storage: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Storage(storage).check()
