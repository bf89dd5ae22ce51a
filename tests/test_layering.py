"""The direction rule of the house: who may import whom, who prints, who touches files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ens"
ORDER = ("space", "objectives", "atomic", "shortage", "own_code", "ops", "blocks", "networks", "data", "distill",
         "evaluate", "search", "pareto", "export", "runtime", "yaml_values", "config", "draft", "opened_study",
         "run_folder", "companions", "forecast", "workers", "pipeline", "console", "opened_run", "options", "listing",
         "timings", "starting", "searching", "cli")
ISLANDS = {"space": set(), "objectives": {"space"}, "atomic": set(), "shortage": set(), "ops": {"ops"},
           "data": {"data", "atomic", "own_code"}, "search": {"search", "space", "objectives", "atomic"},
           "pareto": {"pareto", "space", "objectives", "atomic", "shortage"}}
PRINT = {"cli", "console"}
TOUCH_FILES = {"atomic", "networks.checkpoints", "networks.weight_files", "data.decoding", "data.images", "data.sizes",
               "distill.library", "pareto.archive", "pareto.claims", "pareto.storage", "pareto.report", "export.hybrid",
               "export.bundle", "export.bundle_runner", "export.card", "export.edge", "export.executorch",
               "export.formats", "export.int8", "export.onnx", "export.openvino", "export.torch_export",
               "evaluate.latency", "listing", "runtime.profiling", "runtime.runner", "runtime.session", "search.table",
               "yaml_values", "config", "ops.native"}  # which looks whether its own compiled file can be loaded
FILE_CALLS = {"open", "fdopen", "write_text", "write_bytes", "read_text", "read_bytes", "unlink", "mkdir", "rename",
              "rmtree", "safe_open", "save_file", "load_file", "imread", "imwrite", "write_html"}
PATHS = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
SOURCES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"):
           ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}


def imported(name: str) -> set[str]:
    """Every module, and every name in a module, that a module imports; relative ones keep their dots."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def called(name: str) -> set[str]:
    """Last part of the name of everything a module calls."""
    functions = [node.func for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else f.attr for f in functions if isinstance(f, ast.Name | ast.Attribute)}


def test_every_module_has_a_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in SOURCES} <= set(ORDER)


def test_modules_import_only_from_their_own_folder_or_folders_to_their_left() -> None:
    wrong = []
    for name in SOURCES:
        folder = name.split(".")[0]
        allowed = ISLANDS.get(folder, set(ORDER[:ORDER.index(folder) + 1]))
        wrong += [f"{name} imports {module}" for module in imported(name)
                  if module.startswith(".") or (module == "ens" and name not in PRINT)
                  or (module.startswith("ens.") and module.split(".")[1] not in allowed)]
    assert not wrong


def test_ops_import_torch_only_and_space_and_search_no_torch() -> None:
    others = {name: {m.split(".")[0] for m in imported(name)} - sys.stdlib_module_names - {"ens"} for name in SOURCES}
    assert {"torch", "mamba_ssm"} >= set().union(*(found for name, found in others.items() if name.startswith("ops")))
    assert not [name for name, found in others.items() if name.startswith(("space", "search")) and "torch" in found]


def test_only_cli_and_its_console_print_and_only_the_named_modules_touch_files() -> None:
    assert not [name for name in SOURCES if name not in PRINT and "print" in called(name)]
    assert not {name: found for name in SOURCES if name not in TOUCH_FILES and (found := called(name) & FILE_CALLS)}


def test_there_are_no_import_cycles() -> None:
    edges = {name: {m.removeprefix("ens.") for m in imported(name)} & SOURCES.keys() - {name} for name in SOURCES}
    while leaves := {name for name in edges if not edges[name]}:
        edges = {name: edges[name] - leaves for name in edges if name not in leaves}
    assert not edges


def test_files_and_functions_keep_the_size_of_a_page() -> None:
    counts = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PATHS}
    long = [f"{name}: {count} lines" for name, count in counts.items()
            if count > (220 if name == "pipeline.py" else 350)]
    for name, tree in SOURCES.items():
        long += [f"{name}.{node.name}: {count} lines" for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                 and (count := (node.end_lineno or 0) - node.lineno + 1) > 60]
    assert not long


def test_every_public_function_says_what_it_does() -> None:
    functions = [(name, node) for name, tree in SOURCES.items() for node in tree.body
                 if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    silent = [f"{name}.{node.name}" for name, node in functions if ast.get_docstring(node) is None]
    assert not silent


def test_every_package_that_is_imported_is_declared_and_every_declared_one_imported() -> None:
    declared = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = declared["optional-dependencies"]
    optional = (package for extra in ("cuda", "executorch", "openvino", "ray") for package in extras[extra])
    named = {re.split(r"[ ;<>=\[]", text)[0].lower() for text in (*declared["dependencies"], *optional)}
    names = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image",
             "onnx_ir": "onnx-ir", "mamba_ssm": "mamba-ssm"}
    found = {m.split(".")[0] for name in SOURCES for m in imported(name)} - sys.stdlib_module_names - {"ens"}
    used = {names.get(module, module).lower() for module in found}
    assert used <= named
    # onnxscript is what torch.onnx.export runs on.
    assert named - used <= {"onnxscript"}
