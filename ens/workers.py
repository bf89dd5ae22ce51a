"""Evaluation by several processes: workers that share an archive, each with an evaluator of its own.

A worker needs the path of a run folder and where its archive is, nothing else. `--jobs N` starts N on this machine;
`ens search` with the same `--storage` on any other machine is one more. With `--ray ADDRESS` there is one worker, which
has a Ray cluster evaluate its batches and distil slots; nodes need the run folder and what it names at the same paths.
"""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

import torch

from ens.distill.blockwise import distill_library
from ens.distill.library import create_library, open_library
from ens.evaluate.racing import Race
from ens.objectives import QUALITY, objective_values
from ens.own_code import import_code, list_imports
from ens.pareto.archive import Archive
from ens.pareto.baseline import Baseline
from ens.pareto.front import non_dominated
from ens.run_folder import RunFolder
from ens.runtime.process import EXIT_FAILED, Control, Interrupted, keep_freed_memory
from ens.search.loop import share_search
from ens.search.predictor import describe_fit
from ens.space import Genotype, Measurement, SearchSpace

_LOOK_S = 0.5
_Result = TypeVar("_Result")
_There = tuple[Path, tuple[str, ...]]
"""What a process on another machine opens a run by: its folder, and what to import."""


def measure(run: RunFolder, control: Control, *, jobs: int, deterministic: bool, ray: bool = False) -> None:
    """Spend the budget, from where the archive is: in this process, in `jobs` others or on the `ray` cluster, beside
    whoever shares it.

    Raises Interrupted where the user stopped it, what a job died of where the others could not go on without it.
    """
    before = torch.get_num_threads()
    threads = run.study.threads or (1 if deterministic or ray else max(1, before // jobs))
    try:
        if deterministic or ray:  # PSNRs differ in their last digits between numbers of threads
            torch.set_num_threads(threads)
        _measure(run, control, jobs, threads, deterministic, ray)
    finally:
        torch.set_num_threads(before)


def _measure(run: RunFolder, control: Control, jobs: int, threads: int, deterministic: bool, ray: bool) -> None:
    with run.recording() as archive:
        done = len(archive.known())
        for line in filter(None, (run.validation.origin, run.baseline.left_out, done and f"goes on after {done}")):
            control.say(f"search: {line}")
        if jobs > 1 and not deterministic:
            control.say(f"search: {jobs} jobs, asynchronous: what is measured depends on who is faster; "
                        "--deterministic makes one answer of one seed")
        run.release()
        if jobs > 1:
            _run_jobs(run, archive, control, jobs, threads, deterministic)
        else:
            _work(run, archive, jobs=1, deterministic=deterministic, spread=control.should_stop if ray else None,
                  progress=lambda done, total: _report(control, archive, done, total))
        if (done := len(archive.known())) < run.budget and run.study.search.patience:
            control.say(f"search: ended at {done}: the front has not grown for {run.study.search.patience} evaluations")
        if fit := describe_fit(run.space.sizes, archive.measurements()):
            control.say(f"search: {fit}")


def _work(run: RunFolder, archive: Archive, *, jobs: int, deterministic: bool,
          progress: Callable[[int, int], None], spread: Callable[[], bool] | None = None) -> None:
    """One worker of at least `jobs`: ask, claim, measure, record, until the budget is spent.

    It measures on the Ray cluster where `spread` is given, which says whether to stop.
    """
    settings, bounded = run.study.search, run.bounded

    def evaluate(batch: list[Genotype]) -> Iterator[Measurement]:
        race = _start_race(run, archive, bounded) if settings.race else None
        return _evaluate_spread(run, batch, race, spread) if spread else run.evaluator.evaluate(batch, race)

    share_search(engine=run.build_engine(), objectives=settings.objectives, board=archive, evaluate=evaluate,
                 budget=run.budget, batch_size=settings.batch_size, patience=settings.patience, workers=jobs,
                 deterministic=deterministic, allows=bounded.allows, progress=progress)


def _start_race(run: RunFolder, archive: Archive, space: SearchSpace) -> Race | None:
    """What the next genotypes have to beat: the front of what the engine was told.

    Of whole batches, so that it follows from how far the search is, and neither from who is faster nor from what was
    interrupted.
    """
    settings, count = run.study.search, len(run.validation.images)
    measured = archive.measurements()
    told = [one for one in measured[:len(measured) - len(measured) % settings.batch_size]
            if one.valid and len(one.psnr_db) == count and space.allows(one.genotype)]
    if QUALITY not in settings.objectives or not told:
        return None
    keep = non_dominated(objective_values(told, settings.objectives))
    return Race([one for one, is_kept in zip(told, keep, strict=True) if is_kept],
                [name for name in settings.objectives if name != QUALITY])


def _report(control: Control, archive: Archive, done: int, total: int) -> None:
    """Say how many genotypes all workers together have measured; raises Interrupted."""
    workers = f", {archive.workers} workers" if archive.workers > 1 else ""
    control.step("search", done, total, f"genotypes{workers}")


def _run_jobs(run: RunFolder, archive: Archive, control: Control, jobs: int, threads: int, deterministic: bool) -> None:
    """Start the jobs and wait for them; those left go on without one that died, and measure what it had claimed."""
    spawn = multiprocessing.get_context("spawn")
    stop, failures, workers = spawn.Event(), list[str](), []
    storage, budget = run.storage if isinstance(run.storage, str) else "", run.budget
    for _ in range(jobs):
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_run_job, args=(
            run.path, storage, list_imports(), jobs, threads, deterministic, stop, theirs))
        process.start()
        theirs.close()
        workers.append((process, ours))
    try:
        while any(process.is_alive() for process, _ in workers):
            time.sleep(_LOOK_S)
            if archive.look():  # this process is no worker
                control.progress("search", len(archive.known()), budget, f"genotypes, {archive.workers - 1} workers")
            if control.should_stop():
                stop.set()
    finally:
        for process, _ in workers:
            process.terminate()
            process.join()
    for number, (process, ours) in enumerate(workers, 1):
        if process.exitcode:
            failures.append(_read_failure(ours, process.exitcode))
            control.say(f"search: job {number} ended early: {failures[-1]}")
    archive.look()
    if stop.is_set() and len(archive.known()) < budget:
        raise Interrupted("search")
    if len(failures) == jobs:
        raise RuntimeError(failures[0])


def _read_failure(connection: Connection, exitcode: int | None) -> str:
    """What a job that failed says of it; what was killed says nothing."""
    try:
        return str(connection.recv())
    except EOFError:
        return f"it was killed (exit code {exitcode})"


def _run_job(path: Path, storage: str, imports: list[str], jobs: int, threads: int, deterministic: bool, stop: Event,
             failed: Connection) -> None:
    """A job's whole life, in its own process; ends after the genotype at hand where it is asked to, or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    keep_freed_memory()
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def check(done: int, total: int) -> None:
        if stop.is_set() or parent is None or not parent.is_alive():
            raise Interrupted("search")

    try:
        for code in imports:
            import_code(code)
        run = RunFolder.reopen(path, storage=storage)
        with run.recording() as archive:
            _work(run, archive, jobs=jobs, deterministic=deterministic, progress=check)
    except Interrupted:
        pass
    except Exception as error:
        if os.environ.get("ENS_TRACEBACK"):
            raise
        failed.send(str(error) or type(error).__name__)
        sys.exit(EXIT_FAILED)


def join_cluster(address: str) -> None:
    """Connect this process to a Ray cluster; raises ValueError where none answers, or Ray is not installed."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("--ray needs the Python package ray, which is not installed: pip install 'ens[ray]'") from None
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else it writes into the terminal when a search is stopped
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no Ray cluster answers at {address}: {reason}") from None
    for number, handler in handlers.items():  # Ray takes SIGTERM for itself
        signal.signal(number, handler)


def distill_missing(run: RunFolder, control: Control) -> None:
    """Align every surrogate that the library lacks on the cluster, a slot a task, and take them into the library.

    Each slot has a library of its own meanwhile, where what a dead node had begun is gone on with.
    """
    slots = list(dict.fromkeys(spec.name for spec, _ in run.missing_jobs))
    if not slots:
        return
    control.say(f"distill: {run.ends.describe()}")
    control.progress("distill", 0, len(slots), "slots")
    parts = _spread(run, _distill_there, [(slot,) for slot in slots], "distill", control.should_stop)
    for done, part in enumerate(parts, 1):
        run.library.absorb(open_library(part))
        control.progress("distill", done, len(slots), "slots")


def _distill_there(there: _There, slot: str) -> Path:
    """Align the surrogates of one slot, into a library beside the run's own; returns its folder."""
    run = _open(there)
    root, settings = run.library.root.with_name(f"{run.library.root.name}.{slot}"), run.study.distill
    if (root / "manifest.json").exists():
        part = open_library(root)
    else:
        part = create_library(root, run.library.load_teacher(), task=str(run.task), dtype=settings.dtype,
                              recipe=settings.model_dump())
    distill_library(run.teacher, part, run.patches("distill"), [job for job in run.missing_jobs if job[0].name == slot],
                    seed=run.study.seed, device=run.device, **settings.model_dump(exclude={"dtype"}))
    return root


def _evaluate_spread(run: RunFolder, batch: Sequence[Genotype], race: Race | None,
                     should_stop: Callable[[], bool]) -> Iterator[Measurement]:
    """Measurements of a batch in its order; each process of the cluster has neighbours, which share prefixes."""
    import ray

    processes = max(1, int(ray.cluster_resources()["CPU"]) // torch.get_num_threads())
    size = math.ceil(len(batch) / processes)
    parts = [(run.baseline, batch[start:start + size], race) for start in range(0, len(batch), size)]
    for measured in _spread(run, _evaluate_there, parts, "search", should_stop):
        yield from measured


def _evaluate_there(there: _There, baseline: Baseline, batch: list[Genotype], race: Race | None) -> list[Measurement]:
    run = _open_once(there)
    run.baseline = baseline
    return list(run.evaluator.evaluate(batch, race))


def _open(there: _There) -> RunFolder:
    """The run, in a process of the cluster, which may have served its distillation before."""
    path, imports = there
    keep_freed_memory()
    for code in imports:
        import_code(code)
    return RunFolder.reopen(path)


_open_once = functools.lru_cache(maxsize=1)(_open)


def _spread(run: RunFolder, work: Callable[..., _Result], tasks: Sequence[tuple[Any, ...]],
            verb: str, should_stop: Callable[[], bool]) -> Iterator[_Result]:
    """What `work` returns of every task, in order. What a node had at hand when it died, another does again.

    Raises Interrupted, of the verb, where it should stop; what is still out is then lost.
    """
    import ray

    there = (run.path.resolve(), tuple(list_imports()))
    remote = ray.remote(num_cpus=torch.get_num_threads(), num_gpus=int(run.device != "cpu"), max_retries=-1)(work)
    for waited in [remote.remote(there, *task) for task in tasks]:
        while not ray.wait([waited], timeout=_LOOK_S)[0]:
            if should_stop():
                raise Interrupted(verb)
        try:
            yield ray.get(waited)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
