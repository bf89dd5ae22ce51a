"""A study as YAML -> frozen pydantic models; an unknown key is an error that names the nearest key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ens.space import BUILTIN, Choice, parse_choice, suggest
from ens.yaml_values import ConfigError as ConfigError
from ens.yaml_values import flatten, freeze, read_number, read_yaml

Options = dict[str, Any]
Section = TypeVar("Section", bound="_Section")
Number = Annotated[float, BeforeValidator(read_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
_MANY = 100_000_000
Steps = Annotated[int, Field(ge=1, le=_MANY)]
Entries = Annotated[tuple[Any, ...], Field(max_length=64)]
_MOST_BATCH_PX = 2**26
Phase = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=8, le=4096)], Annotated[int, Field(ge=1, le=65536)]]


class _Section(BaseModel):
    """A part of a study: nothing is converted in silence, nothing unknown is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: object) -> object:
        """An empty section (`search:`) leaves its defaults; YAML's lists are tuples."""
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {str(key): freeze(value) for key, value in values.items()
                if value is not None or str(key) not in fields or fields[str(key)].default is None}


def _check_pixels(patch_px: int, batch_size: int) -> None:
    """A batch beyond any memory is a slip of the keyboard."""
    if batch_size * patch_px**2 > _MOST_BATCH_PX:
        raise ValueError(f"a batch of {batch_size} patches of {patch_px}² px is more than {_MOST_BATCH_PX:,} px")


class DataConfig(_Section):
    """Where images come from. Folders are relative to the study file, or `builtin:` photos."""

    train: str = Field("", description="Folder of training images, clean or with input/ and target/.")
    validation: str = Field("builtin:photos", description="Images that choose: knee, best weights, candidates.")
    report: str = Field("", description="Images that choose nothing, to report on; none when empty.")
    crop_px: int | None = Field(None, ge=8, le=65536, description="Side in px of scored crops; none: whole images.")
    crops_per_image: int = Field(1, ge=1, le=1024, description="Most crops cut from one image, spread over it.")
    limit: int | None = Field(None, ge=1, le=_MANY, description="Take the first images only.")


class TrainConfig(_Section):
    """End-to-end training. The loss is (1 − taught_weight)·L1 to the clean image + taught_weight·L1 to the output of
    `taught_by`; a hybrid is taught by its own teacher unless `taught_by` names another.
    """

    steps: Steps = Field(300_000, description="Optimiser steps.")
    phases: tuple[Phase, ...] = Field(((0, 128, 8),), min_length=1, description=(
        "Progressive training: [first step, patch side in px, batch size] each; the first one starts at 0."))
    lr: Number = Field(3e-4, gt=0, le=1, description="Learning rate of AdamW after warm-up.")
    lr_final: Number = Field(1e-6, ge=0, le=1, description="Learning rate at the end of the cosine.")
    warmup_steps: int = Field(0, ge=0, le=_MANY, description="Steps of linear warm-up.")
    clip_norm: Number = Field(0.1, gt=0, le=1e6, description="Largest norm of the gradient.")
    ema_decay: Number = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights, warmed up.")
    taught_weight: Share = Field(0.0, description="Share of the teacher's output in the loss.")
    taught_by: str = Field("", description="Checkpoint or builtin:NAME that teaches.")

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        starts = [start for start, _, _ in self.phases]
        if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= max(self.steps, 1):
            raise ValueError(f"phases start at step 0 and rise, all before step {self.steps}; got {starts}")
        for _, side, batch in self.phases:
            _check_pixels(side, batch)
        return self


