"""A study as YAML -> frozen dataclasses; an unknown key is an error that names the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ens.atomic import write_atomic
from ens.space import Choice, parse_choice

Options = dict[str, Any]


class ConfigError(ValueError):
    """A study file that cannot be used; the message names the file, the key and what is allowed."""


@dataclass(frozen=True)
class DataConfig:
    """`train` and `validation` are folders (relative to the study file) or `builtin:photos`; `crop_px` cuts the centre
    of validation images, `limit` takes the first few.
    """

    train: str = ""
    validation: str = "builtin:photos"
    crop_px: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """End-to-end training; `phases` are [first step, patch side in px, batch size], as in progressive training.

    The loss is (1 − taught_weight)·L1 to the clean image + taught_weight·L1 to the output of `taught_by`, a checkpoint
    or `builtin:NAME`; a hybrid is taught by its own teacher unless `taught_by` names another.
    """

    steps: int = 300_000
    phases: tuple[tuple[int, int, int], ...] = ((0, 128, 8),)
    lr: float = 3e-4
    lr_final: float = 1e-6
    warmup_steps: int = 0
    clip_norm: float = 0.1
    ema_decay: float = 0.999
    taught_weight: float = 0.0
    taught_by: str = ""


@dataclass(frozen=True)
class DistillConfig:
    """Feature-wise distillation of the library; `group_size` surrogates are in memory at a time."""

    steps: int = 1000
    batch_size: int = 8
    patch_px: int = 64
    lr: float = 2e-3
    group_size: int = 64
    dtype: str = "float32"


@dataclass(frozen=True)
class SearchConfig:
    """`budget` counts unique genotypes measured, `objectives` are two or three names."""

    engine: str = "ehvi"
    objectives: tuple[str, ...] = ("psnr_drop_db", "penalty")
    budget: int = 500
    batch_size: int = 1


@dataclass(frozen=True)
class PenaltyConfig:
    """Prices of the usage penalty; defaults are those of the ENS paper's figure 3c."""

    teacher: float = 2.0
    per_block: float = 0.1


@dataclass(frozen=True)
class StudyConfig:
    """Everything one YAML file says. `choices` apply to every slot of the `granularity`; `slots` name single ones.

    `teacher` is a checkpoint or `builtin:NAME`, empty to train one; `library` a folder or `builtin:NAME`, empty to
    distil one. `network` is needed where there is no teacher to read it from.
    """

    name: str
    task: Options
    network: Options = field(default_factory=dict)
    teacher: str = ""
    library: str = ""
    granularity: str = "stage"
    choices: tuple[Any, ...] = ()
    slots: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    search: SearchConfig = SearchConfig()
    finetune: TrainConfig = TrainConfig(steps=2000, phases=((0, 64, 8),), lr=5e-4, taught_weight=0.5)
    penalty: PenaltyConfig = PenaltyConfig()
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.search.budget < 1 or self.search.batch_size < 1:
            raise ConfigError("search.budget and search.batch_size are at least 1")
        if self.granularity not in ("stage", "block"):
            raise ConfigError(f"granularity is 'stage' or 'block', got {self.granularity!r}")
        if bool(self.train.taught_by) != bool(self.train.taught_weight):
            raise ConfigError("train.taught_by and train.taught_weight go together: give both or neither")
        if self.teacher and self.train.taught_by:
            raise ConfigError(f"the teacher is {self.teacher}, so none is trained that {self.train.taught_by} could "
                              "teach")
        if bool(self.choices) == bool(self.slots):
            raise ConfigError("give either `choices` (for every slot) or `slots` (name: choices), and not both")


