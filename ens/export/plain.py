"""A hybrid as one Python file of PyTorch code that needs no ens, beside its weights: to read, change and train on.

The file is the sources of the very classes and functions that the network is made of, each with what it refers to, and
a function that puts them together as the hybrid has them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ens.atomic import write_atomic
from ens.blocks import FAMILIES
from ens.export.formats import ExportError, parity_images
from ens.networks import NETWORKS
from ens.networks.checkpoints import encode_tensors
from ens.networks.steps import Network
from ens.space import Choice

_REPLACED = {
    "ens.ops.scan_op.uses_kernel": '''def uses_kernel(u: Tensor) -> bool:
    """The compiled kernel of ens is not here: scans run as PyTorch operators."""
    return False
''',
    "ens.ops.ssd._ssd_kernel": '''def _ssd_kernel(*inputs: Tensor | None, reverse: bool) -> Tensor:
    """Never called: see `uses_kernel`."""
    raise AssertionError("there is no compiled kernel here")
'''}
"""What reaches for compiled code, and what stands in its place."""
_TOLERANCE = 1e-6


def write_plain(network: Network, path: Path, *, choices: Mapping[str, Choice], photo: Tensor) -> float:
    """Write `path` (a .py) and the weights beside it (.safetensors); return the largest relative error that was seen.

    `choices` are those of the replaced slots. The code is run as it stands and must give what the network gives, to
    1e-6, before it appears. Raises ExportError for a network or family whose code cannot stand alone, and where it
    gives something else.
    """
    source = write_source(network, choices)
    namespace: dict[str, object] = {"__name__": __name__, "__file__": str(path)}  # dataclasses look their module up
    try:
        exec(compile(source, str(path), "exec"), namespace)  # our own source, as it was put together above
        plain = namespace["create_network"]()  # type: ignore[operator]
        plain.load_state_dict(network.state_dict())
    except (NameError, ImportError, AttributeError, RuntimeError, TypeError) as error:
        raise ExportError(f"{path.name}: the code does not stand alone ({type(error).__name__}: {error})") from error
    distance = _measure(network.cpu().eval(), plain.eval(), photo)
    if not distance <= _TOLERANCE:
        raise ExportError(f"{path.name}: the code differs from the network by {distance:.1e} relative, more than "
                          f"{_TOLERANCE:.0e}; the file was not written")
    write_atomic(path.with_suffix(".safetensors"), encode_tensors(network.state_dict(), {}))
    write_atomic(path, source.encode())
    return distance


def _measure(network: Network, plain: nn.Module, photo: Tensor) -> float:
    with torch.no_grad():
        pairs = [(network(image), plain(image)) for image in parity_images(network, photo)]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-6)) for a, b in pairs)


def write_source(network: Network, choices: Mapping[str, Choice]) -> str:
    """The Python source of a network made by its name, with these choices in its slots; raises ExportError."""
    if network.recipe is None or network.recipe[0] not in NETWORKS or network.recipe[0] == "wrapped":
        raise ExportError("the network was not made by a name of ens, so its code is not known: it has no plain file")
    name, options = network.recipe
    roots: list[type] = [NETWORKS[name], *(FAMILIES[choice.family] for choice in choices.values())]
    pieces = _Pieces()
    for root in roots:
        pieces.add(root.__module__, root.__name__)
    lines = [f"    network = {pieces.names[NETWORKS[name].__module__, NETWORKS[name].__name__]}({_arguments(options)})"]
    for slot, choice in choices.items():
        spec, block = network.slot(slot), FAMILIES[choice.family]
        called = pieces.names[block.__module__, block.__name__]
        rows = ",\n        ".join(f"{called}({spec.channels}{_row_arguments(network, slot, choice, index)})"
                                  for index in range(1 if choice.family == "identity" else choice.depth))
        lines.append(f"    network.fill({slot!r}, nn.Sequential(\n        {rows}))")
    body = "\n\n\n".join(pieces.texts)
    return _FRAME.format(imports=pieces.imports(), body=body, lines="\n".join(lines))


def _row_arguments(network: Network, slot: str, choice: Choice, index: int) -> str:
    """Keyword arguments of one block of a choice, as `create_filling` gives them."""
    spec, allowed = network.slot(slot), inspect.signature(FAMILIES[choice.family]).parameters
    own = dict(spec.options) if choice.family == spec.family else {}
    given: dict[str, object] = {**own, **dict(choice.options)}
    if "heads" in allowed:
        given.setdefault("heads", spec.heads)
    if "index" in allowed:
        given["index"] = given.get("index", index)
    return "".join(f", {key}={value!r}" for key, value in given.items())


def _arguments(options: Mapping[str, object]) -> str:
    return ",\n        ".join(f"{key}={value!r}" for key, value in options.items())


class _Pieces:
    """Top-level definitions of ens, each after those that it refers to; `names` are those they have in the file."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.names: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()
        self._imports: dict[str, set[str]] = {}
        self._modules: dict[str, tuple[str, dict[str, ast.stmt], dict[str, tuple[str, str]]]] = {}

    def imports(self) -> str:
        """The import statements of all pieces."""
        whole = sorted(f"import {module}" + (f" as {alias}" if alias != module else "")
                       for module, aliases in self._imports.items() if module[0] != ">" for alias in aliases)
        parts = sorted(f"from {module[1:]} import {', '.join(sorted(names))}"
                       for module, names in self._imports.items() if module[0] == ">")
        return "\n".join((*whole, *parts))

    def add(self, module: str, name: str) -> None:
        """Add a definition and, before it, what it refers to; ExportError where that is no source of ens."""
        if (module, name) in self.names:
            return
        text, definitions, imported = self._read(module)
        if name not in definitions:
            if name not in imported:
                return  # a builtin, or a name of a function's own
            self._follow(name, *imported[name])
            self.names[module, name] = self.names.get(imported[name], name)
            return
        node, replaced = definitions[name], _REPLACED.get(f"{module}.{name}")
        own = name if name not in self._taken else f"{name}_{module.rpartition('.')[2]}"
        self._taken.add(own)
        self.names[module, name] = own
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign):
            found = ast.parse(replaced) if replaced else node
            called = {part.id for part in ast.walk(found) if isinstance(part, ast.Name)} - {name}
            for other in sorted(called & {*definitions, *imported}):
                self.add(module, other)
            renamed = {other: self.names[module, other] for other in (*called, name) if (module, other) in self.names}
            self.texts.append(_rename(replaced or _segment(text, node), renamed).strip())

    def _follow(self, name: str, module: str, original: str) -> None:
        if module.startswith("ens.") or module == "ens":
            if module.startswith("ens.ops.native"):
                raise ExportError(f"{name} is compiled code of ens, which a plain file cannot hold: hybrids with "
                                  "selective scans have no plain file")
            self.add(module, original)
        elif original:
            self._imports.setdefault(f">{module}", set()).add(original if original == name else
                                                              f"{original} as {name}")
        else:
            self._imports.setdefault(module, set()).add(name)

    def _read(self, module: str) -> tuple[str, dict[str, ast.stmt], dict[str, tuple[str, str]]]:
        """Source of a module, its top-level definitions, and where its imported names are from."""
        if module not in self._modules:
            text = inspect.getsource(_import(module))
            definitions: dict[str, ast.stmt] = {}
            imported: dict[str, tuple[str, str]] = {}
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    definitions[node.name] = node
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    definitions |= {target.id: node for target in targets if isinstance(target, ast.Name)}
                elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                    imported |= {part.asname or part.name: (node.module or "", part.name) for part in node.names}
                elif isinstance(node, ast.Import):
                    imported |= {part.asname or part.name: (part.name, "") for part in node.names}
            self._modules[module] = text, definitions, imported
        return self._modules[module]


