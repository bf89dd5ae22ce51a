"""What pyproject.toml cannot say: the optional native kernel, and the search spaces as data of the package."""

import sys
from glob import glob

from setuptools import Extension, find_packages, setup

# libgomp is the one PyTorch brings. Clang on macOS has no OpenMP: one thread there.
threads = ["-fopenmp"] if sys.platform == "linux" else []
# Loaded with ctypes, so neither headers of PyTorch nor of Python; `optional` makes a failed build a warning.
# The instruction set is chosen at run time, so no -march: a wheel runs on any machine of its architecture.
kernels = Extension("ens.ops.native.kernels", sorted(glob("ens/ops/native/*.cpp")),
                    depends=sorted(glob("ens/ops/native/*.h")), optional=True, language="c++",
                    extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi", *threads], extra_link_args=threads)

setup(packages=[*find_packages(include=["ens", "ens.*"]), "ens.search_spaces"],
      package_dir={"ens.search_spaces": "search_spaces"}, ext_modules=[kernels])
