"""SIGKILLs at random moments of every verb: the same command then ends with what an uninterrupted one leaves.

After each kill the verb is run again in the end; files and measurements must equal those of a run without kills, no
genotype may have been recorded twice, and no file may lie there that the other run does not have.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
from safetensors.torch import load_file

from ens.data.folders import find_pairs
from ens.distill.library import open_library
from ens.export.hybrid import read_facts
from ens.networks.checkpoints import hash_weights
from ens.pareto.archive import read_archive

STUDY = """
task: {name: denoise, sigma_255: 25}
network: {name: plksr, dim: 8, n_blocks: 3, kernel_size: 5, upscaling_factor: 1}
choices: [conv×1, rep×1]
data: {train: "builtin:train-photos", validation: "builtin:validation-photos", crop_px: 64, limit: 2}
train: {steps: 150, lr: 3e-3, phases: [[0, 16, 2]]}
distill: {steps: 80, batch_size: 2, patch_px: 16, group_size: 4}
search: {engine: nsga2, objectives: [psnr_drop_db, macs], budget: 24, batch_size: 4}
finetune: {steps: 150, phases: [[0, 16, 2]], taught_weight: 0.5}
threads: 1
"""
BUDGET = 24
VERBS = {
    "train": ["train", "{study}", "--out", "{run}"], "distill": ["distill", "{study}", "--out", "{run}"],
    "search": ["search", "{study}", "--out", "{run}"], "finetune": ["finetune", "{run}"], "pareto": ["pareto", "{run}"],
    "export": ["export", "{run}"], "restore": ["restore", "{onnx}", "{photo}", "{run}/restored/photo.png"],
    "run": ["run", "{study}", "--out", "{whole}"],
}
_CODE = "from ens.cli import main; main()"


def start(verb: str, folder: Path) -> subprocess.Popen[bytes]:
    """A verb in a process of its own; `folder` holds the study and the run folders `run` and `whole`."""
    names = {"study": folder / "kill.yaml", "run": folder / "run", "whole": folder / "whole",
             "photo": find_pairs("builtin:report-photos")[0].clean,
             "onnx": next(folder.glob("run/export/*.onnx"), Path())}
    return subprocess.Popen([sys.executable, "-c", _CODE, *(part.format(**names) for part in VERBS[verb])],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(verb: str, folder: Path) -> float:
    """Run a verb to its end; returns the seconds it took. Raises RuntimeError, with what it said, where it fails."""
    began = time.monotonic()
    process = start(verb, folder)
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"{verb} ended with {process.returncode}: {errors.decode(errors='replace')}")
    return time.monotonic() - began


def describe(folder: Path) -> dict[str, object]:
    """Every file and what is in it, in a form that compares: weights, images and tables by their bytes, archives and
    libraries by what they say. Of what holds times or random names, and of locks, the name alone.
    """
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":  # which keeps its metadata in another order in every process
            found[name] = (read_facts(path), hash_weights(load_file(path)))
        elif path.suffix in (".csv", ".md", ".png", ".yaml", ".onnx"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "archive.db":
            archive = read_archive(path)
            found[name] = (archive.measurements(), archive.tuned, archive.marked)
            trials = optuna.load_study(study_name=None, storage=f"sqlite:///{path}").trials
            genotypes = [trial.user_attrs["genotype"] for trial in trials]
            assert len(genotypes) == len(set(genotypes)) == BUDGET
        elif path.name == "manifest.json":
            library = open_library(path.parent)
            found[name] = (library.teacher_sha256, library.surrogates)
        else:
            found[name] = None
    return found


def campaign(folder: Path, *, kills: int, seed: int) -> int:
    """Kill every verb `kills` times while it runs, beginning again whenever it got to its end; returns the kills.

    Raises AssertionError, naming the verb and the files, for the first difference.
    """
    moments, met = random.Random(seed), 0
    plain, killed, fresh = folder / "plain", folder / "killed", folder / "fresh"
    for place in (plain, killed):
        place.mkdir(parents=True)
        (place / "kill.yaml").write_text(STUDY, encoding="utf-8")
    for verb in VERBS:
        seconds = took = finish(verb, plain)
        before = met
        shutil.copytree(killed, fresh)
        while met < before + kills:
            process = start(verb, killed)
            time.sleep(moments.uniform(0.2, 1.0) * seconds)
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if ended:  # earlier kills had left it little to do, or the machine was slower before
                seconds *= 0.9
                compare(verb, plain, killed)
                shutil.rmtree(killed)
                shutil.copytree(fresh, killed)
            met += not ended
        finish(verb, killed)
        compare(verb, plain, killed)
        shutil.rmtree(fresh)
        print(f"{verb}: {kills} kills within {took:.0f} s, the same {len(describe(plain))} files", flush=True)
    return met


def compare(verb: str, plain: Path, killed: Path) -> None:
    """Raises AssertionError, naming the files that differ."""
    expected, found = describe(plain), describe(killed)
    wrong = [name for name in sorted({*expected, *found}) if name not in expected or name not in found
             or expected[name] != found[name]]
    assert not wrong, f"after kills of {verb} these differ: {', '.join(wrong)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=13, help="kills of each of the eight verbs")
    parser.add_argument("--seed", type=int, default=20261125)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        met = campaign(Path(folder), kills=arguments.kills, seed=arguments.seed)
    print(f"{met} kills while verbs ran: nothing lost, repeated or left over")


if __name__ == "__main__":
    main()
