"""Weights on disk: released checkpoints recognised by their keys, own checkpoints, and the hash of weights."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ens.atomic import write_atomic
from ens.networks import create_network, dat, dvmsr, mambacsr, mambair_unet, plksr, restormer
from ens.networks.schema import Recipe, read_entries
from ens.networks.steps import Network
from ens.networks.weight_files import CheckpointError, read_weight_file
from ens.own_code import OwnCodeError

CHECKPOINT_FORMAT = "ens checkpoint 1"
_AVERAGED = ("params_ema", "ema", "model_ema", "state_dict_ema", "ema_model")
_WRAPPERS = (*_AVERAGED, "params", "state_dict", "model_state_dict", "model", "net")
# What frameworks put in front of a network's own keys: DataParallel and AveragedModel, torch.compile, Lightning, GANs.
_PREFIXES = {"module", "_orig_mod", "model", "network", "net", "netG", "generator", *_AVERAGED}
_log = logging.getLogger(__name__)
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass(frozen=True)
class Sniffer:
    """`markers` are keys that only this network has together; `infer` turns its state into constructor options.

    `derived` are last parts of keys whose values the network computes from its options and does not store.
    """

    markers: tuple[str, ...]
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    derived: tuple[str, ...] = ()


# To add a network: write `infer_options(state)` in the network's own file and add one row here. Markers of different
# networks must not all occur in one file; a KeyError or ValueError of `infer` means that the file does not fit.
SNIFFERS: dict[str, Sniffer] = {
    "restormer": Sniffer(("patch_embed.proj.weight", "encoder_level1.0.attn.temperature", "latent.0.ffn.dwconv.weight",
                          "refinement.0.attn.qkv.weight"), restormer.infer_options),
    "mambair_unet": Sniffer(("patch_embed.proj.weight", "encoder_level1.0.self_attention.A_logs",
                             "latent.0.conv_blk.cab.0.weight", "refinement.0.skip_scale2"), mambair_unet.infer_options),
    "plksr": Sniffer(("feats.0.weight", "feats.1.channe_mixer.0.weight", "feats.1.lk.conv.weight",
                      "feats.1.refine.weight"), plksr.infer_options),
    "dvmsr": Sniffer(("conv_first.weight", "layers.0.residual_group.blocks.0.mixer.A_log", "norm_f.weight",
                      "upsample.0.weight"), dvmsr.infer_options),
    "mambacsr": Sniffer(("conv_first.weight", "layers.0.residual_group.blocks.0.self_attention.x_proj_weight",
                         "layers.0.residual_group.blocks.0.conv_block.cab.0.weight", "conv_last.weight"),
                        mambacsr.infer_options),
    "dat": Sniffer(("conv_first.weight", "before_RG.1.weight", "layers.0.blocks.0.attn.attns.0.pos.pos_proj.weight",
                    "layers.0.blocks.0.ffn.sg.conv.weight"), dat.infer_options,
                   ("relative_position_index", "attn_mask_0", "attn_mask_1")),
}

# Networks people try by mistake, by a piece of a key: only for the wording of an error.
_STRANGERS = {
    "relative_position_bias_table": "SwinIR or another windowed transformer",
    "middle_blks.": "NAFNet",
    "rdb1.conv1": "ESRGAN (RRDBNet)",
    "A_log": "a Mamba network",
    "stage1_encoder": "MPRNet",
}


def load_checkpoint(path: str | Path, create: Callable[[], Network] | None = None) -> Network:
    """Open a released or own checkpoint (.safetensors, .pth, .pt, .ckpt) as the network it belongs to, in eval mode.

    The network and its sizes are inferred from the keys; every key must fit. A file that does not describe its network
    is opened as the one of a user's that `create` makes, where it is given. Where a file holds more than one set of
    weights, averaged ones are taken, and a line of the log says which were. Raises CheckpointError saying what the
    file is instead.
    """
    path = Path(path)
    metadata, content = read_weight_file(path)
    keys: dict[str, str] = {}
    if metadata.get("format") == CHECKPOINT_FORMAT:
        recipe, network = rebuild_network(path, Recipe, metadata)
        weights = WeightSet("", "", dict(_tensors(content)))
        check_hash(path, recipe, weights.state)
    elif metadata.get("format", "").startswith("ens "):
        raise CheckpointError(path, f"is an {metadata['format']!r} file, not a checkpoint; open it with open_network")
    elif create is not None:
        network = create()
        keys = network.released_keys()
        weights = _find_own(path, content, keys)
    else:
        name, weights = find_weights(path, content)
        network = create_network(name, **_infer(path, name, weights.state))
    lost = [row for row in (f"{spec.module}.{spec.depth}" for spec in network.slots) if row in weights.modules]
    if lost:
        raise CheckpointError(path, f"lacks the weights of {_first_ten(lost)}, which the network it was saved from had")
    load_strictly(path, network, weights.state, keys)
    return network.eval()


def rebuild_network(path: str | Path, schema: type[AnyRecipe], metadata: Mapping[str, str]) -> tuple[
        AnyRecipe, Network]:
    """What the metadata of an own file say, and the network they describe, without its weights.

    Raises CheckpointError, or OwnCodeError where the network is a user's and their code is not there.
    """
    try:
        recipe = read_entries(schema, metadata)
    except ValueError as error:
        raise CheckpointError(path, f"is damaged: its metadata are wrong ({error}); take a sound copy") from None
    try:
        return recipe, create_network(recipe.network, **recipe.options)
    except OwnCodeError:  # the user's command is at fault, or their code, not the file
        raise
    except ValueError as error:
        raise CheckpointError(path, f"describes a network that cannot be built ({error})") from None


def check_hash(path: str | Path, recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where these are not the weights the file was written with."""
    if hash_weights(state) != recipe.weights_sha256:
        raise CheckpointError(path, "holds weights other than those that were written (the hash differs); it is "
                                    "damaged, take a sound copy")


