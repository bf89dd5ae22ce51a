"""A hybrid as a plain network, and as one safetensors file that says how to rebuild it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from ens.atomic import write_atomic
from ens.distill.library import open_library
from ens.export.card import read_card
from ens.networks.checkpoints import (
    check_hash,
    describe_recipe,
    encode_tensors,
    load_checkpoint,
    load_strictly,
    rebuild_network,
)
from ens.networks.schema import HybridRecipe
from ens.networks.steps import Network, create_filling
from ens.networks.weight_files import CheckpointError, read_metadata, read_safetensors
from ens.space import BUILTIN, Choice, Genotype, format_genotype

HYBRID_FORMAT = "ens hybrid 1"
_DESCRIPTION = ("format", "network", "options", "slots", "weights_sha256")


def build_hybrid(teacher: Network, fillings: Mapping[str, nn.Module]) -> Network:
    """Copy the teacher and put a copy of each filling into its slot (stage or block, by name); eval mode.

    Raises KeyError for a slot the teacher lacks and ValueError when a stage and one of its blocks are both filled.
    """
    for name in fillings:
        if name.rpartition(".")[0] in fillings:
            raise ValueError(f"slot {name!r} lies inside {name.rpartition('.')[0]!r}; fill one of them")
    hybrid = copy.deepcopy(teacher)
    for name, filling in fillings.items():
        hybrid.fill(name, copy.deepcopy(filling))
    return hybrid.eval()


def save_hybrid(path: str | Path, network: Network, *, choices: Mapping[str, Choice],
                facts: Mapping[str, str]) -> None:
    """Write weights, sizes and the choices of the replaced slots to one safetensors file, which appears whole.

    `choices` names the replaced slots only. `facts` (task, protocol, teacher hash, genotype, figures …) are kept as
    they are. Raises ValueError for weights that are not finite or facts that clash with the description.
    """
    slots = {name: {"family": choice.family, "depth": choice.depth, "options": dict(choice.options)}
             for name, choice in choices.items()}
    metadata = describe_recipe(network, HYBRID_FORMAT, {"slots": json.dumps(slots)})
    taken = sorted(set(facts) & set(metadata))
    if taken:
        raise ValueError(f"facts may not be called {', '.join(taken)}; these names describe the network")
    write_atomic(path, encode_tensors(network.state_dict(), {**metadata, **facts}))


def load_hybrid(path: str | Path) -> Network:
    """Open a hybrid file in eval mode; every key, shape and value must be the stored one. Raises CheckpointError."""
    metadata = read_metadata(path)
    if metadata.get("format") != HYBRID_FORMAT:
        raise CheckpointError(path, f"is no hybrid file (format {metadata.get('format', 'unknown')!r}, "
                                    f"expected {HYBRID_FORMAT!r})")
    recipe, network = rebuild_network(path, HybridRecipe, metadata)
    try:
        for name, filling in recipe.slots.items():
            network.fill(name, create_filling(network.slot(name), filling.choice))
    except (KeyError, ValueError) as error:
        raise CheckpointError(path, f"describes a network that cannot be built ({error.args[0]})") from None
    _, state = read_safetensors(Path(path))
    load_strictly(path, network, state)
    check_hash(path, recipe, state)
    return network.eval()


class HybridFiles:
    """Where the hybrids of a run are: `finetune/GENOTYPE-RECIPE.safetensors`, `export/GENOTYPE.onnx` and others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tuned(self, genotype: Genotype, recipe: str) -> Path:
        """The hybrid fine-tuned by a recipe (its key)."""
        return self.folder / "finetune" / f"{format_genotype(genotype)}-{recipe}.safetensors"

    def list_tuned(self) -> list[Path]:
        """Every fine-tuned hybrid, by name."""
        return sorted((self.folder / "finetune").glob("*.safetensors"))

    def exported(self, genotype: Genotype, suffix: str = ".onnx", size: tuple[int, int] | None = None) -> Path:
        """The exported file of a format; one of a fixed size (height, width) has it in its name."""
        fixed = f"-{size[0]}x{size[1]}" if size else ""
        return self.folder / "export" / f"{format_genotype(genotype)}{fixed}{suffix}"

    def weights(self, genotype: Genotype) -> Path:
        """The exported weights as safetensors, written after every other file."""
        return self.exported(genotype, ".safetensors")

    def is_exported(self, genotype: Genotype, tuned: Path | None) -> bool:
        """Whether the exported ONNX file holds these fine-tuned weights."""
        model = self.exported(genotype)
        return (tuned is not None and model.exists() and self.weights(genotype).exists()
                and read_facts(tuned).items() <= read_card(model).items())


def read_facts(path: str | Path) -> dict[str, str]:
    """Facts stored beside the weights by `save_hybrid` or `save_checkpoint`, without the network's description."""
    return {key: value for key, value in sorted(read_metadata(path).items()) if key not in _DESCRIPTION}


def open_network(path: str | Path, create: Callable[[], Network] | None = None) -> Network:
    """Open a hybrid file, a checkpoint (released or own), or `builtin:NAME` for a shipped teacher; a checkpoint that
    does not describe its network as the one that `create` makes, where it is given.

    Raises CheckpointError, or LibraryError for a teacher that does not ship.
    """
    if str(path).startswith(BUILTIN):
        return open_library(str(path)).load_teacher()
    if read_metadata(path).get("format", "").startswith("ens hybrid"):
        return load_hybrid(path)
    return load_checkpoint(path, create)
