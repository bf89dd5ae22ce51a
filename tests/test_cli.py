"""The command line: one sentence and the right exit code for whatever goes wrong, and how to go on."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.core import TyperCommand as Command
from typer.main import get_command

from ens import cli, pipeline
from ens.config import StudyConfig, TrainConfig, load_study
from ens.data.folders import find_pairs
from ens.networks import create_network
from ens.networks.checkpoints import save_checkpoint
from ens.pareto.archive import mark_invalid, open_archive
from ens.run_folder import RunFolder
from ens.runtime.process import Control, Interrupted, Stop
from ens.shortage import is_disk_error
from ens.space import Measurement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Runs `ens ARGUMENTS` in this process, in a folder of its own, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: str) -> int:
        for key, value in vars(Stop()).items():
            monkeypatch.setattr(cli.stop, key, value)
        monkeypatch.setattr(sys, "argv", ["ens", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def failing_search(error: Exception) -> Callable[..., None]:
    def search(run: RunFolder, control: Control, **options: object) -> None:
        raise error
    return search


@pytest.mark.parametrize(("error", "code", "words"), [
    (ValueError("slot latent allows 0 to 3, got 9"), 1, "error: slot latent allows 0 to 3, got 9\n"),
    (KeyError("no slot 'x'; stages: latent"), 1, "error: no slot 'x'; stages: latent\n"),
    (ValueError("two\n  lines"), 1, "error: two lines\n"),
    (AssertionError("never"), 1, "error: unexpected AssertionError: never; ENS_TRACEBACK=1 shows where"),
    (OSError(errno.ENOSPC, "No space left on device"), 74, "ens search demo --out x"),
    (PermissionError(errno.EACCES, "Permission denied"), 74, "read-only or closed to you"),
    (OSError(errno.EFBIG, "File too large"), 74, "then: ens search demo --out x"),
    (MemoryError(), 1, "error: memory ran out (MemoryError); what is done is kept. To continue: ens search demo"),
    (OSError("genotype 0-1 could not be stored: (sqlite3.OperationalError) database or disk is full"), 74, "disk"),
])
def test_an_error_is_one_sentence_and_an_exit_code(
        run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        error: Exception, code: int, words: str) -> None:
    monkeypatch.setattr(pipeline, "search", failing_search(error))
    assert run_cli("search", "demo", "--out", "x") == code
    output = capsys.readouterr()
    assert words in output.err and output.err.count("\n") == 1 and not output.out


def test_a_wrapped_disk_error_is_still_one() -> None:
    try:
        try:
            raise OSError(errno.EROFS, "Read-only file system")
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as wrapped:
        assert is_disk_error(wrapped)
    assert not is_disk_error(FileNotFoundError(errno.ENOENT, "No such file"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_prints_how_to_go_on(
        run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        number: signal.Signals, code: int) -> None:
    finished = []

    def search(run: RunFolder, control: Control, **options: object) -> None:
        assert not control.should_stop()
        os.kill(os.getpid(), number)
        finished.append("step")
        if control.should_stop():
            raise Interrupted("search")

    monkeypatch.setattr(pipeline, "search", search)
    assert run_cli("search", "demo", "--out", "a b") == code
    assert finished == ["step"]
    assert "ens search demo --out 'a b'" in capsys.readouterr().err


def test_a_second_signal_and_one_nobody_waits_for_stop_at_once(
        run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn(run: RunFolder, control: Control, **options: object) -> None:
        control.should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    def deaf(run: RunFolder, control: Control, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still running")

    for search, code in ((stubborn, 130), (deaf, 143)):
        monkeypatch.setattr(pipeline, "search", search)
        assert run_cli("search", "demo", "--out", "x") == code


def test_changes_reach_the_study(run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StudyConfig] = []

    def search(run: RunFolder, control: Control, **options: object) -> list[object]:
        seen.append(run.study)
        return []

    monkeypatch.setattr(pipeline, "search", search)
    assert run_cli("search", "search_spaces/demo.yaml", "--out", "x", "--set", "search.budget=7", "--set",
                   "task.sigma_255=[0, 50]", "--require", "edge") == 0
    assert seen[0].search.budget == 7 and seen[0].task["sigma_255"] == (0, 50) and seen[0].search.engine == "exact"
    assert seen[0].search.require == "edge"


@pytest.mark.parametrize(("arguments", "words"), [
    (("search", "nowhere.yaml", "--out", "x"), "one of dat_sr_x4, demo, "),
    (("search", "other/demo.yaml", "--out", "x"), "there is no study other/demo.yaml"),
    (("search", "demo", "--out", "x", "--set", "search.budgt=7"), "the nearest is search.budget"),
    (("search", "demo", "--out", "x", "--set", "budget"), "KEY=VALUE"),
    (("search", "demo", "--out", "x", "--set", "seed=1", "--set", "seed.x=1"), "seed was set to 1"),
    (("pareto", "no/run"), "not a run folder"),
    (("inspect", "erf", "no/run", "--slot", "latent", "--out", "x.jpg"), "is a PNG; x.jpg has another"),
    (("evaluate", "--checkpoint", "x.onnx", "--data", "d", "--task", "dehaze"), "no task 'dehaze'"),
])
def test_wrong_input_names_what_is_allowed(run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str],
                                           arguments: tuple[str, ...], words: str) -> None:
    assert run_cli(*arguments) == 1
    assert words in capsys.readouterr().err


def test_a_missing_option_is_a_usage_error(run_cli: Callable[..., int]) -> None:
    assert run_cli("search", "demo") == 2


def test_a_teacher_of_ens_train_is_half_of_the_loss_unless_a_weight_says_more(
        run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(pipeline, "train", lambda run, control: seen.append(run.study.train))
    teacher = str(tmp_path / "big: one.pth")
    save_checkpoint(teacher, create_network("restormer", dim=8, num_blocks=[1] * 4, num_refinement_blocks=1,
                                            heads=[1] * 4))
    for weight in ((), ("--teacher-weight", "0.9")):
        assert run_cli("train", "restormer_denoise", "--out", "x", "--teacher", teacher, *weight, "--set",
                       "data.validation=builtin:photos", "--set", "data.train=builtin:train-photos") == 0
    assert [(train.taught_by, train.taught_weight) for train in seen] == [(teacher, 0.5), (teacher, 0.9)]


def test_folders_typed_are_relative_to_where_they_are_typed(
        run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The study lies elsewhere; `--teacher` is read the same way."""
    seen: list[StudyConfig] = []
    monkeypatch.setattr(pipeline, "search", lambda run, control, **_: seen.append(run.study) or [])
    (tmp_path / "mine").mkdir()
    shutil.copy(find_pairs("builtin:photos")[0].clean, tmp_path / "mine")
    (tmp_path / "other").mkdir()
    shutil.copy(ROOT / "search_spaces" / "demo.yaml", tmp_path / "other" / "study.yaml")
    run_cli("search", "other/study.yaml", "--out", "x", "--set", "data.report=builtin:photos", "--set",
            "data.validation=other", "--set", "data.train=mine")
    assert not seen, "other holds no images"
    assert run_cli("search", "other/study.yaml", "--out", "x", "--set", "data.train=mine", "--set",
                   "finetune.phases=[[0,16,1]]") == 0
    assert seen[0].data.train == str((tmp_path / "mine").resolve())


