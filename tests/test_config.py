"""Study files: what is allowed, and the sentence that says what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ens.config import (
    ConfigError,
    StudyConfig,
    check_same_run,
    dump_study,
    find_study,
    load_study,
    parse_choices,
    study_schema,
)
from ens.space import Choice

STUDY = "task: {name: denoise}\nnetwork: {name: restormer}\nchoices: [vssd×1]\n"


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
    ("search: 3", "search is a section: it holds keys and values, got 3"),
    ("train: {lr: fast}", "train.lr is a number, got 'fast'"),
    ("train: {phases: [[0, 64]]}", r"train.phases.0 has more entries than \(0, 64\)"),
    ("train: {taught_weight: 0.5}", "go together"),
    ("search: {budget: 0}", "search.budget is at least 1, got 0"),
    ("search: {budget: true}", "search.budget is a whole number, got True"),
    ("train: {lr: 5}", "train.lr is at most 1.0, got 5"),
    ("distill: {dtype: int8}", "distill.dtype is 'float32', 'float16' or 'bfloat16', got 'int8'"),
    ("distill: {steps: -3}", "distill.steps is at least 1, got -3"),
    ("finetune: {phases: [[3, 64, 8]]}", r"phases start at step 0 and rise, all before step 2000; got \[3\]"),
    ("finetune: {candidates: 0}", "finetune.candidates is at least 1, got 0"),
    ("data: {report: 3}", "data.report is text, got 3"),
    ("teacher: a.pth\ntrain: {taught_by: b.pth, taught_weight: 0.5}", "so none is trained"),
    ("granularity: layer", "'stage', 'pair' or 'block'"),
    ("slots: {latent: [vssd×1]}", "either `choices`"),
    ("network:", "give `teacher`, or `network` with a name"),
    ("a: [", "not valid YAML"),
    ("a: " + "[" * 50_000, "not valid YAML"),
    ("a: 2024-99-99", "not valid YAML"),
    ("seed: " + "9" * 5000, "not valid YAML"),
    ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
     "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]", "more than 20,000 values"),
    ("a: &a [*a]", "more than 20,000 values"),
    ("train: {clip_norm: .inf}", "train.clip_norm is a finite number, got inf"),
    ("finetune: {lr: .nan}", "finetune.lr is a finite number, got nan"),
    ("seed: 4294967296", "seed is less than 4294967296"), ("seed: -1", "seed is at least 0"),
    ("distill: {batch_size: 65536, patch_px: 4096}", r"distill: a batch of 65536 patches of 4096² px is more than"),
    ("train: {phases: [[0, 4096, 65536]]}", "train: a batch of 65536 patches of 4096² px"),
    ("distill: {group_size: 1000000000}", "distill.group_size is at most 65536"),
    ("search: {budget: 1000000000000}", "search.budget is at most 100000000"),
    ("penalty: {teacher: -1}", "penalty.teacher is at least 0"), ("data: {limit: 0}", "data.limit is at least 1"),
    ("data: {crop_px: 1000000000}", "data.crop_px is at most 65536"),
    ("finetune: {warmup_steps: -5}", "finetune.warmup_steps is at least 0"),
    ("name: " + "n" * 300, "name is text of at most 200 characters, got 'n{79}$"),
    ("slots: {latent: [" + "conv×1," * 65 + "]}", "slots.latent is a list of at most 64"),
])
def test_a_mistake_is_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(write(tmp_path, STUDY + text))
    assert "\n" not in str(caught.value) and str(tmp_path / "s.yaml") in str(caught.value)


def test_a_pipe_a_device_and_a_file_too_large_for_a_study_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    for name, message in (("pipe", "is not a file"), ("zeros", "is not a file"), ("large", "1,000,000 bytes")):
        with pytest.raises(ConfigError, match=message):
            load_study(tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match="is not a file"):
        load_study(tmp_path)


@pytest.mark.parametrize("entry", [{"family": "conv", "depth": True}, {"family": "conv", "depth": 1.0},
                                   "conv×" + "9" * 5000])
def test_a_depth_that_is_no_whole_number_of_sense_is_refused(entry: object) -> None:
    with pytest.raises(ConfigError, match=r"depth|not understood"):
        parse_choices([entry])


def test_numbers_such_as_1e_3_are_numbers(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, STUDY + "train: {lr: 1e-3, warmup_steps: 5}")).train.lr == 1e-3


def test_missing_files_keys_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no study"):
        load_study(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="key task is missing"):
        load_study(write(tmp_path, "choices: [vssd×1]"))


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


def test_a_dumped_study_is_the_same_study(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, STUDY + "data: {train: photos}\ntrain: {phases: [[0, 64, 2], [3, 96, 1]]}"))
    (tmp_path / "again.yaml").write_text(dump_study(study), encoding="utf-8")
    assert load_study(tmp_path / "again.yaml") == study


def test_budget_device_threads_fine_tuning_and_report_images_may_change_and_nothing_else(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, STUDY))
    changes = "search: {budget: 7}\nfinetune: {steps: 3}\ndata: {report: r}\nthreads: 2"
    same = load_study(write(tmp_path, STUDY + changes))
    assert not check_same_run(study, study, tmp_path) and check_same_run(study, same, tmp_path)
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        check_same_run(study, load_study(write(tmp_path, STUDY + "seed: 1\nsearch: {budget: 7}")), tmp_path)


def test_an_empty_section_leaves_its_defaults(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, STUDY + "search:\ntrain:\nseed:\n"), {"search": {"budget": 3}})
    assert study.search.budget == 3 and study.train.steps == 300_000 and study.seed == 0


def test_the_schema_describes_every_key_with_its_bounds() -> None:
    schema = json.loads(study_schema())
    sections = [schema, *schema["$defs"].values()]
    silent = [key for section in sections for key, field in section["properties"].items()
              if "description" not in field and "$ref" not in field]
    assert not silent and schema["required"] == ["task"]
    assert schema["$defs"]["SearchConfig"]["properties"]["budget"]["minimum"] == 1


def test_the_papers_budget_and_prices_are_the_default() -> None:
    study = StudyConfig(name="s", task={"name": "denoise"}, network={"name": "restormer"}, choices=("mambair×2",))
    assert (study.search.engine, study.search.budget, study.search.objectives) == (
        "exact", 500, ("psnr_drop_db", "penalty"))
    assert (study.penalty.teacher, study.penalty.per_block) == (2.0, 0.1)


def test_a_section_keeps_its_own_defaults_for_keys_that_are_not_given(tmp_path: Path) -> None:
    finetune = load_study(write(tmp_path, STUDY + "finetune: {steps: 3}")).finetune
    assert (finetune.steps, finetune.taught_weight, finetune.phases) == (3, 0.5, ((0, 64, 8),))


def test_a_study_beside_the_one_that_was_meant_is_offered(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"there is no study .*studi.yaml .did you mean .*study.yaml\?."):
        find_study(str(tmp_path / "studi.yaml"))
