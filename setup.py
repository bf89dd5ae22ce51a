"""What pyproject.toml cannot say: the optional native kernel, and the search spaces as data of the package."""

import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

OPENMP = "-fopenmp"


class BuildKernels(build_ext):
    """Builds with OpenMP where the compiler can link it, else without: one thread, the same results.

    GCC brings libgomp, which PyTorch uses too. Clang needs libomp, a package of its own; on macOS it has none.
    """

    def build_extension(self, ext: Extension) -> None:
        if self._links_openmp():
            ext.extra_compile_args += [OPENMP]
            ext.extra_link_args += [OPENMP]
        else:
            self.warn("the compiler does not link OpenMP: the kernel will run in one thread")
        super().build_extension(ext)

    def _links_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("void probe() {\n#pragma omp parallel\n    {}\n}\n", encoding="utf-8")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[OPENMP])
                self.compiler.link_shared_object(objects, str(Path(folder, "probe.so")), extra_postargs=[OPENMP],
                                                 target_lang="c++")
            except (CompileError, LinkError):
                return False
        return True


# Loaded with ctypes, so neither headers of PyTorch nor of Python; `optional` makes a failed build a warning.
# The instruction set is chosen at run time, so no -march: a wheel runs on any machine of its architecture.
kernels = Extension("ens.ops.native.kernels", sorted(glob("ens/ops/native/*.cpp")),
                    depends=sorted(glob("ens/ops/native/*.h")), optional=True, language="c++",
                    extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi"])

setup(packages=[*find_packages(include=["ens", "ens.*"]), "ens.search_spaces"],
      package_dir={"ens.search_spaces": "search_spaces"}, ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
