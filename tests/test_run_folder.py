"""What a study names is checked before any work is done for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ens import pipeline
from ens.config import ConfigError, load_study
from ens.data.images import Photo, write_photo
from ens.networks import create_network
from ens.networks.checkpoints import save_checkpoint
from ens.pareto.storage import ArchiveMismatch
from ens.run_folder import RunFolder
from ens.runtime.process import Control

ROOT = Path(__file__).resolve().parents[1]


OWN = {"network": {"name": "restormer", "dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1,
                   "heads": [1, 1, 1, 1]}}


@pytest.mark.parametrize(("change", "message"), [
    ({"search": {"engine": "nsga3"}}, "engine 'nsga3' does not exist .did you mean nsga2\\?.; choose from .*ehvi"),
    ({"search": {"objectives": ["psnr", "macs"]}}, "objective 'psnr' does not exist; choose from psnr_drop_db"),
    ({"search": {"objectives": ["macs"]}}, "two or three different objectives, got macs"),
    ({"search": {"max": {"macs": 1.0}}}, r"no genotype has macs of at most 1; the least there is, is [\d.]+ G"),
    ({"search": {"max": {"peak_bytes": 1e6}}}, r"peak_bytes of at most 1.00 MB; the least there is, is [\d.]+ MB"),
    ({"search": {"max": {"flops": 1.0}}}, "objective 'flops' does not exist"),
    ({"task": {"name": "denoize"}}, "no task 'denoize' .did you mean denoise\\?.; there are denoise"),
    ({"task": {"sigma": 25}}, "the nearest is 'sigma_255'"),
    ({"slots": {"latent": ["mambaire×1"]}}, "no block family 'mambaire' .did you mean mambair\\?.; allowed: restormer"),
    ({"slots": {"latent": ["mambair×1(stat=3)"]}}, "no option 'stat' .did you mean state\\?.; allowed: state"),
    ({"choices": [], "slots": {"latnet": ["vssd×1"]}}, "no slot .latnet. .did you mean latent\\?.; the network has"),
    ({"teacher": "", "library": "", "network": {"name": "restromer"}}, "did you mean restormer\\?.; allowed"),
    ({"teacher": "nowhere.pth"}, "nowhere.pth: does not exist"),
    ({"data": {"validation": "nowhere"}}, "nowhere is not a folder"),
    ({"data": {"report": "nowhere"}}, "nowhere is not a folder"),
    ({"data": {"crop_px": 5000}}, r"do not fit into \d+ images: .* is 6\d\d×4\d\d"),
    ({"teacher": "", "library": "", "network": {"name": "plksr"}}, "the network enlarges 4 times, the task 1 times"),
    ({"data": {"train": "nowhere"}}, "nowhere is not a folder"),
    ({"finetune": {"phases": [[0, 505, 8]]}}, r"patches of 505 px do not fit into 1 images of .*: motorcycle_left is"),
    ({"finetune": {"phases": [[5, 48, 8]]}}, "phases start at step 0"),
    ({"finetune": {"taught_by": "nowhere.pth"}}, "nowhere.pth: does not exist"),
    ({"slots": {"latent": ["conv×3"]}}, "lacks 1 of the 28 surrogates of demo; leave `library` out"),
    ({"teacher": "", "library": "", **OWN, "distill": {"patch_px": 999}}, "patches of 999 px do not fit into 2 im"),
    ({"teacher": "", "library": "", **OWN, "train": {"phases": [[0, 600, 1]]}}, "patches of 600 px do not fit"),
    ({"teacher": "", "library": "", **OWN, "data": {"train": ""}}, "`data.train` names no folder"),
    ({"device": "gpu"}, "device is auto, cpu, cuda or cuda:1, got 'gpu'"),
    ({"device": "meta"}, "device is auto, cpu, cuda or cuda:1, got 'meta'"),
])
def test_a_mistake_is_found_before_anything_is_made(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError, KeyError), match=message):
        RunFolder.start(load_study(ROOT / "search_spaces" / "demo.yaml", change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"pick": "kneee"}, "'kneee' is not understood; write knee, near 1 to near 5, within 0.1"),
    ({"pick": "near 7"}, "is not understood"), ({"pick": "within nan"}, "write for instance within 0.1"),
    ({"pick": "0-0"}, "a genotype of demo has"), ({"storage": "postgres9://host/runs"}, "Can't load plugin"),
    ({"storage": "sqlite://"}, "names no file")])
def test_a_mistake_in_a_command_is_found_before_anything_is_made(tmp_path: Path, options: dict[str, str],
                                                                 message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunFolder.start(load_study(ROOT / "search_spaces" / "demo.yaml"), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_scale_is_found_before_anything_is_made(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x2.safetensors", create_network("plksr", dim=8, n_blocks=1, kernel_size=3,
                                                                upscaling_factor=2))
    study = load_study(ROOT / "search_spaces" / "demo.yaml",
                       {"finetune": {"taught_by": str(tmp_path / "x2.safetensors")}})
    with pytest.raises(ConfigError, match=r"finetune\.taught_by enlarges 3 channels 2 times, the network 3 channels 1"):
        RunFolder.start(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_restart_drops_the_states_of_unfinished_trainings_and_nothing_else(tmp_path: Path) -> None:
    study = load_study(ROOT / "search_spaces" / "demo.yaml")
    for name in ("teacher/train.pt", "library/training.pt", "finetune/0-1.pt", "finetune/0-1.safetensors", "my.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    RunFolder.start(study, tmp_path, restart=True)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "0-1.safetensors", "my.pt", "run.lock", "study.yaml"]


def test_a_broken_validation_image_is_found_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    study = load_study(ROOT / "search_spaces" / "demo.yaml", {"data": {"validation": str(tmp_path / "photos")}})
    with pytest.raises(ValueError, match=r"torn\.png"):
        RunFolder.start(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_auto_takes_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said: list[str] = []
    pipeline.train(RunFolder.start(load_study(ROOT / "search_spaces" / "demo.yaml"), tmp_path / "run"),
                   Control(say=said.append))
    assert said[0] == "device: auto takes the CPU, torch sees no GPU"


def test_a_run_folder_keeps_its_study_and_refuses_another(tmp_path: Path) -> None:
    demo = ROOT / "search_spaces" / "demo.yaml"
    study = load_study(demo)
    RunFolder.start(study, tmp_path / "run")
    assert RunFolder.reopen(tmp_path / "run").study == study
    RunFolder.start(load_study(demo, {"seed": 2}), tmp_path / "run")  # nothing was made with the first one yet
    (tmp_path / "run" / "archive.db").touch()
    RunFolder.start(load_study(demo, {"seed": 2, "search": {"budget": 7}}), tmp_path / "run")
    assert RunFolder.reopen(tmp_path / "run").study.search.budget == 7
    with pytest.raises(ConfigError, match="seed: 2 there, 3 now"):
        RunFolder.start(load_study(demo, {"seed": 3}), tmp_path / "run")
    with pytest.raises(ConfigError, match="seed: 2 there, 4 now"):
        RunFolder.reopen(tmp_path / "run", {"seed": 4})
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder.reopen(tmp_path)


def test_the_threads_of_a_study_are_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    RunFolder(tmp_path, load_study(ROOT / "search_spaces" / "demo.yaml", {"threads": 3}))
    RunFolder(tmp_path, load_study(ROOT / "search_spaces" / "demo.yaml"))
    assert asked == [3]


def test_what_was_measured_with_another_task_is_never_mixed(tmp_path: Path) -> None:
    """Sigma 25 and sigma 50 on one storage: the archive knows what it measured, images and weights unopened."""
    small = {"search": {"budget": 2, "batch_size": 2, "engine": "random",
                        "objectives": ["psnr_drop_db", "penalty"]}, "data": {"limit": 1, "crops_per_image": 1}}
    demo, storage = ROOT / "search_spaces" / "demo.yaml", str(tmp_path / "archive.db")
    pipeline.search(RunFolder.start(load_study(demo, small), tmp_path / "a", storage=storage))
    other = load_study(demo, {**small, "task": {"name": "denoise", "sigma_255": 50}})
    with pytest.raises(ArchiveMismatch, match=r"task was .*25.* is now .*50"):
        pipeline.search(RunFolder.start(other, tmp_path / "b", storage=storage))


def test_a_search_keeps_its_bounds_and_fronts_take_costs_that_were_not_recorded(tmp_path: Path) -> None:
    search = {"budget": 4, "engine": "random", "objectives": ["psnr_drop_db", "penalty"], "max": {"penalty": 6.0}}
    study = load_study(ROOT / "search_spaces" / "demo.yaml", {"search": search,
                                                              "data": {"limit": 1, "crops_per_image": 1}})
    run = RunFolder.start(study, tmp_path / "run")
    measured = pipeline.search(run)
    assert len(measured) == 4 and all(one.values["penalty"] <= 6.0 for one in measured)
    front = run.front(("psnr_drop_db", "peak_bytes"))
    assert all(member.values["peak_bytes"] == run.meter("peak_bytes").measure(member.genotype)
               for member in front.members)
    assert "at 256×256" in front.meters["peak_bytes"] and front.label("peak_bytes").endswith("at 256×256")
    pipeline.pareto(run, objectives=("psnr_drop_db", "peak_bytes"))
    assert "peak activation memory (bytes) at 256×256" in (tmp_path / "run" / "front.md").read_text(encoding="utf-8")


def test_fixed_slots_and_forbidden_families_hold_for_search_and_front_and_may_change(tmp_path: Path) -> None:
    demo, label = ROOT / "search_spaces" / "demo.yaml", "conv×1"
    few = {"data": {"limit": 1, "crops_per_image": 1}}
    search = {"engine": "nsga2", "objectives": ["psnr_drop_db", "penalty"], "batch_size": 5}
    pipeline.search(RunFolder.start(load_study(demo, {**few, "search": {**search, "budget": 5}}), tmp_path))
    limits = {**search, "budget": 9, "fix": {"latent": label}, "forbid": ["vssd"]}
    run = RunFolder.start(load_study(demo, {**few, "search": limits}), tmp_path)
    added = [run.space.replaced(one.genotype) for one in pipeline.search(run)[5:]]
    assert len(added) == 4, "engines go on with what was measured before"
    for replaced in [*added, *(run.space.replaced(member.genotype) for member in run.front().members)]:
        assert replaced["latent"].label == label and "vssd" not in {choice.family for choice in replaced.values()}
    with pytest.raises(ConfigError, match=r"searches no slot 'latnet' .did you mean latent\?.; it has decoder_level1"):
        RunFolder.start(load_study(demo, {**few, "search": {**limits, "fix": {"latnet": label}}}), tmp_path / "other")


def test_renamed_files_keep_their_place_among_the_images_of_a_run(tmp_path: Path) -> None:
    """PSNRs of an archive are paired by position: a search that goes on after a renaming must find the same order."""
    seen = []
    for folder, names in (("a", ("1.png", "2.png", "3.png")), ("b", ("3.png", "1.png", "2.png"))):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            write_photo(tmp_path / folder / name, Photo(pixels))
        study = load_study(ROOT / "search_spaces" / "demo.yaml", {
            "data": {"validation": str(tmp_path / folder), "crop_px": 64, "crops_per_image": 1}})
        seen.append(RunFolder(tmp_path / "run", study).validation)
    assert seen[0].fingerprint == seen[1].fingerprint
    assert all(torch.equal(one.degraded, other.degraded)
               for one, other in zip(seen[0].images, seen[1].images, strict=True))
