"""What pyproject.toml cannot say: the optional native kernel, and the search spaces as data of the package."""

from glob import glob

from setuptools import Extension, find_packages, setup

# Loaded with ctypes, so neither headers of PyTorch nor of Python; `optional` makes a failed build a warning.
kernels = Extension("ens.ops.native.kernels", sorted(glob("ens/ops/native/*.cpp")),
                    depends=sorted(glob("ens/ops/native/*.h")), optional=True)

setup(packages=[*find_packages(include=["ens", "ens.*"]), "ens.search_spaces"],
      package_dir={"ens.search_spaces": "search_spaces"}, ext_modules=[kernels])
