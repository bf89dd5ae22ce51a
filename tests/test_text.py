"""Text is UTF-8 whatever the locale, and a terminal that lacks a character gets another one, not an error."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ens.config import find_study, load_study
from ens.distill.library import open_library

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("ens", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))
TERMINALS = {"C": {"LC_ALL": "C", "PYTHONUTF8": "0"}, "ascii": {"PYTHONIOENCODING": "ascii"}}


def lacks_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the locale."""
    given = {word.arg: word.value for word in call.keywords}
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    constants = [argument.value if isinstance(argument, ast.Constant) else None for argument in call.args]
    if "encoding" in given or "fileobj" in given:
        return False
    if name in ("run", "Popen", "check_output", "check_call"):
        return any(getattr(given.get(word), "value", False) is True for word in ("text", "universal_newlines"))
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    place = 1 if name == "fdopen" or (name == "open" and isinstance(call.func, ast.Name)) else 0
    mode = given["mode"].value if isinstance(given.get("mode"), ast.Constant) else None
    if mode is None and len(constants) > place:
        mode = constants[place]
        if name == "open" and not (isinstance(mode, str) and set(mode) <= set("rwaxtb+")):
            return False  # os.open, Image.open, tarfile.open: the first argument is a file
    elif mode is None:
        mode = "r+b" if name.endswith("TemporaryFile") else "r"
    return "b" not in str(mode)


@pytest.mark.parametrize(("code", "lacking"), [
    ("open('a')", True), ("open('a', 'w')", True), ("open('a', 'rb')", False), ("open('a', encoding='utf-8')", False),
    ("p.open()", True), ("p.open('a')", True), ("p.open('wb')", False), ("p.open(mode='w')", True),
    ("Image.open(buffer)", False), ("Image.open('in.png')", False), ("os.open(p, os.O_RDONLY)", False),
    ("p.read_text()", True), ("p.read_text('utf-8')", False), ("p.write_text(s)", True), ("p.read_bytes()", False),
    ("p.write_text(s, encoding='utf-8')", False), ("os.fdopen(f, 'w')", True), ("NamedTemporaryFile('w')", True),
    ("NamedTemporaryFile()", False), ("subprocess.run(c, text=True)", True), ("subprocess.run(c)", False),
    ("subprocess.run(c, text=True, encoding='utf-8')", False)])
def test_the_rule_knows_text_from_bytes(code: str, lacking: bool) -> None:
    call = ast.parse(code).body[0]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert lacks_encoding(call.value) == lacking


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = [f"{path.relative_to(ROOT)}:{node.lineno}" for path in FILES
             for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call) and lacks_encoding(node)]
    assert not found


def run(terminal: str, code: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a program in this terminal."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env={**kept, **TERMINALS[terminal]},
                          capture_output=True, encoding="ascii", timeout=300)
    return done.returncode, done.stdout, done.stderr


ENS = "from ens.cli import main; main()"


def test_a_table_with_characters_that_the_c_locale_lacks_is_shown() -> None:
    """`ens spaces` prints × and –, and an error in the middle of a table was exit code 1."""
    code, output, errors = run("C", ENS, "spaces", "demo")
    assert code == 0 and " 8 ? " in output and not errors


@pytest.mark.parametrize("terminal", TERMINALS)
def test_an_error_message_that_a_terminal_cannot_show_whole_keeps_its_exit_code(terminal: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("task: {name: σ×}\nnetwork: {name: restormer}\nchoices: [conv×1]\n",
                                     encoding="utf-8")
    code, _, errors = run(terminal, ENS, "search", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"))
    assert code == 1 and errors.startswith("error: ") and "'??'" in errors


def test_help_and_a_wrong_command_keep_their_exit_codes_in_the_c_locale() -> None:
    assert run("C", ENS, "run", "--help")[0] == 0 and run("C", ENS, "nothing")[0] == 2


def test_manifest_and_study_are_utf_8_in_the_c_locale() -> None:
    """`vssd×1` stands in both: decoded in the encoding of the locale it would be another choice."""
    code = ("from ens.config import find_study, load_study; from ens.distill.library import open_library; "
            "print(ascii(sorted({item.choice for item in open_library('builtin:denoise_demo').surrogates.values()})), "
            "ascii(load_study(find_study('demo')).choices))")
    library, study = open_library("builtin:denoise_demo"), load_study(find_study("demo"))
    expected = f"{sorted({item.choice for item in library.surrogates.values()})!a} {study.choices!a}\n"
    assert "\\xd7" in expected and run("C", code)[:2] == (0, expected)