@dataclass(frozen=True)
class WeightSet:
    """Weights found in a file: the dictionary `place` they lie in, and the `prefix` their keys had there.

    `modules` are the submodules of the network they were saved from, where the file tells.
    """

    place: str
    prefix: str
    state: dict[str, Tensor]
    modules: frozenset[str] = frozenset()


def find_weights(path: str | Path, content: object) -> tuple[str, WeightSet]:
    """The name of the network whose weights a file holds, and the weights; raises CheckpointError."""
    sets = _check_sets(path, content)
    for weights in sets:
        for name, sniffer in SNIFFERS.items():
            prefixes = _find_prefixes(weights.state, sniffer.markers)
            if prefixes:
                return name, _take(path, sets, weights, prefixes[0], sniffer.derived)
    raise CheckpointError(path, _describe_stranger(sets[0].state))


def _find_own(path: str | Path, content: object, keys: Mapping[str, str]) -> WeightSet:
    """The weights that have these keys; those nearest to them where none do. Raises CheckpointError."""
    sets = _check_sets(path, content)
    for weights in sets:
        if prefixes := _find_prefixes(weights.state, tuple(keys)):
            return _take(path, sets, weights, prefixes[0], ())
    return max(sets, key=lambda weights: len(weights.state.keys() & keys.keys()))


def _check_sets(path: str | Path, content: object) -> list[WeightSet]:
    """The dictionaries of weights in a file, the one to prefer first; raises CheckpointError where there is none."""
    sets = list(_list_sets(content))
    if not sets:
        raise CheckpointError(path, f"holds a {type(content).__name__}, not a dictionary of weights"
                              if not isinstance(content, Mapping) else
                              f"holds no weights; its entries: {_first_ten(map(str, content))}")
    return sets


