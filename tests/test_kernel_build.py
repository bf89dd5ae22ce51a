"""The native kernel is built by every compiler it is promised for, and one that does not load breaks nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ens.ops.native as native
from ens.ops.native import load_kernels, why_no_kernels

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = os.environ.get("ENS_COMPILERS", "").split()
"""Compilers that must be here: .ci/run installs and names them, elsewhere a missing one is skipped."""
TESTS = ("conftest.py", "test_scan_op.py", "test_selective_scan.py", "test_ssd.py")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", REQUIRED or ["g++-11", "clang++"])
def test_kernel_of_every_compiler_agrees_with_the_loop(tmp_path: Path, compiler: str) -> None:
    """Built as an installation builds it (OpenMP where it links), in a copy, and run by the tests of the operators."""
    if shutil.which(compiler) is None:
        assert not REQUIRED, f"{compiler} is required by ENS_COMPILERS and not on this machine"
        pytest.skip(f"no {compiler} on this machine: its kernel was not built (.ci/run installs it)")
    shutil.copytree(ROOT / "ens", tmp_path / "ens", ignore=shutil.ignore_patterns("__pycache__", "*.so", "pretrained"))
    shutil.copytree(ROOT / "search_spaces", tmp_path / "search_spaces")
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *(f"tests/{test}" for test in TESTS)):
        shutil.copy(ROOT / name, tmp_path / name)
    # PyTorch's own compiler reads its sources in the locale's encoding: no C locale for it.
    environment = {**os.environ, "PYTHONUTF8": "1",
                   "CC": compiler.replace("++", "cc" if compiler.startswith("g") else ""), "CXX": compiler,
                   "PYTHONPATH": str(tmp_path)}
    for command in ([sys.executable, "setup.py", "build_ext", "--inplace"],
                    [sys.executable, "-c", "import ens.ops.native as n; assert n.load_kernels(), n.why_no_kernels()"],
                    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
        assert result.returncode == 0, f"{compiler}: {command}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    (built,) = tmp_path.glob("ens/ops/native/kernels*.so")
    says = (b"clang version" if "clang" in compiler else b"GCC: (")
    assert says in built.read_bytes(), f"{built} was not made by {compiler}"


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_text(path: Path) -> None:
    path.write_text("not a library\n" * 100, encoding="utf-8")


def cut_off(path: Path) -> None:
    """A file that ends early: the system's loader maps it and the process dies of a bus error."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def change_machine(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[18:20] = (0x1234).to_bytes(2, "little")
    path.write_bytes(content)


def compile_library(path: Path, source: str, *arguments: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++: this kernel was not tried")
    path.with_suffix(".cpp").write_text(source, encoding="utf-8")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".cpp")), *arguments], check=True)


def lack_functions(path: Path) -> None:
    compile_library(path, 'extern "C" long ens_scan_chunk() { return 64; }')


def be_of_another_version(path: Path) -> None:
    functions = " ".join(f"long ens_scan_{name}() {{ return 64; }}" for name in ("chunk", "lanes", "call_bytes"))
    compile_library(path, f'extern "C" {{ {functions} }}')


def lack_another_library(path: Path) -> None:
    """As where libgomp is missing."""
    other = path.with_name("libsomewhere.so")
    compile_library(other, "int somewhere() { return 0; }")
    compile_library(path, "int somewhere(); int here() { return somewhere(); }", str(other))
    other.unlink()


BROKEN: dict[Callable[[Path], None], str] = {
    write_nothing: "file too short", write_text: "invalid ELF header", cut_off: "is cut off",
    change_machine: "cannot open shared object file|wrong ELF", lack_functions: "undefined symbol",
    be_of_another_version: "another version of ens", lack_another_library: "libsomewhere",
}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the built kernel, in the place where the package looks for it."""
    built = next(Path(native.__file__).parent.glob("kernels*.so"), None)
    if built is None or sys.platform != "linux":
        pytest.skip("no kernel of Linux is built here: none was broken")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    native._load.cache_clear()
    yield Path(shutil.copy(built, tmp_path))
    native._load.cache_clear()


@pytest.mark.parametrize("break_it", BROKEN)
def test_a_kernel_that_does_not_load_is_none_with_a_reason(kernel: Path, break_it: Callable[[Path], None]) -> None:
    break_it(kernel)
    assert load_kernels() is None
    assert why_no_kernels().startswith("does not load (")
    assert any(part in why_no_kernels() for part in BROKEN[break_it].split("|")), why_no_kernels()


def test_a_kernel_that_loads_needs_no_reason_and_one_that_is_not_there_says_so(kernel: Path) -> None:
    assert load_kernels() is not None and why_no_kernels() == ""
    kernel.unlink()
    native._load.cache_clear()
    assert load_kernels() is None and "not built" in why_no_kernels()


SCAN_WITH_A_CORRUPT_KERNEL = """
import warnings
import torch
import ens, ens.ops.native
ens.ops.native.__file__ = {place!r}
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said:
    from ens.blocks import create_stack
    from ens.ops.selective_scan import scan_backends, selective_scan, selective_scan_loop
    u, A, B = torch.rand(1, 2, 5), -torch.ones(2, 3), torch.rand(1, 3, 5)
    for _ in range(2):
        torch.testing.assert_close(selective_scan(u, u, A, B, B), selective_scan_loop(u, u, A, B, B))
        create_stack("ssd", 8, 1)(torch.rand(1, 8, 4, 6))
print(*(str(entry.message) for entry in said), sep="\\n")
print(scan_backends()["cpu"])
"""


def test_a_corrupt_kernel_costs_speed_and_one_line_that_says_why(kernel: Path) -> None:
    cut_off(kernel)
    code = SCAN_WITH_A_CORRUPT_KERNEL.format(place=str(kernel.with_name("__init__.py")))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    warning, backend = result.stdout.splitlines()
    assert f"{kernel.name} is cut off" in warning and "reinstall ens" in warning
    assert backend == f"chunked PyTorch path (native kernel does not load ({kernel.name} is cut off))"