def _import(module: str) -> ModuleType:
    return importlib.import_module(module)


def _segment(text: str, node: ast.stmt) -> str:
    """The source of a definition with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(text.splitlines()[first - 1:node.end_lineno])


def _rename(text: str, names: Mapping[str, str]) -> str:
    """`text` with names changed where another definition of the file has them already."""
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return text
    lines = text.splitlines(keepends=True)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and node.id in changed]
    for node in sorted(found, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        line = lines[node.lineno - 1].encode()
        lines[node.lineno - 1] = (line[:node.col_offset] + changed[node.id].encode()
                                  + line[node.col_offset + len(node.id.encode()):]).decode()
    text = "".join(lines)
    for old, new in changed.items():
        for keyword in ("class", "def"):
            text = text.replace(f"{keyword} {old}(", f"{keyword} {new}(")
    return text


_FRAME = '''"""A restoration network as plain PyTorch: needs torch and safetensors, and the weights beside this file.

    network = load_network()
    restored = network(image)  # (B, channels, H, W) float32 in [0, 1], any H and W
"""

from __future__ import annotations

{imports}
from pathlib import Path
from safetensors.torch import load_file


{body}


def create_network() -> nn.Module:
    """The network with random weights."""
{lines}
    return network


def load_network(weights: str | Path = Path(__file__).with_suffix(".safetensors")) -> nn.Module:
    """The network with its weights, in evaluation mode."""
    network = create_network()
    network.load_state_dict(load_file(weights))
    return network.eval()
'''
