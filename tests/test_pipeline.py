"""The whole road on a tiny teacher: every verb, skipping, resuming, and an independent brute force."""

from __future__ import annotations

import math
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from ens import pipeline
from ens.config import ConfigError, StudyConfig, load_study
from ens.data.folders import find_pairs
from ens.data.images import Photo, read_photo, write_photo
from ens.data.pairs import degrade_photo, load_validation_set
from ens.data.tasks import create_task
from ens.distill.fit import TrainingError
from ens.distill.library import Library, LibraryError, open_library
from ens.evaluate.cost import count_cost
from ens.evaluate.evaluator import list_psnr_db
from ens.evaluate.metrics import score
from ens.evaluate.protocols import task_protocols
from ens.export.formats import ExportError, ParityError
from ens.export.hybrid import build_hybrid, load_hybrid, read_facts
from ens.networks import create_network
from ens.networks.checkpoints import load_checkpoint, save_checkpoint
from ens.pareto.archive import read_archive
from ens.pareto.tables import front_notes
from ens.run_folder import RunFolder
from ens.runtime.process import Control, Interrupted
from ens.runtime.session import open_session, restore_files
from ens.space import format_genotype

STUDY = """
task: {name: denoise, sigma_255: 25}
network: {name: restormer, dim: 8, num_blocks: [1, 1, 1, 2], num_refinement_blocks: 1, heads: [1, 1, 2, 2],
          layer_norm: BiasFree}
slots: {latent: [restormer×1, vssd×1], encoder_level2: [conv×1, identity×1]}
data: {train: "builtin:train-photos", validation: "builtin:validation-photos", report: "builtin:report-photos",
       crop_px: 32, limit: 2}
train: {steps: 20, lr: 5e-3, phases: [[0, 24, 4]]}
distill: {steps: 3, batch_size: 2, patch_px: 16, dtype: float16}
search: {engine: exhaustive, objectives: [psnr_drop_db, macs], budget: 9, batch_size: 4}
finetune: {steps: 2, phases: [[0, 16, 2]], taught_weight: 0.5}
"""


def write_study(folder: Path) -> StudyConfig:
    path = folder / "tiny.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return load_study(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StudyConfig, Path, Path]]:
    folder = tmp_path_factory.mktemp("road")
    study = write_study(folder)
    yield study, folder / "run", pipeline.run_all(RunFolder.start(study, folder / "run"))


