"""What shared prefixes save: every genotype of a space by batches, and the same genotypes each from scratch.

    .venv/bin/python scripts/bench_walk.py scripts/walk.yaml --crop 64 --images 1 2

Wall and processor time of both in one run of one thread, on the first number of images; with each number 200 random
genotypes are compared bit for bit, and the peak of the process's memory must not grow from the first to the next.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ens.config import load_study
from ens.evaluate.evaluator import Evaluator
from ens.run_folder import RunFolder
from ens.space import Genotype


def build(study: Path, folder: Path, crop: int, images: int, cache_bytes: int) -> tuple[RunFolder, Evaluator]:
    settings = load_study(study)
    data = settings.data.model_copy(update={"crop_px": crop, "limit": images})
    search = settings.search.model_copy(update={"objectives": ("psnr_drop_db", "macs")})
    run = RunFolder.start(settings.model_copy(update={"data": data, "search": search}), folder)
    evaluator = run.evaluator
    evaluator._cache_bytes = cache_bytes
    return run, evaluator


def walk(evaluator: Evaluator, genotypes: list[Genotype], batch: int, cache_bytes: int) -> np.ndarray:
    """Seconds by the wall and of the processor."""
    evaluator._cache_bytes = cache_bytes
    start = np.array([time.perf_counter(), time.process_time()])
    for index in range(0, len(genotypes), batch):
        list(evaluator.evaluate(genotypes[index:index + batch]))
    return np.array([time.perf_counter(), time.process_time()]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--crop", type=int, default=48)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for images in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            run, evaluator = build(arguments.study, Path(folder) / "run", arguments.crop, images, 2**30)
            genotypes = list(run.space.enumerate())
            rng = np.random.default_rng(0)
            sample = sorted(genotypes[index] for index in rng.choice(len(genotypes), 200, replace=False))
            together = [measurement.psnr_db for measurement in evaluator.evaluate(sample)]
            evaluator._cache_bytes = 0
            alone = [next(evaluator.evaluate([genotype])).psnr_db for genotype in sample]
            evaluator._cache_bytes = 2**30
            differing = sum(a != b for a, b in zip(itertools.chain(*together), itertools.chain(*alone), strict=True))
            shared, own = np.zeros(2), np.zeros(2)
            for index in range(0, len(genotypes), arguments.batch):  # in turn: the machine is not as fast all the time
                part = genotypes[index:index + arguments.batch]
                shared += walk(evaluator, part, arguments.batch, 2**30)
                own += walk(evaluator, part, 1, 0) if images == arguments.images[0] else 0.0
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{images} images of {arguments.crop}²: {differing} of {len(sample) * images} PSNRs differ; "
                  f"{len(genotypes)} genotypes in batches of {arguments.batch}: {shared[0]:.1f} s, {shared[1]:.1f} s "
                  f"of the processor; peak {peak:.0f} MiB", flush=True)
            if own.any():
                print(f"each from scratch: {own[0]:.1f} s, {own[1]:.1f} s of the processor: {own[0] / shared[0]:.2f} "
                      f"and {own[1] / shared[1]:.2f} times as much", flush=True)


if __name__ == "__main__":
    main()
