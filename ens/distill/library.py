"""A library on disk: one safetensors file per slot and choice, the teacher they imitate, and a manifest.

Layout: `manifest.json`, `teacher.safetensors`, `<slot>/<choice>.safetensors`. Every file is written under a temporary
name and renamed, the manifest last, so a library is whole after any crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ens.atomic import write_atomic
from ens.networks import create_network
from ens.networks.checkpoints import hash_weights, load_strictly
from ens.networks.schema import Entries, Options, Sha256, read_entries
from ens.networks.steps import Network, SlotSpec, create_filling
from ens.networks.weight_files import CheckpointError, read_safetensors
from ens.own_code import OwnCodeError
from ens.space import BUILTIN, Choice, SearchSpace, parse_choice

FORMAT = 1
_SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"
_REMEDY = "take a sound copy of the library, or distil it again into another folder"


class LibraryError(ValueError):
    """A library that is missing, broken, or belongs to another teacher."""


class Surrogate(Entries):
    """Manifest entry of one slot and choice.

    `alignment_error` is the squared error on unseen patches relative to the slot's own update, 0 is perfect and 1 as
    good as no update, -1 not a number; `failed` says why training was given up, "" when it was not.
    """

    slot: str
    choice: str
    alignment_error: float = Field(ge=-1)
    params: int = Field(ge=0)
    steps: int = Field(ge=0)
    sha256: Sha256 | Literal[""]
    failed: str = ""

    @property
    def key(self) -> str:
        return f"{self.slot}/{self.choice}"


class EdgeVerdict(Entries):
    """Whether a kind of block is inside the edge operator contract of a runtime; `reason` says why not, "" inside.

    `version` is the runtime's. `outside` counts operators that no delegate takes (ONNX: loops), `relative_error` is the
    largest against PyTorch, -1 where it was not or could not be compared.
    """

    version: str
    reason: str
    delegates: int = Field(0, ge=0)
    outside: dict[str, int] = Field(default_factory=dict)
    relative_error: float = Field(-1.0, ge=-1)


class TeacherEntry(Entries):
    """Manifest entry of the teacher: how it is built, and the hash of its weights after and before rounding."""

    network: str
    options: Options
    sha256: Sha256
    source_sha256: Sha256


class Manifest(Entries):
    """What `manifest.json` holds; surrogates by `slot/choice`, in the order they were stored.

    `edge` holds verdicts by kind of block and runtime, those that somebody has asked for (`search.require`).
    """

    format: int
    task: str
    dtype: Literal["float32", "float16", "bfloat16"]
    teacher: TeacherEntry
    recipe: dict[str, Any]
    surrogates: dict[str, Surrogate]
    edge: dict[str, dict[str, EdgeVerdict]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for key, entry in self.surrogates.items():
            if key != entry.key or bool(entry.sha256) == bool(entry.failed):
                raise ValueError(f"surrogate {key} has the entry {entry.key}, hash {entry.sha256!r}, failed "
                                 f"{entry.failed!r}")
        return self


class Library:
    """Distilled surrogates of one teacher. Made by `create_library` (empty) or `open_library`."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @property
    def teacher_sha256(self) -> str:
        return self.manifest.teacher.sha256

    def imitates(self, teacher: Network) -> bool:
        """Whether this is the teacher of the library, before or after its weights were rounded."""
        return hash_weights(teacher) in (self.teacher_sha256, self.manifest.teacher.source_sha256)

    @property
    def surrogates(self) -> dict[str, Surrogate]:
        """By `slot/choice`, in the order they were stored; failed ones included."""
        return dict(self.manifest.surrogates)

    def hash_of(self, space: SearchSpace) -> str:
        """Identifies the weights a search of this space runs on: the teacher's and every surrogate's."""
        stored = self.surrogates
        used = [stored[f"{slot.name}/{choice.label}"].sha256 for slot in space.slots for choice in slot.choices[1:]]
        return hashlib.sha256(" ".join([self.teacher_sha256, *used]).encode()).hexdigest()

    def has(self, slot: str, choice: Choice) -> bool:
        """Whether this surrogate is done: stored, or marked failed."""
        return f"{slot}/{choice.label}" in self.manifest.surrogates

    def missing(self, slot: str, choice: Choice) -> str:
        """Why a genotype with this choice cannot be built, "" when it can."""
        entry = self.manifest.surrogates.get(f"{slot}/{choice.label}")
        if entry is None:
            return f"{self.root.name} holds no {choice.label} for {slot}"
        return f"{choice.label} of {slot} failed: {entry.failed}" if entry.failed else ""

    def create_skeleton(self) -> Network:
        """The teacher's network without weights, on the meta device: its slots and sizes cost nothing to know."""
        with torch.device("meta"):
            return self._create_teacher()

    def _create_teacher(self) -> Network:
        entry = self.manifest.teacher
        try:
            return create_network(entry.network, **entry.options)
        except OwnCodeError:
            raise
        except ValueError as error:
            raise LibraryError(f"{self.root}: the teacher of its manifest cannot be built ({error})") from None

    def load_teacher(self) -> Network:
        """The teacher, in evaluation mode; raises LibraryError when its weights are not those of the manifest."""
        network = self._create_teacher()
        load_weights(network, self.root / "teacher.safetensors")
        if hash_weights(network) != self.teacher_sha256:
            raise LibraryError(f"{self.root / 'teacher.safetensors'} is not the teacher this library imitates; "
                               f"{_REMEDY}")
        return network.eval()

    def load_surrogate(self, spec: SlotSpec, choice: Choice) -> nn.Sequential:
        """Blocks of a surrogate with their weights, in evaluation mode; raises LibraryError where there are none."""
        reason = self.missing(spec.name, choice)
        if reason:
            raise LibraryError(reason)
        blocks = create_filling(spec, choice)
        path = self._path(spec.name, choice)
        load_weights(blocks, path)
        if hash_weights(blocks) != self.surrogates[f"{spec.name}/{choice.label}"].sha256:
            raise LibraryError(f"{path} does not hold the weights its manifest describes; {_REMEDY}")
        return blocks.eval()

    def store(self, spec: SlotSpec, choice: Choice, blocks: nn.Module, *, alignment_error: float,
              steps: int, failed: str = "") -> None:
        """Add one surrogate; of a failed one only the manifest entry is kept, never its weights."""
        dtype = getattr(torch, self.manifest.dtype)
        if not failed:
            round_weights(blocks, dtype)
            save_weights(blocks, self._path(spec.name, choice), dtype)
        error = alignment_error if math.isfinite(alignment_error) else -1.0
        entry = Surrogate(slot=spec.name, choice=choice.label, alignment_error=error, steps=steps, failed=failed,
                          params=sum(p.numel() for p in blocks.parameters()),
                          sha256="" if failed else hash_weights(blocks))
        self.manifest.surrogates[entry.key] = entry
        self.write_manifest()

    def absorb(self, part: Library) -> None:
        """Take every surrogate of another library of the same teacher, and remove its folder."""
        teacher = part.create_skeleton()
        for entry in part.surrogates.values():
            spec, choice = teacher.slot(entry.slot), parse_choice(entry.choice)
            blocks = create_filling(spec, choice) if entry.failed else part.load_surrogate(spec, choice)
            self.store(spec, choice, blocks, alignment_error=entry.alignment_error, steps=entry.steps,
                       failed=entry.failed)
        shutil.rmtree(part.root)

    def take_parts(self) -> Library:
        """Absorb what processes of a cluster had finished, each in a library beside this one, when their driver was
        killed; parts of another teacher or recipe go. Returns the library itself.
        """
        for manifest in sorted(self.root.parent.glob(f"{self.root.name}.*/manifest.json")):
            part = open_library(manifest.parent)
            if part.teacher_sha256 == self.teacher_sha256 and _same(part.manifest.recipe, self.manifest.recipe):
                self.absorb(part)
            else:
                shutil.rmtree(part.root)
        return self

    def store_verdicts(self, verdicts: Mapping[str, Mapping[str, EdgeVerdict]]) -> None:
        """Keep verdicts on kinds of blocks in the manifest; of a library that ships nothing is written."""
        new = {kind: dict(found) for kind, found in verdicts.items() if kind not in self.manifest.edge and found}
        self.manifest.edge.update(new)
        if new and self.root.parent != _SHIPPED:
            self.write_manifest()

    def write_manifest(self) -> None:
        text = json.dumps(self.manifest.model_dump(), indent=1, ensure_ascii=False)
        write_atomic(self.root / "manifest.json", text.encode())

    def _path(self, slot: str, choice: Choice) -> Path:
        return self.root / slot / f"{choice.file_stem}.safetensors"


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # tuples are lists in a file


