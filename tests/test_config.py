"""Study files: what is allowed, and the sentence that says what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ens.config import ConfigError, StudyConfig, load_study, open_run, parse_choices, save_run
from ens.space import Choice

STUDY = "task: {name: denoise}\nchoices: [vssd×1]\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_folders_are_relative_to_the_study_and_the_name_is_the_files(tmp_path: Path) -> None:
    text = STUDY + "teacher: t.pth\ndata: {train: ../photos, validation: 'builtin:photos'}\n"
    study = load_study(write(tmp_path, text))
    assert study.name == "s"
    assert study.teacher == str(tmp_path / "t.pth")
    assert study.data.train == str(tmp_path.parent / "photos")
    assert study.data.validation == "builtin:photos"


@pytest.mark.parametrize(("text", "message"), [
    ("serach: {budget: 3}", "unknown key serach; the nearest is search"),
    ("search: {budgt: 3}", r"unknown key search.budgt; the nearest is search.budget"),
    ("search: {budget: many}", "search.budget is a whole number, got 'many'"),
    ("search: 3", "search holds keys and values"),
    ("train: {lr: fast}", "train.lr is a number, got 'fast'"),
    ("train: {phases: [[0, 64]]}", r"has 3 entries"),
    ("train: {taught_weight: 0.5}", "go together"),
    ("search: {budget: 0}", "at least 1"),
    ("teacher: a.pth\ntrain: {taught_by: b.pth, taught_weight: 0.5}", "so none is trained"),
    ("granularity: layer", "'stage' or 'block'"),
    ("slots: {latent: [vssd×1]}", "either `choices`"),
    ("a: [", "not valid YAML"),
])
def test_a_mistake_is_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(write(tmp_path, STUDY + text))
    assert "\n" not in str(caught.value) and str(tmp_path / "s.yaml") in str(caught.value)


def test_numbers_such_as_1e_3_are_numbers(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, STUDY + "train: {lr: 1e-3, warmup_steps: 5}")).train.lr == 1e-3


def test_missing_files_keys_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no study file"):
        load_study(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="key task is missing"):
        load_study(write(tmp_path, "choices: [vssd×1]"))
    with pytest.raises(ConfigError, match="not a run folder"):
        open_run(tmp_path)


def test_overrides_replace_single_keys_of_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY + "search: {budget: 3, engine: random}")
    study = load_study(path, {"search": {"budget": 9}, "seed": 4})
    assert (study.search.budget, study.search.engine, study.seed) == (9, "random", 4)


def test_choices_are_labels_or_mappings() -> None:
    assert parse_choices(["mambair×2", {"family": "vssd", "depth": 1, "state": 16}]) == (
        Choice("mambair", 2), Choice("vssd", 1, (("state", 16),)))
    with pytest.raises(ConfigError, match="family×depth"):
        parse_choices(["mambair"])
    with pytest.raises(ConfigError, match="lacks `family`"):
        parse_choices([{"depth": 1}])


def test_a_run_folder_keeps_its_study_and_refuses_another(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, STUDY))
    save_run(tmp_path / "run", study)
    assert open_run(tmp_path / "run") == study
    save_run(tmp_path / "run", load_study(write(tmp_path, STUDY + "search: {budget: 7}")))
    assert open_run(tmp_path / "run").search.budget == 7
    (tmp_path / "run" / "archive.db").touch()
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        save_run(tmp_path / "run", load_study(write(tmp_path, STUDY + "seed: 1\nsearch: {budget: 7}")))


def test_the_paper_is_the_default() -> None:
    study = StudyConfig(name="s", task={"name": "denoise"}, choices=("mambair×2",))
    assert (study.search.engine, study.search.budget, study.search.objectives) == (
        "ehvi", 500, ("psnr_drop_db", "penalty"))
    assert (study.penalty.teacher, study.penalty.per_block) == (2.0, 0.1)


def test_a_section_keeps_its_own_defaults_for_keys_that_are_not_given(tmp_path: Path) -> None:
    finetune = load_study(write(tmp_path, STUDY + "finetune: {steps: 3}")).finetune
    assert (finetune.steps, finetune.taught_weight, finetune.phases) == (3, 0.5, ((0, 64, 8),))


def test_a_mistake_that_made_nothing_yet_can_be_corrected_in_the_same_run_folder(tmp_path: Path) -> None:
    path, out = write(tmp_path, STUDY), tmp_path / "run"
    save_run(out, load_study(path, {"seed": 1}))
    save_run(out, load_study(path, {"seed": 2}))
    (out / "teacher").mkdir()
    with pytest.raises(ConfigError, match=r"seed: 2 there, 3 now"):
        save_run(out, load_study(path, {"seed": 3}))
    assert open_run(out).seed == 2
