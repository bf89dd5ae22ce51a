"""What the package promises before anything is computed: a cheap import, public names, a complete wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ens

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = {"mamba_ssm", "executorch", "openvino", "ray", "optuna_dashboard", "pytest", "hypothesis"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8",
                          cwd=ROOT).stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, ens; print(*sys.modules)").split()
    assert not {"torch", "numpy", "optuna", "onnxruntime", "matplotlib", "pandas"} & set(loaded)


def test_every_public_name_resolves_without_the_optional_packages() -> None:
    code = (f"import sys\nfor name in {sorted(OPTIONAL)}: sys.modules[name] = None\n"
            "import ens, ens.pipeline, ens.cli\nfor name in ens.__all__: getattr(ens, name)\nprint(len(ens.__all__))")
    assert int(run_python(code)) == len(ens.__all__)


def test_folders_are_attributes_and_load_when_they_are_used() -> None:
    run_python("import sys, ens; assert 'torch' not in sys.modules\n"
               "ens.ops, ens.blocks.FAMILIES, ens.pipeline.search, ens.space.Genotype")


def test_unknown_names_are_refused_with_the_right_ones() -> None:
    with pytest.raises(AttributeError, match="create_network"):
        ens.create_netwrok  # noqa: B018


def test_version_is_said_once() -> None:
    assert ens.__version__ == PROJECT["version"]


def test_every_dependency_is_pinned() -> None:
    pinned = {re.split("==", line)[0].lower().replace("_", "-")
              for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line}
    wanted = {re.match(r"[\w-]+", entry)[0].lower().replace("_", "-")  # type: ignore[index]
              for entry in [*PROJECT["dependencies"], *(name for extra in ("dev", "executorch", "openvino")
                                                        for name in PROJECT["optional-dependencies"][extra])]}
    assert wanted - {"ens"} <= pinned  # the extras that dev names are ours


@pytest.mark.slow
def test_wheel_holds_code_libraries_spaces_and_licence_and_no_tests(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir",
                    str(tmp_path), str(ROOT)], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("ens-*.whl"))).namelist())
    tracked = subprocess.run(["git", "ls-files", "ens", "search_spaces"], cwd=ROOT, check=True, capture_output=True,
                             encoding="utf-8").stdout.split()
    wanted = {name.replace("search_spaces/", "ens/search_spaces/") for name in tracked if "/native/" not in name}
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)
