"""The native kernel under the compilers people have: GCC 11 (Ubuntu 22.04), the machine's own GCC, and Clang."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import torch
from ens.ops.native import load_kernels
from ens.ops.selective_scan import selective_scan, selective_scan_loop
assert load_kernels() is not None, "the kernel did not load"
torch.manual_seed(0)
inputs = [torch.randn(2, 6, 37), torch.rand(2, 6, 37), -torch.rand(6, 5), torch.randn(2, 2, 5, 37),
          torch.randn(2, 2, 5, 37)]
results = []
for scan in (selective_scan, selective_scan_loop):
    leaves = [value.clone().requires_grad_() for value in inputs]
    y = scan(*leaves)
    y.square().sum().backward()
    results.append([y.detach(), *(leaf.grad for leaf in leaves)])
for got, expected in zip(*results, strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++-11", "g++", "clang++"])
def test_the_kernel_builds_and_agrees_with_the_loop(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None and not os.environ.get("ENS_REQUIRE_COMPILERS"):
        pytest.skip(f"{compiler} is not installed; .ci/run installs it and does not skip")
    leave = shutil.ignore_patterns("kernels*", "__pycache__", "pretrained")
    shutil.copytree(ROOT / "ens", tmp_path / "ens", ignore=leave)
    target = tmp_path / "ens" / "ops" / "native" / f"kernels{EXTENSION_SUFFIXES[0]}"
    sources = map(str, sorted((ROOT / "ens" / "ops" / "native").glob("*.cpp")))
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-psabi", *sources, "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
