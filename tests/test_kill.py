"""kill -9 at random moments of train, distill, search and finetune: the same command ends with the same files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from safetensors.torch import load_file

from ens.distill.library import open_library
from ens.pareto.archive import read_archive

STUDY = """
task: {name: denoise, sigma_255: 25}
network: {name: restormer, dim: 8, num_blocks: [1, 1, 1, 1], num_refinement_blocks: 1, heads: [1, 1, 1, 1],
          layer_norm: BiasFree}
slots: {encoder_level1: [conv×1, vssd×1], latent: [conv×1, vssd×1], decoder_level1: [conv×1, vssd×1],
        refinement: [conv×1]}
data: {train: "builtin:train-photos", validation: "builtin:validation-photos", crop_px: 64, limit: 2}
train: {steps: 250, lr: 3e-3, phases: [[0, 16, 2]]}
distill: {steps: 120, batch_size: 2, patch_px: 16}
search: {engine: nsga2, objectives: [psnr_drop_db, macs], budget: 40, batch_size: 4}
finetune: {steps: 250, phases: [[0, 16, 2]], taught_weight: 0.5}
"""
KILLS = 5
COMMANDS = {"train": ["train", "{study}", "--out", "{out}"], "distill": ["distill", "{study}", "--out", "{out}"],
            "search": ["search", "{study}", "--out", "{out}"], "finetune": ["finetune", "{out}"]}


def start(verb: str, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [part.format(study=folder.parent / "kill.yaml", out=folder) for part in COMMANDS[verb]]
    return subprocess.Popen([sys.executable, "-c", "from ens.cli import main; main()", *arguments],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(verb: str, folder: Path) -> float:
    began = time.monotonic()
    process = start(verb, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - began


def outcome(verb: str, folder: Path) -> object:
    """What the verb leaves, in a form that compares."""
    if verb == "train":
        return {name: value.tolist() for name, value in load_file(folder / "teacher" / "teacher.safetensors").items()}
    if verb == "distill":
        return open_library(folder / "library").surrogates
    if verb == "search":
        return read_archive(folder / "archive.db").measurements()
    path = next((folder / "finetune").glob("*.safetensors"))
    return {name: value.tolist() for name, value in load_file(path).items()}


@pytest.mark.slow
def test_kill_nine_loses_only_the_work_in_flight(tmp_path: Path) -> None:
    (tmp_path / "kill.yaml").write_text(STUDY, encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moments = random.Random(20261121)
    for verb in COMMANDS:
        duration = finish(verb, whole)
        for _ in range(KILLS):
            process = start(verb, killed)
            time.sleep(moments.uniform(0.3, 0.95) * duration)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        finish(verb, killed)
        assert outcome(verb, killed) == outcome(verb, whole), verb
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{killed / 'archive.db'}")
    genotypes = [trial.user_attrs["genotype"] for trial in study.trials]
    assert len(genotypes) == len(set(genotypes)) == 40