def create_library(root: Path, teacher: Network, *, task: str, recipe: Mapping[str, Any],
                   dtype: str = "float32") -> Library:
    """Start an empty library; raises LibraryError for a teacher `create_network` cannot rebuild.

    With `dtype="float16"` the files take half the space and every weight, the teacher's included, is rounded *before*
    anything is measured with it.
    """
    if teacher.recipe is None:
        raise LibraryError("a library needs a teacher built by create_network or load_checkpoint")
    source = hash_weights(teacher)
    round_weights(teacher, getattr(torch, dtype))
    root.mkdir(parents=True, exist_ok=True)
    save_weights(teacher, root / "teacher.safetensors", getattr(torch, dtype))
    name, options = teacher.recipe
    library = Library(root, read_entries(Manifest, {
        "format": FORMAT, "task": task, "dtype": dtype, "recipe": dict(recipe), "surrogates": {}, "teacher": {
            "network": name, "options": options, "sha256": hash_weights(teacher), "source_sha256": source}}))
    library.write_manifest()
    return library


def open_library(path: str | Path) -> Library:
    """Open a library folder, or `builtin:NAME` of those that ship; raises LibraryError saying what is wrong."""
    root = builtin_folder(str(path)) if str(path).startswith(BUILTIN) else Path(path)
    file = root / "manifest.json"
    if not file.is_file():
        raise LibraryError(f"{path} is not a library: it has no manifest.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content.get("format") if isinstance(content, dict) else None
        if type(found) is int and found != FORMAT:
            raise LibraryError(f"{path} has library format {found}; this version reads {FORMAT}")
        return Library(root, read_entries(Manifest, content))
    except LibraryError:
        raise
    except (ValueError, RecursionError) as error:
        raise LibraryError(f"{file} is damaged ({error}); {_REMEDY}") from None


def builtin_folder(name: str) -> Path:
    """Folder of a shipped library; raises LibraryError listing those that ship."""
    names = sorted(folder.name for folder in _SHIPPED.iterdir() if (folder / "manifest.json").exists())
    if name.removeprefix(BUILTIN) not in names:
        raise LibraryError(f"{name} does not ship; there is {', '.join(BUILTIN + known for known in names) or 'none'}")
    return _SHIPPED / name.removeprefix(BUILTIN)


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Write the weights of a module as safetensors of this type; whole numbers (counts, indices) stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: _round(value, dtype).contiguous() for name, value in module.state_dict().items()}
    write_atomic(path, safetensors.torch.save(state))


def load_weights(module: nn.Module, path: Path) -> None:
    """Load strictly, into the module's own float32; raises LibraryError naming the file and the reason."""
    try:
        _, state = read_safetensors(path)
        load_strictly(path, module, {name: _round(value, torch.float32) for name, value in state.items()})
    except CheckpointError as error:
        raise LibraryError(f"{error}; {_REMEDY}") from None


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every weight representable in `dtype`, in place."""
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(_round(value, dtype))


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