class FinetuneConfig(TrainConfig):
    """Training of the hybrids near the pick; the best weights seen on the validation images are kept."""

    steps: Steps = Field(2000, description="Optimiser steps a candidate.")
    phases: tuple[Phase, ...] = Field(((0, 64, 8),), min_length=1, description=(
        "Progressive training: [first step, patch side in px, batch size] each; the first one starts at 0."))
    lr: Number = Field(5e-4, gt=0, le=1, description="Learning rate of AdamW after warm-up.")
    taught_weight: Share = Field(0.5, description="Share of the teacher's output in the loss.")
    candidates: int = Field(1, ge=1, le=100, description="Hybrids tuned: the pick and those nearest to it.")


class DistillConfig(_Section):
    """Feature-wise distillation of the library."""

    steps: Steps = Field(1000, description="Optimiser steps, each for every surrogate of a group.")
    batch_size: int = Field(8, ge=1, le=65536, description="Patches a step.")
    patch_px: int = Field(64, ge=8, le=4096, description="Side of a patch in px.")
    lr: Number = Field(2e-3, gt=0, le=1, description="Learning rate of AdamW.")
    group_size: int = Field(64, ge=1, le=65536, description="Surrogates in memory at a time.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Type the weights are stored in.")

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        _check_pixels(self.patch_px, self.batch_size)
        return self


class SearchConfig(_Section):
    """What is measured, and who chooses it."""

    engine: str = Field("exact", description="Search engine; `ens info` lists them.")
    objectives: tuple[str, ...] = Field(("psnr_drop_db", "penalty"), description="Two or three, all minimised.")
    budget: int = Field(500, ge=1, le=_MANY, description="Unique genotypes to measure.")
    batch_size: int = Field(1, ge=1, le=65536, description="Genotypes asked for at a time; they share prefixes.")
    require: Literal["", "edge"] = Field("", description="edge: only blocks that edge runtimes run in one piece.")
    patience: int = Field(0, ge=0, le=_MANY, description="End when the front has not grown for so many evaluations.")
    race: bool = Field(False, description="Spare what is dominated with confidence the rest of the images.")
    fix: dict[str, str] = Field({}, max_length=1024, description="Slots that keep a choice: {latent: conv×2}.")
    forbid: tuple[str, ...] = Field((), max_length=64, description="Families that no slot takes: [mambair].")
    max: dict[str, Number] = Field({}, max_length=16, description="Bounds of objectives: {latency_ms: 300}.")


class LatencyConfig(_Section):
    """How `ens run` and `ens profile` time the choices of a study, on `threads` of it."""

    runtime: str = Field("ort", description="ort, openvino, openvino-default, executorch or torch.")
    size: tuple[int, int] = Field((256, 256), description="Height and width of the image in px.")
    repeats: int = Field(3, ge=1, le=1000, description="Times that a file runs in a pass, in turn with others.")
    passes: int = Field(3, ge=1, le=1000, description="Passes over all files; what disturbs one disturbs all.")
    checks: int = Field(20, ge=0, le=1000, description="Random hybrids timed whole, beside their prediction.")


class PenaltyConfig(_Section):
    """Prices of the usage penalty; defaults are those of the ENS paper's figure 3c."""

    teacher: Number = Field(2.0, ge=0, le=1e6, description="Price of a whole transformer stage.")
    per_block: Number = Field(0.1, ge=0, le=1e6, description="Price of one state-space or convolution block.")
    transformers: tuple[str, ...] = Field(("restormer", "uformer"), description=(
        "Families that cost their share of the teacher's stage."))


