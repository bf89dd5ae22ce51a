"""Train a small network of each seed family for minutes and score it beside the trivial answer.

`python scripts/train_seeds.py` trains every study of scripts/seeds on ../shared/data/bsd400 and scores it on bsd32 with
its task's protocol, beside bicubic upsampling (super-resolution) or the degraded input; `results/seeds.md` gets the
table. Training resumes; what is trained is not trained again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ens import pipeline
from ens.config import load_study
from ens.data.degradations import resize_bicubic
from ens.data.pairs import load_validation_set
from ens.data.tasks import create_task
from ens.evaluate.evaluator import evaluate_restorer
from ens.evaluate.protocols import task_protocols
from ens.networks.checkpoints import load_checkpoint
from ens.run_folder import RunFolder
from ens.runtime.process import Control

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    studies = sorted(path.stem for path in (ROOT / "scripts" / "seeds").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=studies, help=f"of {', '.join(studies)}")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "seeds.md")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "bsd32")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lines = [f"Small networks trained on bsd400, scored on {given.data.name}; protocols as each task has them.", "",
             "| network | parameters | task | steps | minutes of processor time | trivial dB | network dB | gain dB |",
             "|---|---|---|---|---|---|---|---|"]
    for name in given.studies:
        lines.append(train_and_score(name, given.runs / name, given.data))
        print(lines[-1], flush=True)
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def train_and_score(name: str, run: Path, data: Path) -> str:
    """One row of the table; the time is that of this call, "–" where the network was there already."""
    study = load_study(ROOT / "scripts" / "seeds" / f"{name}.yaml")
    checkpoint, began = run / "teacher" / "teacher.safetensors", time.process_time()
    trained = not checkpoint.exists()
    pipeline.train(RunFolder.start(study, run), Control(progress=lambda verb, done, total, note: (
        print(f"  {name} {done}/{total} {note}", flush=True) if done % 200 == 0 else None)))
    minutes = f"{(time.process_time() - began) / 60:.1f}" if trained else "–"
    options = dict(study.task)
    task = create_task(options.pop("name"), options)
    images, network = load_validation_set(data, task), load_checkpoint(checkpoint)

    def enlarge(image: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
        height, width = (side * task.scale for side in pixels.shape[:2])
        large = resize_bicubic(pixels, height=height, width=width) if task.scale > 1 else pixels
        return torch.from_numpy(large).permute(2, 0, 1)[None]

    protocol = task_protocols(task)[0]
    trivial, restored = (statistics.fmean(score.psnr_db for score in evaluate_restorer(restore, images, protocol))
                         for restore in (enlarge, network))
    params = sum(p.numel() for p in network.parameters())
    return (f"| {name} | {params:,} | {task.name} | {study.train.steps} | {minutes} | {trivial:.2f} | {restored:.2f} | "
            f"{restored - trivial:+.2f} |")


if __name__ == "__main__":
    main()
