"""What pyproject.toml cannot say: optional native kernels, and the search spaces as data of the package."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

sources = sorted(str(path) for path in Path("ens/ops/native").glob("*.cpp"))
# Loaded with ctypes, so neither headers of PyTorch nor of Python; `optional` makes a failed build a warning.
kernels = [Extension("ens.ops.native.kernels", sources, optional=True)] if sources else []

setup(packages=[*find_packages(include=["ens", "ens.*"]), "ens.search_spaces"],
      package_dir={"ens.search_spaces": "search_spaces"}, ext_modules=kernels)
