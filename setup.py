"""Native kernels are optional: where no compiler is at hand the package installs without them."""

from pathlib import Path

from setuptools import Extension, setup

sources = sorted(str(path) for path in Path("ens/ops/native").glob("*.cpp"))
# Loaded with ctypes, so neither headers of PyTorch nor of Python; `optional` makes a failed build a warning.
kernels = [Extension("ens.ops.native.kernels", sources, optional=True)] if sources else []

setup(ext_modules=kernels)