Config = TypeVar("Config")


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study; relative folders in it are relative to the file.

    `overrides` replace keys of the file, sections key by key. Raises ConfigError with the file, the key and what is
    allowed.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no study file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, for instance `name: my_study`")
    raw.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    try:
        study = build_config(StudyConfig, raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dataclasses.replace(
        study, teacher=_resolve(study.teacher, path), library=_resolve(study.library, path),
        train=dataclasses.replace(study.train, taught_by=_resolve(study.train.taught_by, path)),
        finetune=dataclasses.replace(study.finetune, taught_by=_resolve(study.finetune.taught_by, path)),
        data=dataclasses.replace(study.data, train=_resolve(study.data.train, path),
                                 validation=_resolve(study.data.validation, path)))


def shipped_spaces() -> list[Path]:
    """The studies that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return sorted((*package.glob("search_spaces/*.yaml"), *package.parent.glob("search_spaces/*.yaml")))


def find_study(name: str) -> Path:
    """A file, or the name of a shipped study (`demo`, `search_spaces/demo.yaml`); raises ConfigError listing those."""
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in shipped_spaces()}
    given = Path(name)
    if given.parent in (Path(), Path("search_spaces")) and given.suffix in ("", ".yaml") and given.stem in shipped:
        return shipped[given.stem]
    raise ConfigError(f"there is no study {name}; give a YAML file or one of {', '.join(shipped)}")


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """`search.budget=40` -> {"search": {"budget": 40}}; raises ConfigError for what has no key and value."""
    tree: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, for instance search.budget=40, got {change!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None
        *sections, last = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {key}: {section} was set to {branch!r} before")
        branch[last] = value
    return tree


RUN_FILE = "study.yaml"
_MADE = ("teacher", "library", "archive.db")
_MAY_CHANGE = ("search.budget", "device", "threads")


def save_run(out: Path, study: StudyConfig) -> None:
    """Keep the study in its run folder; raises ConfigError, with the differences, where another one ran there before.

    Only the budget, the device and the number of threads may change, once there is something that was made with them.
    """
    path = out / RUN_FILE
    content = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(study))), sort_keys=False, allow_unicode=True)
    if path.exists() and any((out / made).exists() for made in _MADE):
        before, now = _flatten(yaml.safe_load(path.read_text(encoding="utf-8"))), _flatten(yaml.safe_load(content))
        changed = [f"{key}: {before.get(key)} there, {now.get(key)} now" for key in sorted({*before, *now})
                   if before.get(key) != now.get(key) and key not in _MAY_CHANGE]
        if changed:
            raise ConfigError(f"{out} holds a run of another configuration ({'; '.join(changed)}); take another --out")
    write_atomic(path, content.encode())


def open_run(out: Path) -> StudyConfig:
    """The study of a run folder; raises ConfigError where there is none."""
    if not (out / RUN_FILE).exists():
        raise ConfigError(f"{out} is not a run folder: it has no {RUN_FILE}; "
                          f"`ens search SPACE.yaml --out {out}` makes one")
    return load_study(out / RUN_FILE)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _resolve(location: str, study: Path) -> str:
    if not location or location.startswith("builtin:"):
        return location
    return str((study.parent / location).resolve()) if not Path(location).is_absolute() else location


def parse_choices(entries: Sequence[Any]) -> tuple[Choice, ...]:
    """Surrogate choices of a slot: `mambair×2`, or a mapping of family, depth and the block's options."""
    choices = []
    for entry in entries:
        if isinstance(entry, Mapping):
            options = dict(entry)
            try:
                family, depth = str(options.pop("family")), int(options.pop("depth", 1))
            except KeyError:
                raise ConfigError(f"choice {dict(entry)} lacks `family`") from None
            choices.append(Choice(family, depth, tuple(sorted(options.items()))))
            continue
        try:
            choices.append(parse_choice(str(entry)))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return tuple(choices)


def build_config(kind: type[Config], raw: Mapping[str, Any], prefix: str = "", default: Any = None) -> Config:
    """Fill a config dataclass from plain YAML values, checking keys and types; the rest is that of `default`."""
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, 0.0)
            raise ConfigError(f"unknown key {prefix}{key}; the nearest is {prefix}{near[0]}")
    missing = [field.name for field in dataclasses.fields(kind)  # type: ignore[arg-type]
               if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
               and field.name not in raw]
    if missing:
        raise ConfigError(f"key {prefix}{missing[0]} is missing")
    values = {key: _convert(hints[key], value, prefix + key, getattr(kind, key, None)) for key, value in raw.items()}
    return kind(**values) if default is None else dataclasses.replace(default, **values)


def _convert(hint: Any, value: Any, key: str, default: Any = None) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} holds keys and values, got {value!r}")
        return build_config(hint, value, f"{key}.", default)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(arguments[0], value, key)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} is a list, got {value!r}")
        inner = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(inner) != len(value):
            raise ConfigError(f"{key} has {len(inner)} entries, got {value!r}")
        return tuple(_convert(part, item, key) for part, item in zip(inner, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} holds keys and values, got {value!r}")
        return {str(name): _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, str):
        return _float(value, key)  # YAML reads 1e-3 as text: the standard wants 1.0e-3
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{key} is {_WORDS[hint]}, got {value!r}")
    return value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _float(value: str, key: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{key} is a number, got {value!r}") from None