def test_a_checkpoint_of_nan_scores_nothing_and_says_so(
        run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    network = create_network("restormer", dim=8, num_blocks=[1] * 4, num_refinement_blocks=1, heads=[1] * 4)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    torch.save({"params": network.state_dict()}, tmp_path / "nan.pth")
    assert run_cli("evaluate", "--checkpoint", "nan.pth", "--data", "builtin:report-photos", "--task", "denoise_s25",
                   "--crop", "64") == 1
    assert "not finite on 1 of 1 images" in capsys.readouterr().err


def test_a_read_only_run_still_prints_its_front(
        run_cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        tmp_path: Path) -> None:
    """As on a read-only file system, where a database can be read and nothing be written."""
    study = load_study(ROOT / "search_spaces" / "demo.yaml", {"search": {"objectives": ["psnr_drop_db", "penalty"]}})
    run = RunFolder.start(study, tmp_path / "a b")
    with open_archive(run.storage, space=run.space, objectives=study.search.objectives, manifest={}) as archive:
        archive.record(Measurement(run.space.teacher, {"psnr_drop_db": 0.0, "penalty": 16.0}, (30.0,)))
    monkeypatch.setattr("ens.evaluate.crops.draw_crops", lambda *arguments: {})
    before = run.path / "front.csv"

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    monkeypatch.setattr("ens.pareto.report.write_atomic", refuse)
    assert run_cli("pareto", str(run.path)) == 74
    output = capsys.readouterr()
    assert "1 genotypes measured" in output.out and "0-0-0-0-0-0-0-0" in output.out and not before.exists()
    assert f"ens pareto '{run.path}'" in output.err
    assert run_cli("pareto", str(run.path), "--json") == 74
    found = json.loads(capsys.readouterr().out)
    assert found["knee"] == found["members"][0]["genotype"] == "0-0-0-0-0-0-0-0" and found["measured"] == 1
    assert found["members"][0]["values"] == {"psnr_drop_db": 0.0, "penalty": 16.0}
    assert found["members"][0]["choices"]["latent"] == "restormer×2"
    mark_invalid(run.storage, run.space.teacher, "it is green")
    assert run_cli("pareto", str(run.path)) == 1 and "has “it is green”" in capsys.readouterr().err
    assert run_cli("pareto", str(run.path), "--unmark", "0-0-0-0-0-0-0-0") == 74
    assert "1 genotypes measured, 1 on the front, 0 invalid" in capsys.readouterr().out
    assert run_cli("pareto", str(run.path), "--unmark", "0-0-0-0-0-0-0-0") == 1
    assert "is not marked" in capsys.readouterr().err


VERBS = [(verb, name) for name, verb in get_command(cli.app).commands.items() if name != "inspect"]  # type: ignore
VERBS.append((get_command(cli.inspect), "inspect erf"))


@pytest.mark.parametrize(("verb", "name"), VERBS, ids=[name for _, name in VERBS])
def test_every_help_fits_a_terminal_and_ends_with_examples_that_are_understood(
        run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        verb: Command, name: str) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", False)
    monkeypatch.setattr("ens.own_code.import_code", lambda given: None)
    assert run_cli(*name.split(), "-h") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    examples = [line.strip() for line in text.partition("Example")[2].splitlines() if line.startswith(" ens ")]
    assert examples and all(example.startswith(f"ens {name}") for example in examples)
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])[1:]
        with verb.make_context(words[0], words[1:] if verb.name == words[0] else words[len(name.split()):]):
            pass  # raises where an option or argument is not one of the verb's


