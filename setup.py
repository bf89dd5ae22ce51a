"""What pyproject.toml cannot say: the optional native kernel, and the search spaces as data of the package."""

from glob import glob

from setuptools import Extension, find_packages, setup

# Loaded with ctypes, so neither headers of PyTorch nor of Python; `optional` makes a failed build a warning.
# The instruction set is chosen at run time, so no -march: a wheel runs on any machine of its architecture.
kernels = Extension("ens.ops.native.kernels", sorted(glob("ens/ops/native/*.cpp")),
                    depends=sorted(glob("ens/ops/native/*.h")), optional=True, language="c++",
                    extra_compile_args=["-std=c++17", "-O3", "-pthread", "-Wno-psabi"], extra_link_args=["-pthread"])

setup(packages=[*find_packages(include=["ens", "ens.*"]), "ens.search_spaces"],
      package_dir={"ens.search_spaces": "search_spaces"}, ext_modules=[kernels])