def test_one_command_leaves_every_file(finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    for name in ("study.yaml", "archive.db", "front.csv", "front.md", "front.png", "report.html",
                 "teacher/teacher.safetensors", "library/manifest.json"):
        assert (out / name).stat().st_size > 0, name
    assert onnx.exists() and onnx.with_suffix(".safetensors").exists() and onnx.with_name(f"{onnx.name}.yaml").exists()


def test_exhaustive_search_of_two_slots_equals_a_brute_force_without_cache(
        finished: tuple[StudyConfig, Path, Path]) -> None:
    study, out, _ = finished
    check_by_brute_force(study, out, num_genotypes=9)


@pytest.mark.slow
def test_exhaustive_search_of_two_demo_slots_equals_a_brute_force_without_cache(tmp_path: Path) -> None:
    study = load_study("search_spaces/demo.yaml", {
        "data": {"crop_px": 64, "limit": 1},
        "search": {"engine": "exhaustive", "objectives": ["psnr_drop_db", "penalty"], "budget": 9}}).model_copy(
            update={"slots": {"latent": ("restormer×1", "conv×2"), "refinement": ("vssd×1(state=16)", "conv×1")}})
    pipeline.search(RunFolder.start(study, tmp_path / "run"))
    check_by_brute_force(study, tmp_path / "run", num_genotypes=9)


def check_by_brute_force(study: StudyConfig, out: Path, *, num_genotypes: int) -> None:
    library = open_library(study.library or out / "library")
    teacher = library.load_teacher()
    task = create_task("denoise", {"sigma_255": 25})
    images = load_validation_set(study.data.validation, task, crop_px=study.data.crop_px, limit=study.data.limit,
                                 crops_per_image=study.data.crops_per_image).images
    space = RunFolder.reopen(out).space
    measured = read_archive(out / "archive.db").known()
    assert len(measured) == space.num_genotypes == num_genotypes

    def mean_psnr(network: torch.nn.Module) -> float:
        with torch.inference_mode():
            return float(np.mean([score(network(image.degraded[None])[0], image.clean, task_protocols(task)[0]).psnr_db
                                  for image in images]))

    for genotype in space.enumerate():
        hybrid = build_hybrid(teacher, {
            slot.name: library.load_surrogate(teacher.slot(slot.name), choice)
            for slot, choice in zip(space.slots, space.choices(genotype), strict=True) if not choice.teacher})
        values = measured[genotype].values
        assert values["psnr_drop_db"] == pytest.approx(mean_psnr(teacher) - mean_psnr(hybrid), abs=1e-9)
        assert values["macs"] == count_cost(hybrid, (1, 3, 256, 256)).macs
        assert values["params"] == sum(p.numel() for p in hybrid.parameters())


def test_receptive_fields_of_a_slot_are_drawn_for_every_state_there_is(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    maps = pipeline.inspect_erf(RunFolder.reopen(out), "latent", tmp_path / "erf.png")
    tuned = int(onnx.stem.split("-")[1])  # the latent stage is the second of the two slots
    assert list(maps) == ["restormer×2", "restormer×1", "vssd×1"] and list(maps["restormer×2"]) == ["teacher"]
    for index, choice in enumerate(list(maps)[1:], 1):
        assert list(maps[choice]) == ["before", "distilled", *(["fine-tuned"] if index == tuned else [])]
    assert read_photo(tmp_path / "erf.png").pixels.std() > 0
    with pytest.raises(ValueError, match="it searches encoder_level2, latent"):
        pipeline.inspect_erf(RunFolder.reopen(out), "refinement", tmp_path / "erf.png")


def failing(error: Exception) -> Callable[..., float]:
    def fail(*arguments: object, **options: object) -> float:
        raise error
    return fail


def test_a_hybrid_whose_file_differs_leaves_the_front_stays_visible_and_comes_back_with_a_success(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, onnx = finished
    run = copied(out, tmp_path)
    front = run.front()
    genotype = next(member.genotype for member in front.members if format_genotype(member.genotype) != onnx.stem)
    text = format_genotype(genotype)
    for come_back in (lambda: pipeline.export(run, text), lambda: run.unmark(text)):
        with monkeypatch.context() as patch, pytest.raises(ExportError, match=f"{text} is marked invalid"):
            patch.setattr("ens.export.card.write_checked", failing(ParityError("differs by 1e-2")))
            pipeline.export(run, text)
        assert genotype not in [member.genotype for member in run.front().members]
        (invalid,) = [measurement for measurement in run.archive.measurements() if not measurement.valid]
        assert invalid.genotype == genotype and invalid.note == "export failed: differs by 1e-2"
        come_back()
        assert [member.genotype for member in run.front().members] == [member.genotype for member in front.members]
    with pytest.raises(ValueError, match=f"{text} is not marked; no genotype is"):
        run.unmark(text)


@pytest.mark.parametrize(("error", "untuned"), [
    (ExportError("the exported file does not run: of a passing mood"), True), (MemoryError("no memory"), True),
    (OSError(28, "No space left on device"), True), (ParityError("differs by 1e-2"), False)])
def test_no_other_failure_of_an_export_speaks_against_a_genotype(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path], monkeypatch: pytest.MonkeyPatch, error: Exception,
        untuned: bool) -> None:
    """Nor does a file of fine-tuned weights that differs: the training may have diverged."""
    _, out, onnx = finished
    run = copied(out, tmp_path)
    text = next(format_genotype(member.genotype) for member in run.front().members
                if (format_genotype(member.genotype) != onnx.stem) == untuned)
    monkeypatch.setattr("ens.export.card.write_checked", failing(error))
    with pytest.raises(type(error) if untuned else ExportError) as raised:
        pipeline.export(run, text)
    assert run.archive.marked == {} and all(measurement.valid for measurement in run.archive.measurements())
    assert untuned or "stays on the front" in str(raised.value)


def test_a_fine_tuning_that_diverges_is_an_error_and_no_genotype_is_to_blame(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, onnx = finished
    run = copied(out, tmp_path, {"finetune": {"steps": 4}})
    before = run.archive.fingerprint
    monkeypatch.setattr(run.judge, "score", lambda network: float("nan"))
    with pytest.raises(TrainingError, match="no finite output"):
        pipeline.finetune(run, onnx.stem)
    assert copied(out, tmp_path).archive.fingerprint == before and len(run.hybrids.list_tuned()) == 1


def test_a_search_of_nothing_but_invalid_genotypes_is_an_error(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, _ = finished
    run = copied(out, tmp_path)
    for genotype in run.space.enumerate():
        run.mark_invalid(genotype, "it is green")
    with pytest.raises(ValueError, match=r"none of the 9 measurements is valid.*0-0 has “it is green”"):
        pipeline.search(run)


def test_a_space_that_ends_before_the_budget_says_so_and_ends_the_bar(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, _ = finished
    run = copied(out, tmp_path, {"search": {"budget": 500}})
    (run.path / "archive.db").unlink()
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    control = Control(progress=lambda verb, done, total, note: seen.append((done, total)), say=said.append)
    pipeline.search(run, control)
    assert seen[-1] == (9, 9) and "search: the space ends at 9 genotypes, before the budget of 500" in said
    pipeline.search(copied(out, tmp_path, {"search": {"budget": 500}}), control)
    assert said[-1] == "search: skipped, 9 genotypes are measured"


def test_a_pair_that_is_restored_perfectly_is_left_out_of_a_search_and_counted(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    """Black pairs: no network here has a bias, so every genotype restores them to the bit."""
    _, out, _ = finished
    folder = tmp_path / "pairs"
    for name, pixels in (("black", np.zeros((2, 32, 32, 3), np.uint8)),
                         ("photo", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))):
        for part, image in zip(("input", "target"), pixels, strict=True):
            write_photo(folder / part / f"{name}.png", Photo(image))
    write_study(tmp_path)
    study = load_study(tmp_path / "tiny.yaml", {
        "library": str(out / "library"), "data": {"validation": str(folder)}})
    run = RunFolder.start(study, tmp_path / "perfect")
    said: list[str] = []
    assert all(one.valid for one in pipeline.search(run, Control(say=said.append)))
    assert any("1 of 2 validation images are left out of means" in line for line in said)
    assert f"search: {run.validation.origin}" in said and run.validation.origin  # which images chose, and how made
    assert math.isfinite(run.baseline.teacher_mean_db) and math.inf in run.baseline.teacher_psnr_db
    assert any("left out of means" in note for note in front_notes(run.front()))
    (folder / "input" / "photo.png").unlink()
    (folder / "target" / "photo.png").unlink()
    with pytest.raises(ValueError, match="restores all 1 validation images perfectly"):
        pipeline.search(RunFolder.start(study, tmp_path / "hopeless"))


def test_a_teacher_of_nan_is_refused_after_its_first_measurement(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = finished
    run = copied(out, tmp_path)
    (run.path / "archive.db").unlink()
    with torch.no_grad():
        next(run.teacher.parameters()).fill_(math.nan)
    evaluated: list[object] = []
    monkeypatch.setattr("ens.evaluate.evaluator.Evaluator.evaluate", lambda *arguments: evaluated.append(arguments))
    with pytest.raises(ValueError, match="teacher's PSNR is no number on 2 of 2 validation images"):
        pipeline.search(run)
    assert not evaluated and not (run.path / "archive.db").exists()


@pytest.mark.parametrize("state", ["teacher/train.pt", "library/training.pt", "finetune/{genotype}.pt"])
def test_a_state_whose_training_is_done_goes_with_the_next_run(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path], state: str) -> None:
    """A process may be killed between the result and the removal of its state."""
    _, out, _ = finished
    run = copied(out, tmp_path)
    tuned = run.hybrids.list_tuned()[0]
    path = run.path / state.format(genotype=tuned.stem)
    for stray in (path, run.path / "export" / ".a.onnx.0123abcd.tmp"):
        stray.write_bytes(b"")
    if "training" in state:
        path.write_bytes(b"")
    pipeline.run_all(run)
    assert not path.exists() and not list(run.path.rglob("*.tmp"))


def test_a_bad_pick_changes_nothing(tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    study, out, _ = finished
    run = copied(out, tmp_path)
    (run.path / ".x.db.0123abcd.tmp").touch()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for pick in ("best", "near 9", "0-7", "within x"):
        for verb in (pipeline.finetune, pipeline.export):
            with pytest.raises(ValueError, match=r"understood|allows 0 to 2"):
                verb(run, pick)
        with pytest.raises(ValueError, match=r"understood|allows 0 to 2"):
            RunFolder.start(study.model_copy(update={"threads": 1}), run.path, pick=pick)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def copied(out: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> RunFolder:
    if not (folder / "run").exists():
        shutil.copytree(out, folder / "run", ignore=shutil.ignore_patterns("*.lock"))
    return RunFolder.reopen(folder / "run", changes)


def test_a_second_teacher_and_its_weight_replace_those_of_the_study(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, _ = finished
    said: list[str] = []
    other = {"finetune": {"taught_weight": 0.25, "taught_by": str(out / "teacher" / "teacher.safetensors")}}
    run = copied(out, tmp_path, other)
    pipeline.finetune(run, "0-1", Control(say=said.append))
    assert "finetune: the loss is 0.75·L1 to the target + 0.25·L1 to the teacher's output" in said
    larger = create_network("plksr", dim=8, n_blocks=1, kernel_size=3, upscaling_factor=2)
    save_checkpoint(tmp_path / "x2.safetensors", larger)
    with pytest.raises(ValueError, match="both must restore at the same scale"):
        pipeline.finetune(copied(out, tmp_path, {"finetune": {"taught_by": str(tmp_path / "x2.safetensors")}}), "0-1")
    with pytest.raises(ConfigError, match="taught_weight is at most 1"):
        copied(out, tmp_path, {"finetune": {"taught_weight": 2}})


@pytest.mark.slow
def test_another_recipe_is_tuned_beside_the_first_and_the_better_one_is_exported(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    genotype = onnx.stem
    first = copied(out, tmp_path)
    longer = copied(out, tmp_path, {"finetune": {"steps": 12, "lr": 2e-3, "phases": [[0, 24, 4]]}})
    assert pipeline.finetune(longer, genotype) == pipeline.finetune(first, genotype)
    assert len(longer.hybrids.list_tuned()) == 2
    after = [float(read_facts(path)["psnr_db_after"]) for path in longer.hybrids.list_tuned()]
    pipeline.export(longer, genotype)
    exported = read_facts(longer.hybrids.exported(longer.pick(genotype)).with_suffix(".safetensors"))
    assert float(exported["psnr_db_after"]) == max(after)


def test_candidates_near_the_pick_are_tuned_and_validation_chooses(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, _ = finished
    run = copied(out, tmp_path, {"finetune": {"candidates": 2, "steps": 3}})
    best = pipeline.finetune(run, "knee")
    tuned = run.archive.tuned
    assert set(run.candidates("knee")) <= set(tuned) and len(run.candidates("knee")) == 2
    means = {genotype: tuned[genotype].mean_db for genotype in run.candidates("knee")}
    assert means[best] == max(means.values())
    measured = {one.genotype: one for one in run.archive.measurements()}
    assert all(measured[genotype].psnr_db_tuned == tuned[genotype].psnr_db for genotype in means)
    untuned = run.baseline.teacher_mean_db - float(np.mean(measured[best].psnr_db))
    assert measured[best].values["psnr_drop_db"] == pytest.approx(untuned, abs=1e-9)  # training-free


def test_a_kill_before_a_tuned_file_is_written_leaves_nothing_that_passes_for_done(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is what later runs skip by: it comes last, so an export never overlooks weights that are there."""
    _, out, onnx = finished
    run = copied(out, tmp_path, {"finetune": {"steps": 4}})
    genotype = run.pick(onnx.stem)
    path = run.hybrids.tuned(genotype, run.recipe(run.study.finetune).key)

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt
    for place in ("ens.pipeline.save_hybrid", "ens.run_folder.record_tuned"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, killed)
            pipeline.finetune(run, onnx.stem)
        assert not path.exists(), place
    again = copied(out, tmp_path, {"finetune": {"steps": 4}})
    pipeline.finetune(again, onnx.stem)
    assert path.exists() and again.recipe(again.study.finetune).key in {
        result.recipe for result in again.archive.tuned_by_recipe[genotype]}


def test_figures_name_the_report_images_they_are_of(finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    report = RunFolder.reopen(out).report_set
    assert report is not None
    assert read_facts(onnx.with_suffix(".safetensors"))["report"] == str(report.fingerprint)


def test_fine_tuning_that_hurts_keeps_the_weights_it_started_with(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    run = copied(out, tmp_path, {"finetune": {"steps": 3, "lr": 1.0, "clip_norm": 1e6}})
    pipeline.finetune(run, onnx.stem)
    facts = read_facts(run.hybrids.tuned(run.pick(onnx.stem), run.recipe(run.study.finetune).key))
    assert float(facts["psnr_db_after"]) >= float(facts["psnr_db_before"])


def test_a_teacher_that_is_worse_than_its_input_ends_a_run_before_anything_imitates_it(tmp_path: Path) -> None:
    write_study(tmp_path)
    study = load_study(tmp_path / "tiny.yaml", {"train": {"steps": 1, "lr": 1e-6, "phases": [[0, 16, 2]]}})
    with pytest.raises(ValueError, match=r"the degraded input has .* there is nothing to imitate"):
        pipeline.distill(run := RunFolder.start(study, tmp_path / "run"))
    assert not run.library.surrogates
    assert not (tmp_path / "run" / "archive.db").exists()


def test_figures_of_report_images_stand_beside_those_of_the_images_that_chose(
        finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    run = RunFolder.reopen(out)
    facts = read_facts(onnx.with_suffix(".safetensors"))
    assert run.report_set is not None
    assert not {image.name for image in run.report_set.images} & {image.name for image in run.validation.images}
    for prefix, images in (("", run.validation), ("report_", run.report_set)):
        after = float(np.mean(list_psnr_db(load_hybrid(onnx.with_suffix(".safetensors")), images, run.protocol)))
        assert float(facts[f"{prefix}psnr_db_after"]) == pytest.approx(after, abs=1e-3)
        assert {f"{prefix}psnr_db_{state}" for state in ("input", "before", "after", "teacher")} <= set(facts)
    tuned = run.archive.tuned[run.pick(onnx.stem)]
    assert tuned.report["after"] == pytest.approx(float(facts["report_psnr_db_after"]), abs=1e-3)


def test_any_two_measured_objectives_have_a_front(finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, _ = finished
    run = RunFolder.reopen(out)
    assert run.front(("psnr_drop_db", "penalty")).objectives == ("psnr_drop_db", "penalty")
    assert run.front(("psnr_drop_db", "params", "penalty")).members


def test_a_second_run_repeats_nothing_and_says_so(finished: tuple[StudyConfig, Path, Path]) -> None:
    study, out, onnx = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} | {onnx: onnx.stat().st_mtime_ns}
    said: list[str] = []
    assert pipeline.run_all(RunFolder.start(study, out), Control(say=said.append)) == onnx
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for verb in ("train", "distill", "search", "finetune", "pareto", "export"):
        assert any(line.startswith(verb) and "skipped" in line for line in said), (verb, said)


def test_the_exported_file_is_the_fine_tuned_hybrid_and_says_what_it_is(
        finished: tuple[StudyConfig, Path, Path]) -> None:
    _, _, onnx = finished
    hybrid = load_hybrid(onnx.with_suffix(".safetensors"))
    facts = read_facts(onnx.with_suffix(".safetensors"))
    assert facts["genotype"] == onnx.stem and facts["protocol"] == "denoise-color-awgn"
    assert {"psnr_db_before", "psnr_db_after", "psnr_db_teacher", "library_sha256"} <= set(facts)
    image = torch.rand(1, 3, 40, 24)
    expected = hybrid(image).detach().numpy()
    got = onnxruntime.InferenceSession(str(onnx)).run(None, {"image": image.numpy()})[0]
    assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_restore_and_evaluate_take_what_export_wrote(finished: tuple[StudyConfig, Path, Path], tmp_path: Path,
                                                     suffix: str) -> None:
    _, _, onnx = finished
    model = onnx.with_suffix(suffix)
    noisy, restored = tmp_path / "noisy.png", tmp_path / "restored.png"
    photo = degrade_photo(_builtin_photo(), noisy, create_task("denoise", {"sigma_255": 25}))
    failures = restore_files(open_session(model), noisy, restored)
    assert not failures
    assert read_photo(restored).pixels.shape == photo.pixels.shape
    (result,) = pipeline.evaluate(model, "builtin:photos", create_task("denoise_s25"), crop_px=32, limit=2)
    assert result.protocol == "denoise-color-awgn" and len(result.outputs) == 2
    assert result.means()[2] == pytest.approx(20.2, abs=0.3)
    with pytest.raises(ValueError, match="enlarges 1 times, the task 4 times"):
        pipeline.evaluate(model, "builtin:photos", create_task("sr_x4"))


def _builtin_photo() -> Path:
    return find_pairs("builtin:photos")[0].clean


def test_an_interrupted_search_goes_on_to_the_same_archive(tmp_path: Path,
                                                           finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, _ = finished
    study = write_study(tmp_path)
    for name in ("teacher", "library"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(out / name)
    calls: list[int] = []
    stop = Control(progress=lambda verb, done, total, note: calls.append(done), should_stop=lambda: len(calls) >= 3)
    with pytest.raises(Interrupted):
        pipeline.search(RunFolder.start(study, tmp_path / "run"), stop)
    assert 0 < len(read_archive(tmp_path / "run" / "archive.db").measurements()) < 9
    resumed = pipeline.search(RunFolder.start(study, tmp_path / "run"))
    expected = read_archive(out / "archive.db").measurements()
    assert [(one.genotype, one.values, one.psnr_db) for one in resumed] == [
        (one.genotype, one.values, one.psnr_db) for one in expected]


def test_a_run_folder_of_another_study_is_refused(finished: tuple[StudyConfig, Path, Path], tmp_path: Path) -> None:
    _, out, _ = finished
    other = load_study(tmp_path.parent / _copy(tmp_path), {"search": {"engine": "random"}})
    with pytest.raises(ConfigError, match=r"search\.engine: exhaustive there, random now"):
        RunFolder.start(other, out)


def _copy(folder: Path) -> str:
    write_study(folder)
    return f"{folder.name}/tiny.yaml"


def test_a_given_library_must_hold_every_surrogate_and_the_same_teacher(finished: tuple[StudyConfig, Path, Path],
                                                                        tmp_path: Path) -> None:
    _, out, _ = finished
    write_study(tmp_path)
    overrides = {"library": str(out / "library"), "teacher": str(out / "teacher" / "teacher.safetensors")}
    with pytest.raises(LibraryError, match="lacks 1 of the"):
        pipeline.distill(RunFolder.start(load_study(tmp_path / "tiny.yaml", {
            **overrides, "slots": {"latent": ["vssd×1", "conv×1"]}}), tmp_path / "run"))
    torch.manual_seed(5)
    stranger = load_checkpoint(out / "teacher" / "teacher.safetensors")
    with torch.no_grad():
        stranger.get_parameter("output.weight").add_(1)
    save_checkpoint(tmp_path / "other.safetensors", stranger)
    with pytest.raises(LibraryError, match="another teacher"):
        overrides["teacher"] = str(tmp_path / "other.safetensors")
        RunFolder.start(load_study(tmp_path / "tiny.yaml", overrides), tmp_path / "run2")


def test_spaces_of_the_paper_have_its_numbers() -> None:
    """ENS, section 6.1: 34,560 configurations, 22 surrogates."""
    run = RunFolder(Path(), load_study("search_spaces/restormer_denoise.yaml"))
    assert run.space.num_genotypes == 34_560
    assert run.space.num_surrogates == 22
    assert run.space.penalty(run.space.teacher) == 16.0
    low, high = run.count_costs().range("params")
    assert low < 26_111_668 < high


def test_pick_takes_roles_and_genotypes(finished: tuple[StudyConfig, Path, Path]) -> None:
    _, out, onnx = finished
    run = RunFolder.reopen(out)
    front = run.front()
    assert run.pick("knee") == front.members[front.knee].genotype == run.pick(onnx.stem)
    with pytest.raises(ValueError, match="knee"):
        pipeline.export(run, "best")


def test_asking_for_a_gpu_where_there_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_study(tmp_path)
    with pytest.raises(ConfigError, match="no GPU; use auto or cpu"):
        RunFolder.start(load_study(tmp_path / "tiny.yaml", {"device": "cuda"}), tmp_path / "run")


def test_a_finished_run_opens_next_to_nothing_when_it_is_run_again(
        finished: tuple[StudyConfig, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Openings are counted where they happen: weights hashed or loaded, images decoded, networks filled."""
    study, out, onnx = finished
    opened: list[str] = []

    def count(place: str) -> None:
        module, _, name = place.rpartition(".")
        original = pkgutil.resolve_name(f"{module}:{name}") if "Library" not in module else getattr(Library, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            opened.append(name)
            return original(*arguments, **options)
        monkeypatch.setattr(place, counted)

    for place in ("ens.distill.library.hash_weights", "ens.distill.library.load_weights",
                  "ens.distill.library.Library.load_teacher", "ens.distill.library.Library.load_surrogate",
                  "ens.networks.checkpoints.hash_weights", "ens.networks.checkpoints.read_weight_file",
                  "ens.data.folders.read_photo", "ens.export.hybrid.load_hybrid"):
        count(place)
    assert pipeline.run_all(RunFolder.start(study, out)) == onnx
    assert opened.count("load_teacher") <= 1 and not set(opened) - {"load_teacher", "load_weights"}
    assert opened == [], "today nothing at all is opened"


@pytest.mark.slow
def test_a_finished_run_brings_no_package_it_has_no_use_for(
        tmp_path: Path, finished: tuple[StudyConfig, Path, Path]) -> None:
    """What a second run costs is what it imports: nothing that draws, exports, searches or differentiates symbols."""
    _, given, _ = finished
    shutil.copy(given.parent / "tiny.yaml", tmp_path / "tiny.yaml")
    out = copied(given, tmp_path).path  # this process holds the other one
    heavy = ("matplotlib", "pandas", "plotly", "pymoo", "onnx", "onnxruntime", "skimage", "sympy")
    code = ("import sys; from ens.cli import app; app(standalone_mode=False); "
            f"print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, "run", str(tmp_path / "tiny.yaml"), "--out", str(out)],
                          capture_output=True, encoding="utf-8", errors="replace", check=False)
    assert done.returncode == 0, done.stderr
    assert "export: skipped" in done.stderr and done.stdout.splitlines()[-1] == "[]"