def test_the_shell_completes_verbs_and_options(capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_ENS_COMPLETE", "complete_bash")
    for words, index, wanted in (("ens pa", "1", "pareto"), ("ens pareto --js", "2", "--json")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", index)
        with pytest.raises(SystemExit):
            cli.app(prog_name="ens")
        assert capsys.readouterr().out.split() == [wanted]


@pytest.mark.parametrize(("command", "near"), [
    ("run dem --out x", "demo"), ("paretto x", "pareto"),
    ("run demo --out x --set slots.latent=[vsd×1]", "vssd"),
    ("run demo --out x --set slots={latnt:[conv×1]}", "latent"),
    ("run demo --out x --fix latent=vsd×1(state=16)", "vssd×1(state=16)"),
    ("run demo --out x --forbid restorme", "restormer"), ("run demo --out x --set search.engine=exct", "exact"),
    ("run demo --out x --max latncy_ms=3", "latency_ms"),
    ("evaluate --checkpoint builtin:denoise_demo --data builtin:photos --task denois_s25", "denoise"),
    ("evaluate --checkpoint builtin:denoise_demo --data builtin:photos --task sr_x4 --protocol sr-yy", "sr-y"),
])
def test_a_mistyped_name_is_answered_with_the_nearest(run_cli: Callable[..., int], command: str, near: str,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*command.split()) != 0
    assert re.search(f"[Dd]id you mean '?{re.escape(near)}", " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(("command", "message"), [
    ("search demo --out x --storage foo", "takes a URL"), ("pareto x --storage foo.db", "takes a URL"),
    ("search demo --out x --storage sqlite:///no/such/a.db", "there is no folder"),
    ("search demo --out x --fix latent=conv×1 --fix latent=rep×1", "got conv×1 and rep×1 for latent"),
    ("search demo --out file", "is a file"),
])
def test_what_a_search_cannot_mean_is_refused_before_anything_is_made(
        run_cli: Callable[..., int], tmp_path: Path, command: str, message: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run_cli(*command.split()) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_printed_commands_are_quoted_for_the_shell(run_cli: Callable[..., int], tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my run").mkdir()
    assert run_cli("pareto", "my run") == 1
    assert "`ens search SPACE.yaml --out 'my run'` makes one" in capsys.readouterr().err


def test_info_names_everything_a_study_may_use(run_cli: Callable[..., int],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("info") == 0
    output = " ".join(capsys.readouterr().out.split())
    for name in ("restormer", "vssd", "denoise", "nsga2", "psnr_drop_db", "denoise-color-awgn"):
        assert name in output


def test_help_answers_without_loading_pytorch() -> None:
    code = "import sys\nfrom ens.cli import app\ntry: app(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace",
                          cwd=Path(__file__).resolve().parents[1])
    assert done.stdout.rstrip().endswith("False")


def test_files_are_timed_in_turn_and_printed_as_json(run_cli: Callable[..., int],
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    files = ("builtin:denoise_demo", "builtin:denoise_demo")
    assert run_cli("bench", *files, "--size", "16,8x24", "--repeats", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["sizes"]) == ["16x16", "8x24"] and found["device"]
    assert [row["file"] for row in found["sizes"]["8x24"]] == list(files)
    for size in ("12x", "0", "a", "-8", "8x8x8", ""):
        assert run_cli("bench", *files, "--size", size) == 1 and "--size takes sides in px" in capsys.readouterr().err


def test_what_is_printed_as_json_is_what_the_table_says(run_cli: Callable[..., int],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    images = ("evaluate", "--checkpoint", "builtin:denoise_demo", "--data", "builtin:photos", "--task", "denoise_s25",
              "--crop", "64")
    assert run_cli(*images) == 0
    table = capsys.readouterr().out
    assert run_cli(*images, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == {"name": "denoise", "sigma_255": 25.0, "validation_sigma_255": None}
    for result in found["protocols"]:
        psnrs = [image["psnr_db"] for image in result["images"]]
        assert len(psnrs) > 2 and result["psnr_db"] == pytest.approx(sum(psnrs) / len(psnrs))
        assert all(f"{psnr:.2f}" in table for psnr in psnrs)
        assert f"{result['psnr_db']:.2f} dB (input {result['input_psnr_db']:.2f} dB" in table
    assert run_cli("info", "--json") == 0
    assert {"restormer", "dat"} <= set(json.loads(capsys.readouterr().out)["networks"])
    assert run_cli("spaces", "demo", "--json") == 0
    (space,) = json.loads(capsys.readouterr().out)
    assert space["slots"] == 8 and space["genotypes"] > 1