class StudyConfig(_Section):
    """Everything one YAML file says. Give `choices` (for every slot of the granularity) or `slots` (slot: choices)."""

    name: str = Field(min_length=1, max_length=200, description="Name of the study; the file's without it.")
    task: Options = Field(description="Task with its options: {name: denoise, sigma_255: 25}.")
    network: Options = Field({}, description="Network to train as the teacher: {name: restormer, dim: 48}.")
    teacher: str = Field("", description="Checkpoint or builtin:NAME; empty to train `network`.")
    library: str = Field("", description="Library folder or builtin:NAME; empty to distil one.")
    granularity: Literal["stage", "pair", "block"] = Field("stage", description="What a slot is; pairs are of blocks.")
    choices: Entries = Field((), description="Surrogates offered in every slot: [vssd×1, conv×2].")
    slots: dict[str, Entries] = Field({}, max_length=1024, description="Surrogates by slot: {latent: [vssd×1]}.")
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    search: SearchConfig = SearchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    latency: LatencyConfig = LatencyConfig()
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
    device: str = Field("auto", description="auto, cpu, cuda, or cuda:1.")
    threads: int = Field(0, ge=0, le=1024, description="PyTorch's threads; 0 leaves the default.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.train.taught_by) != bool(self.train.taught_weight):
            raise ValueError("train.taught_by and train.taught_weight go together: give both or neither")
        if self.teacher and self.train.taught_by:
            raise ValueError(f"the teacher is {self.teacher}, so none is trained that {self.train.taught_by} could "
                             "teach")
        if "name" not in self.task:
            raise ValueError("`task` needs a name, for instance {name: denoise, sigma_255: 25}")
        if not (self.teacher or self.library or "name" in self.network):
            raise ValueError("give `teacher`, or `network` with a name, for instance {name: restormer}")
        if bool(self.choices) == bool(self.slots):
            raise ValueError("give either `choices` (for every slot) or `slots` (name: choices), and not both")
        return self


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study, a file or the name of a shipped one; relative folders in it are relative to the file.

    `overrides` replace keys of the file, sections key by key. Raises ConfigError with the file, the key and what is
    allowed.
    """
    path = find_study(str(path))
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, for instance `name: my_study`")
    raw.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        raw[key] = {**(raw.get(key) or {}), **value} if isinstance(value, dict) else value
    try:
        return build_study(raw, folder=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_study(raw: Mapping[str, Any], *, folder: Path) -> StudyConfig:
    """A study from plain values; locations are relative to `folder`. Raises ConfigError with the key."""
    try:
        study = StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    return _resolve_all(study, folder)


_LOCATIONS = ("teacher", "library", "train", "validation", "report", "taught_by")


def _resolve_all(section: Section, folder: Path) -> Section:
    """Make every location of a section and of those inside it absolute."""
    changed: dict[str, Any] = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, _Section):
            changed[key] = _resolve_all(value, folder)
        elif key in _LOCATIONS and isinstance(value, str):
            changed[key] = _resolve(value, folder)
    return section.model_copy(update=changed)


def _resolve(location: str, folder: Path) -> str:
    if not location or location.startswith(BUILTIN):
        return location
    return str((folder / location).resolve()) if not Path(location).is_absolute() else location


def _describe(error: ValidationError) -> str:
    """The first mistake as one sentence: key, what is allowed, what was given."""
    first = error.errors()[0]
    place, kind = first["loc"], first["type"]
    key = ".".join(map(str, place))
    if kind == "extra_forbidden":
        model: Any = StudyConfig
        for part in place[:-1]:
            model = model.model_fields[str(part)].annotation
        near = difflib.get_close_matches(str(place[-1]), model.model_fields, 1, 0.0)[0]
        return f"unknown key {key}; the nearest is {'.'.join(map(str, (*place[:-1], near)))}"
    if kind == "missing" and isinstance(place[-1], int):
        return f"{'.'.join(map(str, place[:-1]))} has more entries than {first['input']!r}"
    if kind == "missing":
        return f"key {key} is missing"
    if kind == "value_error":
        return f"{key}{': ' if key else ''}{first['ctx']['error']}"
    allowed = _WORDS.get(kind, first["msg"].removeprefix("Input should be "))
    return f"{key} is {allowed.format(**first.get('ctx', {}))}, got {first['input']!r:.80}"


_WORDS = {"finite_number": "a finite number", "int_type": "a whole number", "float_type": "a number",
          "model_type": "a section: it holds keys and values", "dict_type": "a section: it holds keys and values",
          "string_type": "text", "tuple_type": "a list", "greater_than_equal": "at least {ge}",
          "greater_than": "more than {gt}", "less_than_equal": "at most {le}", "less_than": "less than {lt}",
          "too_long": "a list of at most {max_length}", "string_too_long": "text of at most {max_length} characters",
          "string_unicode": "text in the encoding of this locale; PYTHONUTF8=1 makes that UTF-8"}


def study_schema() -> str:
    """JSON schema of a study file (draft 2020-12), for editors that complete YAML."""
    schema = StudyConfig.model_json_schema()
    schema["required"] = ["task"]  # the name is the file's where it is not given
    return json.dumps(schema, indent=1)  # escaped: it is printed, in whatever encoding the terminal has


def dump_study(study: StudyConfig) -> str:
    """The study as YAML, every key written out."""
    return yaml.safe_dump(json.loads(study.model_dump_json()), sort_keys=False, allow_unicode=True)


_MAY_CHANGE = ("search.budget", "search.patience", "search.race", "search.fix", "search.forbid", "search.max",
               "latency.", "device", "threads", "finetune.", "data.report")


def check_same_run(before: StudyConfig, now: StudyConfig, out: Path) -> bool:
    """Whether two studies of one run folder differ; raises ConfigError where they do in more than `_MAY_CHANGE`."""
    flat_before, flat_now = flatten(before.model_dump()), flatten(now.model_dump())
    changed = [key for key in sorted({*flat_before, *flat_now}) if flat_before.get(key) != flat_now.get(key)]
    clashes = [f"{key}: {flat_before.get(key)} there, {flat_now.get(key)} now" for key in changed
               if not key.startswith(_MAY_CHANGE)]
    if clashes:
        raise ConfigError(f"{out} holds a run of another configuration ({'; '.join(clashes)}); take another --out")
    return bool(changed)


def shipped_spaces() -> list[Path]:
    """The studies that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return sorted((*package.glob("search_spaces/*.yaml"), *package.parent.glob("search_spaces/*.yaml")))


def find_study(name: str) -> Path:
    """A file, or the name of a shipped study (`demo`, `search_spaces/demo.yaml`); raises ConfigError listing those."""
    given, shipped = Path(name), {path.stem: path for path in shipped_spaces()}
    if given.is_file():
        return given
    if given.parent in (Path(), Path("search_spaces")) and given.suffix in ("", ".yaml") and given.stem in shipped:
        return shipped[given.stem]
    if given.exists():
        return given  # a folder or a pipe: whoever reads it says so
    near = suggest(name, [*shipped, *map(str, given.parent.glob("*.yaml"))])
    raise ConfigError(f"there is no study {name}{near}; give a YAML file or one of {', '.join(shipped)}")


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """`search.budget=40` -> {"search": {"budget": 40}}, locations absolute; ConfigError where key or value lacks."""
    tree: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, for instance search.budget=40, got {change!r}")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None
        *sections, last = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {key}: {section} was set to {branch!r} before")
        # What is typed is relative to where it is typed; what a file says, to the file.
        branch[last] = _resolve(value, Path.cwd()) if last in _LOCATIONS and isinstance(value, str) else value
    return tree


def parse_choices(entries: Sequence[Any]) -> tuple[Choice, ...]:
    """Surrogate choices of a slot: `mambair×2`, or a mapping of family, depth and the block's options."""
    choices = []
    for entry in entries:
        if isinstance(entry, Mapping):
            options = dict(entry)
            if "family" not in options:
                raise ConfigError(f"choice {options} lacks `family`")
            family, depth = str(options.pop("family")), options.pop("depth", 1)
            if type(depth) is not int:
                raise ConfigError(f"choice {dict(entry)}: depth is a whole number, got {depth!r}")
            choices.append(Choice(family, depth, tuple(sorted(options.items()))))
            continue
        try:
            choices.append(parse_choice(str(entry)))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return tuple(choices)
