"""Networks that users bring: functions of code that they pass with `--import`, which return a module.

A study or a file names such a network `my_network:build`, or by its entry point; naming runs nothing. What was imported
here is found, anything else is refused with the import that is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from ens.networks.probe import describe_failure
from ens.networks.steps import Network
from ens.networks.wrap import frame_network
from ens.shortage import is_shortage

ENTRY_POINTS = "ens.networks"
"""Group in which an installed package may offer functions that return a network."""
_FRAME = tuple(inspect.signature(frame_network).parameters)[1:]
_imported: dict[str, ModuleType | Callable[..., object]] = {}
_given: list[str] = []
Result = TypeVar("Result")


class OwnCodeError(ValueError):
    """Code of the user's that is absent, was not imported, or fails; the message says where."""


def import_code(given: str) -> None:
    """Import a file (`my_network.py`), a module (`my_package.module`), or the name of an entry point of `ens.networks`.

    Beside a file its neighbours can be imported too, and modules of the working folder. Raises OwnCodeError.
    """
    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    path = Path(given)
    if path.suffix == ".py":
        if not path.is_file():
            raise OwnCodeError(f"--import {given}: there is no such file")
        _imported[path.stem] = _run(given, lambda: _import_file(path.resolve()))
    elif given in offered:
        _imported[given] = _run(given, offered[given].load)
    else:
        _add_to_path(Path.cwd())
        _imported[given] = _run(given, lambda: importlib.import_module(given))
    _given.append(str(path.resolve()) if path.suffix == ".py" else given)


def list_imports() -> list[str]:
    """What `import_code` was given so far: another process that is to have it all is given the same."""
    return list(_given)


def name_code(given: str) -> str:
    """`my_network.py:build` as the name of a network, its file imported; other names as they are."""
    file, colon, attribute = given.rpartition(":")
    if not file.endswith(".py") or not colon:
        return given
    import_code(file)
    return f"{Path(file).stem}:{attribute}"


def _import_file(path: Path) -> ModuleType:
    name, known = path.stem, sys.modules.get(path.stem)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        raise OwnCodeError(f"a module called {name} is in use already; give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # by the suffix
    _add_to_path(path.parent)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _add_to_path(folder: Path) -> None:
    """At the end: a file called `types.py` beside the user's is not to stand in for Python's."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _run(what: str, work: Callable[[], Result]) -> Result:
    """Whatever goes wrong in a user's code, as one sentence that says where."""
    try:
        return work()
    except OwnCodeError as error:
        raise OwnCodeError(f"--import {what}: {error}") from None
    except (Exception, SystemExit) as error:  # a script may end itself
        if is_shortage(error):
            raise
        raise OwnCodeError(f"--import {what} failed: {describe_failure(error)}") from error


def list_offers() -> str:
    """What installed packages offer, as the end of a sentence."""
    names = sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))
    return f"; installed packages offer {', '.join(names)} (with --import of that name)" if names else ""


def is_own(name: str) -> bool:
    """Whether this is how a network of a user's is named, imported or not."""
    return ":" in name or name in _imported


def find_function(name: str) -> Callable[..., object]:
    """The function or class `module:function` of what was imported; raises OwnCodeError saying which import lacks."""
    place, _, attribute = name.partition(":")
    if place not in _imported:
        file = "" if "." in place or not attribute else f" (or --import {place}.py, where it is a file)"
        raise OwnCodeError(f"network {name!r} is code outside ens: add --import {place}{file}")
    found = _imported[place]
    if not isinstance(found, ModuleType):
        return found
    function = getattr(found, attribute, None)
    # A file may name any attribute; what a module merely imported, `os.system` say, is not for it to call.
    is_network = isinstance(function, type) and issubclass(function, nn.Module)
    if not callable(function) or not (is_network or _is_of(found, function)):
        own = [key for key, value in vars(found).items() if inspect.isroutine(value) or isinstance(value, type)
               if _is_of(found, value)]
        raise OwnCodeError(f"{place} defines no function {attribute!r} that could return a network; it has "
                           f"{', '.join(own) or 'none'}")
    return function


def _is_of(module: ModuleType, function: object) -> bool:
    """Whether a function or class is defined in this module or in a part of this package."""
    return f"{getattr(function, '__module__', '')}.".startswith(f"{module.__name__}.")


def build_module(name: str, options: Mapping[str, Any]) -> nn.Module:
    """What the user's function returns for these options, always on the CPU; raises OwnCodeError."""
    function = find_function(name)
    try:
        parameters = inspect.signature(function).parameters
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        raise OwnCodeError(f"network {name} does not take these options ({error}); it takes "
                           f"{', '.join(parameters) or 'none'}") from None
    try:
        # Code of others reads values while it builds (`x.item()`), which the meta device has none of.
        with torch.device("cpu"):
            module = function(**options)
    except Exception as error:
        if is_shortage(error):
            raise
        raise OwnCodeError(f"network {name} cannot be built: {describe_failure(error)}") from error
    if not isinstance(module, nn.Module):
        raise OwnCodeError(f"{name} returned a {type(module).__name__}, not an nn.Module")
    return module


def split_options(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the user's function, and those for `frame_network`; what both know of goes to both."""
    known = inspect.signature(find_function(name)).parameters
    frame = {key: value for key, value in options.items() if key in _FRAME}
    return {key: value for key, value in options.items() if key not in _FRAME or key in known}, frame


def create_own(name: str, options: Mapping[str, Any]) -> Network:
    """A user's network with its slots: what its function returns for `options`, framed as `frame_network` says.

    Raises OwnCodeError for code that was not imported or fails, and for slots that do not fit.
    """
    plain = {key: _thaw(value) for key, value in options.items()}
    given, frame = split_options(name, plain)
    module = build_module(name, given)
    if isinstance(module, Network):
        network = module
    elif "slots" not in frame:
        raise OwnCodeError(f"network {name} names no `slots`; `ens slots {name}` lists what they can be")
    else:
        try:
            network = frame_network(module, **frame)
        except (TypeError, ValueError) as error:
            raise OwnCodeError(f"network {name}: {error}") from error
    network.recipe = (name, plain)
    return network


def _thaw(value: object) -> object:
    """Tuples as lists, all the way down: what a file gives back."""
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return [_thaw(item) for item in value] if isinstance(value, tuple | list) else value
