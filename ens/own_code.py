"""Code that users pass with `--import`: functions that return a network or degrade an image.

A study or a file names such a function `my_network:build`, or by its entry point; naming runs nothing. What was
imported here is found, anything else is refused with the import that is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from ens.shortage import is_shortage
from ens.space import suggest

ENTRY_POINTS = "ens.networks"
"""Group in which an installed package may offer functions that return a network."""
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


def spell_imports() -> list[str]:
    """The same as words of a command to type in this folder."""
    here = f"{Path.cwd()}{os.sep}"
    codes = dict.fromkeys(code.removeprefix(here) for code in _given)
    return [word for code in codes for word in ("--import", code)]


def name_code(given: str) -> str:
    """`my_network.py:build` as a study names it, its file imported; other names as they are."""
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
    """Whether this is how a user's function is named, imported or not."""
    return ":" in name or name in _imported


def find_function(name: str, role: str = "network") -> Callable[..., object]:
    """The function or class `module:function` of what was imported, for a `role` in a study; raises OwnCodeError saying
    which import lacks.
    """
    place, _, attribute = name.partition(":")
    if place not in _imported:
        file = "" if "." in place or not attribute else f" (or --import {place}.py, where it is a file)"
        raise OwnCodeError(f"{role} {name!r} is code outside ens: add --import {place}{file}")
    found = _imported[place]
    if not isinstance(found, ModuleType):
        return found
    function = getattr(found, attribute, None)
    # A file may name any attribute; what a module merely imported, `os.system` say, is not for it to call.
    is_network = isinstance(function, type) and issubclass(function, nn.Module)
    if not callable(function) or not (is_network or _is_of(found, function)):
        own = [key for key, value in vars(found).items() if inspect.isroutine(value) or isinstance(value, type)
               if _is_of(found, value)]
        raise OwnCodeError(f"{place} defines no function {attribute!r} that could be a {role}"
                           f"{suggest(attribute, own)}; it has {', '.join(own) or 'none'}")
    return function


def call_function(name: str, *arguments: object, role: str, **options: Any) -> object:
    """What the user's function returns; raises OwnCodeError with the line it failed in."""
    try:
        return find_function(name, role)(*arguments, **options)
    except Exception as error:
        if is_shortage(error):
            raise
        raise OwnCodeError(f"{role} {name} failed: {describe_failure(error)}") from error


def _is_of(module: ModuleType, function: object) -> bool:
    """Whether a function or class is defined in this module or in a part of this package."""
    return f"{getattr(function, '__module__', '')}.".startswith(f"{module.__name__}.")


def describe_failure(error: BaseException) -> str:
    """What was raised, and the last line of code outside this package and PyTorch that it came through."""
    ours = (str(Path(__file__).resolve().parent), str(Path(torch.__file__).parent), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
