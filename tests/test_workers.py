"""Workers that share an archive: nothing is measured twice, the dead are replaced, one seed is one answer.

What they measure is a table, so that only the sharing takes time; once in a SQLite file and once in a PostgreSQL server
that the tests start themselves.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from ens.pareto import claims
from ens.pareto.archive import Archive, open_archive, read_archive
from ens.pareto.trials import connect_engine
from ens.search import create_engine
from ens.search.loop import share_search
from ens.space import Choice, Genotype, Measurement, SearchSpace, Slot, format_genotype

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("psnr_drop_db", "macs")
SPACE = SearchSpace("shared", tuple(Slot(name, (Choice("restormer", 2, teacher=True), Choice("vssd", 1),
                                                Choice("conv", 1))) for name in "abcdef"))
BINARIES = [path for path in (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
                              Path(shutil.which("initdb") or "/").parent) if (path / "initdb").exists()]
FORK = multiprocessing.get_context("fork")  # nothing is imported anew


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a PostgreSQL server on a socket in a temporary folder; it takes 16 connections."""
    if not BINARIES:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="ens-", dir="/tmp"))
    user = "nobody" if os.getuid() == 0 else None  # the server refuses to run as root
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    subprocess.run([BINARIES[0] / "initdb", "--no-sync", "--auth=trust", "--username=ens", "--encoding=UTF8", data],
                   user=user, cwd=folder, check=True, capture_output=True)
    process = subprocess.Popen(
        [BINARIES[0] / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off",
         "-c", "max_connections=16"],
        user=user, cwd=folder, stderr=subprocess.DEVNULL)
    url = f"postgresql+psycopg://ens@/postgres?host={folder}"
    try:
        for _ in range(100):
            try:
                connect_engine(url).connect().close()
                break
            except sqlalchemy.exc.OperationalError:
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(params=["file", "server"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an archive of its own is, for every test."""
    if request.param == "file":
        return f"sqlite:///{tmp_path}/archive.db"
    url = request.getfixturevalue("server")
    name = f"test_{time.monotonic_ns()}"
    with connect_engine(url).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text(f"create database {name}"))
    return str(url).replace("/postgres?", f"/{name}?")


def opened(storage: str) -> Archive:
    return open_archive(storage, space=SPACE, objectives=NAMES, manifest={})


def measure(genotype: Genotype) -> Measurement:
    drop = sum((slot + 1) * index ** 1.5 for slot, index in enumerate(genotype)) + genotype[0] * genotype[2]
    if genotype[:3] == (1, 2, 1):
        return Measurement(genotype, {"psnr_drop_db": math.nan, "macs": 1.0}, valid=False, note="PSNR is not finite")
    return Measurement(genotype, {"psnr_drop_db": drop, "macs": 9.0 - sum(genotype)})


def work(storage: str, log: Path, budget: int, engine: str = "random", batch_size: int = 1, workers: int = 1,
         deterministic: bool = False, seconds: float = 0.0) -> None:
    """A worker's whole life; every evaluation leaves a line in the log before it starts."""
    def evaluate(batch: list[Genotype]) -> Iterator[Measurement]:
        for genotype in batch:
            with log.open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()} {format_genotype(genotype)}\n")
            time.sleep(seconds * (1 + (os.getpid() + genotype[0]) % 3))
            yield measure(genotype)

    with opened(storage) as archive:
        share_search(engine=create_engine(engine, SPACE, seed=1), objectives=NAMES, board=archive, evaluate=evaluate,
                     budget=budget, batch_size=batch_size, workers=workers, deterministic=deterministic)


def start(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@pytest.mark.slow
def test_more_workers_than_a_server_has_connections_repeat_nothing_and_keep_the_budget(storage: str,
                                                                                    tmp_path: Path) -> None:
    log, most = tmp_path / "log", 0
    opened(storage).close()
    workers = [start(work, storage, log, 96, "random", 1, 24, False, 0.02) for _ in range(24)]
    watching = connect_engine(storage).connect().execution_options(isolation_level="AUTOCOMMIT")
    while any(worker.is_alive() for worker in workers):
        if watching.dialect.name == "postgresql":
            most = max(most, watching.execute(sqlalchemy.text(
                "select count(*) from pg_stat_activity where datname = current_database()")).scalar_one())
        time.sleep(0.02)
    watching.close()
    assert [worker.exitcode for worker in workers] == [0] * 24
    lines = log.read_text(encoding="ascii").splitlines()
    assert len(lines) == len({line.split()[1] for line in lines}) == len(read_archive(storage).known()) == 96
    assert most <= 16, "the server has no more"
    study = optuna.load_study(study_name="ens", storage=storage)
    assert [trial.number for trial in study.trials] == list(range(96))
    assert len({trial.user_attrs["worker"] for trial in study.trials}) > 1


def test_of_a_killed_worker_only_the_evaluation_in_flight_is_lost_and_another_takes_it(storage: str,
                                                                                      tmp_path: Path) -> None:
    log = tmp_path / "log"
    opened(storage).close()
    workers = [start(work, storage, log, 40, "nsga2", 1, 2, False, 0.03) for _ in range(2)]
    while workers[0].is_alive() and (not log.exists() or len(log.read_text(encoding="ascii").splitlines()) < 12):
        time.sleep(0.005)
    assert workers[0].pid is not None
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert workers[1].exitcode == 0
    lines = [line.split() for line in log.read_text(encoding="ascii").splitlines()]
    repeated = [name for name, times in Counter(name for _, name in lines).items() if times > 1]
    last = [name for pid, name in lines if pid == str(workers[0].pid)][-1:]
    assert repeated in ([], last), "what was in flight, where it had begun"
    assert len(read_archive(storage).known()) == len({name for _, name in lines}) == 40


def test_one_seed_is_one_answer_with_one_two_and_four_workers(storage: str, tmp_path: Path) -> None:
    url = sqlalchemy.make_url(storage)
    answers = []
    for count in (1, 2, 4):
        if url.get_backend_name() == "sqlite":
            storage = f"sqlite:///{tmp_path}/{count}.db"
        workers = [start(work, storage, tmp_path / f"log{count}", 30, "nsga2", 4, count, True, 0.002)
                   for _ in range(count)]
        for worker in workers:
            worker.join()
        known = read_archive(storage).known()
        assert len((tmp_path / f"log{count}").read_text(encoding="ascii").splitlines()) == len(known) == 30
        answers.append(repr(sorted(known.items())))
        if url.get_backend_name() == "postgresql":
            optuna.delete_study(study_name="ens", storage=storage)
    assert len(set(answers)) == 1


def test_a_lone_worker_that_is_killed_again_and_again_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    """Its claims are void the moment it is dead, and the batch it was at is asked for again."""
    whole, broken = f"sqlite:///{tmp_path}/whole.db", f"sqlite:///{tmp_path}/broken.db"
    work(whole, tmp_path / "whole", 26, "nsga2", 4)
    log = tmp_path / "broken"
    for lines in (3, 9, 14, 21):
        worker = start(work, broken, log, 26, "nsga2", 4, 1, False, 0.02)
        while worker.is_alive() and (not log.exists() or len(log.read_text(encoding="ascii").splitlines()) < lines):
            time.sleep(0.002)
        worker.kill()
        worker.join()
    work(broken, log, 26, "nsga2", 4)
    assert repr(read_archive(broken).measurements()) == repr(read_archive(whole).measurements())


def test_the_claims_of_another_machine_end_with_its_lease(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_S", 1.5)
    a, b = (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 2)
    with opened(storage) as here, monkeypatch.context() as elsewhere:
        elsewhere.setattr(claims, "_describe_machine", lambda: "another")
        elsewhere.setattr(claims.Claims, "_keep_renewing", lambda self: None)  # it has stopped, without a word
        with opened(storage) as there:
            assert there.claim([a, b], budget=9) == [a, b]
            assert here.claim([a], budget=9) == [] and here.pending == [a, b] and here.workers == 2
            time.sleep(1.8)
            assert here.claim([a], budget=9) == [a] and here.pending == [] and here.workers == 1
            mine = here.record(measure(a))
            assert there.record(measure(a)) == mine, "it was not dead after all: what came first counts"
            assert there.claim([b], budget=9) == [b] and here.claim([b], budget=9) == []
    assert list(read_archive(storage).known()) == [a]


def test_a_lease_is_renewed_as_long_as_an_evaluation_takes(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_S", 1.5)
    genotype = (0, 0, 0, 0, 0, 1)
    with opened(storage) as here, opened(storage) as there:
        here.claim([genotype], budget=9)
        time.sleep(2.2)
        assert there.claim([genotype], budget=9) == []
        here.record(measure(genotype))
    (trial,) = optuna.load_study(study_name="ens", storage=storage).trials
    assert trial.duration is not None and 2.1 <= trial.duration.total_seconds() < 20, "as long as it took"
    assert trial.user_attrs["worker"].endswith(f":{os.getpid()}")


def test_claims_keep_to_the_budget_and_end_with_their_worker(storage: str) -> None:
    wanted = [(0, 0, 0, 0, first, second) for first in range(3) for second in range(3)]
    with opened(storage) as here:
        with opened(storage) as there:
            assert here.claim(wanted[:3], budget=5) == wanted[:3]
            assert there.claim(wanted, budget=5) == wanted[3:5]
            here.record(measure(wanted[0]))
            assert there.claim(wanted[5:], budget=5) == []
        here.look()
        assert here.pending == [] and here.claim(wanted[3:], budget=5) == wanted[3:7][:2]


SMALL = [word for setting in ("search.objectives=[psnr_drop_db,penalty]", "search.engine=random", "search.batch_size=1",
                              "data.limit=1", "data.crops_per_image=1", "data.crop_px=32")
         for word in ("--set", setting)]


def ens(*words: object) -> subprocess.Popen[str]:
    """The command in a process of its own, with one thread."""
    return subprocess.Popen([sys.executable, "-c", "from ens.cli import main; main()", *map(str, words)],
                            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, encoding="utf-8",
                            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_searches_share_300_evaluations_and_one_that_is_killed_is_replaced(server: str, tmp_path: Path) -> None:
    """The whole command twice, in folders of their own, with one server; one dies after a third of the work."""
    searches = [ens("search", "demo", "--out", tmp_path / name, "--storage", server, *SMALL,
                    "--set", "search.budget=300") for name in "ab"]
    while searches[0].poll() is None and len(names_in(server)) < 100:
        time.sleep(0.2)
    searches[0].kill()
    searches[0].wait()
    assert searches[1].stderr is not None
    said = searches[1].stderr.read()
    assert searches[1].wait() == 0, said
    trials = optuna.load_study(study_name="ens", storage=server).trials
    assert [trial.number for trial in trials] == list(range(300)) and len(names_in(server)) == 300
    by_worker = Counter(trial.user_attrs["worker"] for trial in trials)
    assert len(by_worker) == 2 and min(by_worker.values()) >= 20, "both have measured"


@pytest.mark.slow
def test_jobs_share_the_work_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    run, path = ens("search", "demo", "--out", tmp_path, "--jobs", 2, *SMALL, "--set", "search.budget=60"), tmp_path
    while run.poll() is None and len(names_in(f"sqlite:///{path}/archive.db")) < 20:
        time.sleep(0.1)
    jobs = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="ascii").split()
    victim = next(int(pid) for pid in jobs if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"))
    os.kill(victim, signal.SIGKILL)
    assert run.stderr is not None
    said = run.stderr.read()
    assert run.wait() == 0, said
    assert "ended early: it was killed (exit code -9)" in said
    measured = [trial.user_attrs for trial in optuna.load_study(
        study_name="ens", storage=f"sqlite:///{path}/archive.db").trials]
    assert len({one["genotype"] for one in measured}) == len(measured) == 60
    assert len({one["worker"] for one in measured}) == 2


@pytest.mark.slow
def test_one_seed_is_one_answer_with_one_job_and_with_two(tmp_path: Path) -> None:
    """The whole command on networks; values to the last bit."""
    answers = []
    for jobs in (1, 2):
        run = ens("search", "demo", "--out", tmp_path / str(jobs), "--jobs", jobs, "--deterministic", *SMALL,
                  "--set", "search.budget=24", "--set", "search.batch_size=6", "--set", "search.engine=nsga2")
        assert run.stderr is not None
        said = run.stderr.read()
        assert run.wait() == 0, said
        answers.append(sorted((one.genotype, one.psnr_db, sorted(one.values.items()))
                              for one in read_archive(tmp_path / str(jobs) / "archive.db").measurements()))
    assert len(answers[0]) == 24 and answers[0] == answers[1]


def names_in(storage: str) -> set[str]:
    """Genotypes that are recorded; none where there is no archive yet."""
    with suppress(FileNotFoundError, ValueError, sqlalchemy.exc.SQLAlchemyError):
        return set(map(format_genotype, read_archive(storage).known()))
    return set()
