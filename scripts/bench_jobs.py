"""Genotypes a second of `ens search --jobs 2` against `--jobs 1`, in turn, each job with one thread.

    .venv/bin/python scripts/bench_jobs.py --rounds 3

Every search measures other genotypes of the demo, the same in each round's two; seconds run from the first claim to the
last record by the times in the archive, so that what a process needs to start does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import optuna


def measure(folder: Path, *, jobs: int, seed: int, budget: int) -> float:
    """Genotypes a second of one search."""
    settings = ("search.objectives=[psnr_drop_db,penalty]", "search.engine=random", "search.batch_size=1",
                f"search.budget={budget}", f"seed={seed}", "threads=1")
    subprocess.run([sys.executable, "-c", "from ens.cli import main; main()", "search", "demo", "--out", str(folder),
                    "--jobs", str(jobs), *(word for setting in settings for word in ("--set", setting))],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    trials = optuna.load_study(study_name="ens", storage=f"sqlite:///{folder}/archive.db").trials
    starts, ends = zip(*((trial.datetime_start, trial.datetime_complete) for trial in trials), strict=True)
    return float(len(trials) / (max(ends) - min(starts)).total_seconds())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=60)
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            one, two = (measure(Path(folder) / f"{turn}-{jobs}", jobs=jobs, seed=turn, budget=arguments.budget)
                        for jobs in (1, 2))
            ratios.append(two / one)
            print(f"round {turn}: {one:.2f} and {two:.2f} genotypes a second, {ratios[-1]:.2f} times; "
                  f"load of the machine {os.getloadavg()[0]:.1f}", flush=True)
    print(f"median {statistics.median(ratios):.2f} times, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