def _tensors(content: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        yield from ((key, item) for key, item in content.items() if isinstance(key, str) and isinstance(item, Tensor))


def _list_sets(content: object, place: str = "", depth: int = 3) -> Iterator[WeightSet]:
    """Every dictionary of tensors in a file, the ones to prefer first; those without any tensor are left out."""
    if not isinstance(content, Mapping) or not depth:
        return
    names = [name for name in content if isinstance(name, str)]
    for name in sorted(names, key=lambda name: _WRAPPERS.index(name) if name in _WRAPPERS else len(_WRAPPERS)):
        yield from _list_sets(content[name], f"{place}.{name}" if place else name, depth - 1)
    state = dict(_tensors(content))
    if state:
        modules = getattr(content, "_metadata", {})  # torch's own, kept beside a state_dict
        yield WeightSet(place, "", state, frozenset(map(str, modules)))


def _find_prefixes(state: Mapping[str, Tensor], markers: Sequence[str]) -> list[str]:
    """What stands in front of every marker of a network: "" or a few of `_PREFIXES`, averaged weights first."""
    first = markers[0]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    usual = [prefix for prefix in prefixes if set(prefix.split(".")[:-1]) <= _PREFIXES and prefix[-1:] in ("", ".")]
    fitting = [prefix for prefix in usual if all(prefix + marker in state for marker in markers)]
    return sorted(fitting, key=lambda prefix: not any(part in _AVERAGED for part in prefix.split(".")))


def _take(path: str | Path, sets: list[WeightSet], weights: WeightSet, prefix: str,
          derived: tuple[str, ...]) -> WeightSet:
    """The weights under a prefix less the derived ones; logs which they are where the file holds anything else."""
    def own(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.startswith(prefix)]

    state = {key.removeprefix(prefix): weights.state[key] for key in own(weights.state)
             if key.rpartition(".")[2] not in derived}
    others = [other.place or "the file itself" for other in sets if other is not weights and len(other.state) > 1]
    beside = [key for key in weights.state if not key.startswith(prefix)]
    left = [*others, *([f"{len(beside)} keys such as {beside[0]}"] if beside else [])]
    if left:
        where = ".".join(filter(None, (weights.place, prefix.rstrip(".")))) or "its top level"
        _log.warning("%s: the weights under %s are taken; left out: %s", path, where, ", ".join(left))
    return WeightSet(weights.place, prefix, state, frozenset(name.removeprefix(prefix) for name in
                                                             own(weights.modules)))


def _infer(path: str | Path, name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        return SNIFFERS[name].infer(state)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(path, f"looks like {name}, but its sizes do not fit together ({error})") from None


def _describe_stranger(state: Mapping[str, Tensor]) -> str:
    guess = next((stranger for piece, stranger in _STRANGERS.items() if any(piece in key for key in state)), "")
    nearest = max(SNIFFERS, key=lambda name: sum(marker in state for marker in SNIFFERS[name].markers))
    missing = [marker for marker in SNIFFERS[nearest].markers if marker not in state]
    return (f"holds another network{f' (probably {guess})' if guess else ''}; known: {', '.join(SNIFFERS)}. As "
            f"{nearest} it has missing keys: {_first_ten(missing)}; unexpected keys: {_first_ten(state)}. The "
            "weights of a network of your own open as the `teacher` of a study that names its class, `network: {name: "
            "my_network:build}`, with --import my_network.py; `ens evaluate` takes them with --network "
            "my_network.py:build")


def load_strictly(path: str | Path, network: nn.Module, state: Mapping[str, Tensor],
                  keys: Mapping[str, str] = MappingProxyType({})) -> None:
    """load_state_dict where every key and shape must fit; raises CheckpointError listing the first ten that do not.

    `keys` are those of `state` that the network has other names for.
    """
    own = network.state_dict()
    own = {key: own[keys[key]] for key in keys} if keys else own
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}" for key, value in state.items()
              if key in own and own[key].shape != value.shape]
    types = [f"{key} {value.dtype}" for key, value in state.items() if key in own and not _is_plain(value, own[key])]
    parts = (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes),
             ("other types", types))
    if any(keys for _, keys in parts):
        raise CheckpointError(path, "does not fit the network: " + "; ".join(
            f"{title}: {_first_ten(keys)}" for title, keys in parts if keys))
    network.load_state_dict({keys.get(key, key): value for key, value in state.items()})


def _is_plain(value: Tensor, own: Tensor) -> bool:
    """Whether values can be copied as they are: whole numbers would be taken for weights, sparse ones not at all."""
    return (value.layout == torch.strided and not value.is_quantized and not value.is_meta
            and value.is_floating_point() == own.is_floating_point() and not value.is_complex())


def _first_ten(keys: Iterable[str]) -> str:
    names = list(keys)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more


def hash_weights(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names in sorted order, dtypes, shapes and bytes: equal exactly when the weights are."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: str | Path, network: Network, *, facts: Mapping[str, str] | None = None) -> None:
    """Write weights and recipe as .safetensors, or as {'params': …} where the suffix is .pth; the file appears whole.

    `facts` become metadata of the safetensors file. Raises ValueError for weights that are not finite, for a network
    that `create_network` has not built, and for another suffix.
    """
    path = Path(path)
    if path.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save({"params": _finite(network.state_dict())}, buffer)
        data = buffer.getvalue()
    elif path.suffix == ".safetensors":
        data = encode_tensors(network.state_dict(), describe_recipe(network, CHECKPOINT_FORMAT, facts))
    else:
        raise ValueError(f"a checkpoint ends in .safetensors or .pth, got {path.name}")
    write_atomic(path, data)


def describe_recipe(network: Network, file_format: str, facts: Mapping[str, str] | None) -> dict[str, str]:
    """Metadata of a file that says how to rebuild its network; raises ValueError where that is unknown."""
    if network.recipe is None:
        raise ValueError("the network was not built by create_network, so a file could not say how to rebuild it")
    name, options = network.recipe
    own = {"format": file_format, "network": name, "options": json.dumps(options), "weights_sha256":
           hash_weights(network)}
    taken = sorted(set(own) & set(facts or {}))
    if taken:
        raise ValueError(f"facts may not be called {', '.join(taken)}; these names describe the network")
    return {**own, **(facts or {})}


def _finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinity; such weights are never stored")
    return dict(tensors)


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file. Raises ValueError for values not finite."""
    contiguous = {name: value.detach().cpu().contiguous() for name, value in _finite(tensors).items()}
    return bytes(safetensors.torch.save(contiguous, dict(metadata)))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Keep the state of an unfinished training (tensors, numbers, text, containers of them); it appears whole."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: Path, *, device: str = "cpu") -> dict[str, Any] | None:
    """What `save_state` kept, None where there is nothing."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def remove_state(path: Path) -> None:
    """Forget a finished training."""
    path.unlink(missing_ok=True)
