"""A library on disk: one safetensors file per slot and choice, the teacher they imitate, and a manifest.

Layout: `manifest.json`, `teacher.safetensors`, `<slot>/<choice>.safetensors`. Every file is written under a temporary
name and renamed, the manifest last, so a library is whole after any crash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ens.atomic import write_atomic
from ens.networks import create_network
from ens.networks.checkpoints import hash_weights
from ens.networks.steps import Network, SlotSpec, create_filling
from ens.space import BUILTIN, Choice, SearchSpace

FORMAT = 1


class LibraryError(ValueError):
    """A library that is missing, broken, or belongs to another teacher."""


@dataclass(frozen=True)
class Surrogate:
    """Manifest entry of one slot and choice.

    `alignment_error` is the squared error on unseen patches relative to the slot's own update, 0 is perfect and 1 as
    good as no update; `failed` says why training was given up, "" when it was not.
    """

    slot: str
    choice: str
    alignment_error: float
    params: int
    steps: int
    sha256: str
    failed: str = ""

    @property
    def key(self) -> str:
        return f"{self.slot}/{self.choice}"


class Library:
    """Distilled surrogates of one teacher. Made by `create_library` (empty) or `open_library`."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest

    @property
    def teacher_sha256(self) -> str:
        return str(self.manifest["teacher"]["sha256"])

    def imitates(self, teacher: Network) -> bool:
        """Whether this is the teacher of the library, before or after its weights were rounded."""
        return hash_weights(teacher) in (self.teacher_sha256, self.manifest["teacher"]["source_sha256"])

    @property
    def surrogates(self) -> dict[str, Surrogate]:
        """By `slot/choice`, in the order they were stored; failed ones included."""
        names = [field.name for field in fields(Surrogate)]  # version 0.1 wrote multiply-adds, too
        return {key: Surrogate(**{name: entry[name] for name in names if name in entry})
                for key, entry in self.manifest["surrogates"].items()}

    def hash_of(self, space: SearchSpace) -> str:
        """Identifies the weights a search of this space runs on: the teacher's and every surrogate's."""
        stored = self.surrogates
        used = [stored[f"{slot.name}/{choice.label}"].sha256 for slot in space.slots for choice in slot.choices[1:]]
        return hashlib.sha256(" ".join([self.teacher_sha256, *used]).encode()).hexdigest()

    def has(self, slot: str, choice: Choice) -> bool:
        """Whether this surrogate is done: stored, or marked failed."""
        return f"{slot}/{choice.label}" in self.manifest["surrogates"]

    def missing(self, slot: str, choice: Choice) -> str:
        """Why a genotype with this choice cannot be built, "" when it can."""
        entry = self.surrogates.get(f"{slot}/{choice.label}")
        if entry is None:
            return f"{self.root.name} holds no {choice.label} for {slot}"
        return f"{choice.label} of {slot} failed: {entry.failed}" if entry.failed else ""

    def create_skeleton(self) -> Network:
        """The teacher's network without weights, on the meta device: its slots and sizes cost nothing to know."""
        entry = self.manifest["teacher"]
        with torch.device("meta"):
            return create_network(entry["network"], **entry["options"])

    def load_teacher(self) -> Network:
        """The teacher, in evaluation mode; raises LibraryError when its weights are not those of the manifest."""
        entry = self.manifest["teacher"]
        network = create_network(entry["network"], **entry["options"])
        load_weights(network, self.root / "teacher.safetensors")
        if hash_weights(network) != entry["sha256"]:
            raise LibraryError(f"{self.root / 'teacher.safetensors'} is not the teacher this library imitates")
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
            raise LibraryError(f"{path} does not hold the weights its manifest describes")
        return blocks.eval()

    def store(self, spec: SlotSpec, choice: Choice, blocks: nn.Module, *, alignment_error: float,
              steps: int, failed: str = "") -> None:
        """Add one surrogate; of a failed one only the manifest entry is kept, never its weights."""
        dtype = getattr(torch, self.manifest["dtype"])
        if not failed:
            round_weights(blocks, dtype)
            save_weights(blocks, self._path(spec.name, choice), dtype)
        error = alignment_error if math.isfinite(alignment_error) else -1.0
        entry = Surrogate(spec.name, choice.label, error, sum(p.numel() for p in blocks.parameters()),
                          steps, "" if failed else hash_weights(blocks), failed)
        self.manifest["surrogates"][entry.key] = asdict(entry)
        self.write_manifest()

    def write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False)
        write_atomic(self.root / "manifest.json", text.encode())

    def _path(self, slot: str, choice: Choice) -> Path:
        return self.root / slot / f"{choice.file_stem}.safetensors"


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
    library = Library(root, {"format": FORMAT, "task": task, "dtype": dtype,
                             "teacher": {"network": name, "options": options, "sha256": hash_weights(teacher),
                                         "source_sha256": source}, "recipe": dict(recipe), "surrogates": {}})
    library.write_manifest()
    return library


def open_library(path: str | Path) -> Library:
    """Open a library folder, or `builtin:NAME` of those that ship; raises LibraryError saying what is wrong."""
    root = builtin_folder(str(path)) if str(path).startswith(BUILTIN) else Path(path)
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LibraryError(f"{path} is not a library: it has no manifest.json") from None
    except ValueError as error:
        raise LibraryError(f"{root / 'manifest.json'} is damaged: {error}") from None
    if manifest.get("format") != FORMAT:
        raise LibraryError(f"{path} has library format {manifest.get('format')}; this version reads {FORMAT}")
    return Library(root, manifest)


def builtin_folder(name: str) -> Path:
    """Folder of a shipped library; raises LibraryError listing those that ship."""
    shipped = Path(__file__).resolve().parents[1] / "pretrained"
    names = sorted(folder.name for folder in shipped.iterdir() if (folder / "manifest.json").exists())
    if name.removeprefix(BUILTIN) not in names:
        raise LibraryError(f"{name} does not ship; there is {', '.join(BUILTIN + known for known in names) or 'none'}")
    return shipped / name.removeprefix(BUILTIN)


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Write the weights of a module as safetensors of this type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(dtype).contiguous() for name, value in module.state_dict().items()}
    write_atomic(path, safetensors.torch.save(state))


def load_weights(module: nn.Module, path: Path) -> None:
    """Load strictly, into the module's own float32; raises LibraryError naming the file and the reason."""
    try:
        state: dict[str, Tensor] = safetensors.torch.load_file(path)
        module.load_state_dict({name: value.float() for name, value in state.items()})
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise LibraryError(f"{path} cannot be read: {reason}") from None


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every weight representable in `dtype`, in place."""
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(value.to(dtype))
