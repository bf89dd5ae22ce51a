"""Plain values of a YAML file, before anybody knows what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES, _MOST_VALUES = 1_000_000, 20_000


class ConfigError(ValueError):
    """A study file that cannot be used; the message names the file, the key and what is allowed."""


def read_number(value: object) -> object:
    """YAML reads 1e-3 as text: the standard wants 1.0e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def freeze(value: object) -> object:
    """Lists as tuples, all the way down."""
    if isinstance(value, Mapping):
        return {key: freeze(item) for key, item in value.items()}
    return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key: {"search": {"budget": 3}} -> {"search.budget": 3}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def read_yaml(path: Path) -> Any:
    """The values of a YAML file; raises ConfigError for what is no file of a study's size."""
    if not path.is_file():  # a pipe or a device would be waited for
        raise ConfigError(f"{path} is not a file" if path.exists() else f"there is no study file {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_BYTES:,} bytes; that is no study")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    values = [raw]
    for value in values:  # grows while it is walked; aliases of aliases count as often as they stand there
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if len(values) > _MOST_VALUES:
            raise ConfigError(f"{path} has more than {_MOST_VALUES:,} values; that is no study")
    return raw
