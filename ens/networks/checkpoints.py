"""Weights on disk: released checkpoints recognised by their keys, own checkpoints, and the hash of weights.

Nothing here can run code from a file: pickles are read with `weights_only=True`, and there is no way around it.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ens.atomic import write_atomic
from ens.networks import create_network, dvmsr, mambacsr, mambair_unet, plksr, restormer
from ens.networks.steps import Network

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
CHECKPOINT_FORMAT = "ens checkpoint 1"
_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "netG.", "net.")


@dataclass(frozen=True)
class Sniffer:
    """`markers` are keys that only this network has together; `infer` turns its state into constructor options."""

    markers: tuple[str, ...]
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]]


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
}

# Networks people try by mistake, by a piece of a key: only for the wording of an error.
_STRANGERS = {
    "relative_position_bias_table": "SwinIR or another windowed transformer",
    "middle_blks.": "NAFNet",
    "rdb1.conv1": "ESRGAN (RRDBNet)",
    "A_log": "a Mamba network",
    "stage1_encoder": "MPRNet",
}


class CheckpointError(ValueError):
    """A file that does not hold usable weights; the message names the file and says what it is."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def load_checkpoint(path: str | Path) -> Network:
    """Open a released or own checkpoint (.safetensors, .pth, .pt, .ckpt) as the network it belongs to, in eval mode.

    The network and its sizes are inferred from the keys; every key must fit. Raises CheckpointError saying what the
    file is instead.
    """
    path = Path(path)
    metadata = read_metadata(path)
    state = read_state(path)
    if metadata.get("format") == CHECKPOINT_FORMAT:
        name, options = metadata["network"], json.loads(metadata["options"])
    elif "format" in metadata and metadata["format"].startswith("ens "):
        raise CheckpointError(path, f"is an {metadata['format']!r} file, not a checkpoint; open it with open_network")
    else:
        name, options = sniff_network(path, state)
    network = create_network(name, **options)
    load_strictly(path, network, state)
    return network.eval()


def sniff_network(path: str | Path, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and constructor options of the network these weights belong to; raises CheckpointError."""
    for name, sniffer in SNIFFERS.items():
        if all(marker in state for marker in sniffer.markers):
            try:
                return name, sniffer.infer(state)
            except (KeyError, ValueError) as error:
                raise CheckpointError(path, f"looks like {name}, but its sizes do not fit together ({error})") from None
    guess = next((stranger for piece, stranger in _STRANGERS.items() if any(piece in key for key in state)), "")
    nearest = max(SNIFFERS, key=lambda name: sum(marker in state for marker in SNIFFERS[name].markers))
    missing = [marker for marker in SNIFFERS[nearest].markers if marker not in state]
    raise CheckpointError(path, f"holds another network{f' (probably {guess})' if guess else ''}; known: "
                                f"{', '.join(SNIFFERS)}. As {nearest} it has missing keys: {_first_ten(missing)}; "
                                f"unexpected keys: {_first_ten(state)}")


def load_strictly(path: str | Path, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """load_state_dict where every key and shape must fit; raises CheckpointError listing the first ten that do not."""
    own = network.state_dict()
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}" for key, value in state.items()
              if key in own and own[key].shape != value.shape]
    if missing or unexpected or shapes:
        parts = (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes))
        raise CheckpointError(path, "does not fit the network: " + "; ".join(
            f"{title}: {_first_ten(keys)}" for title, keys in parts if keys))
    network.load_state_dict(state)


def _first_ten(keys: Iterable[str]) -> str:
    names = list(keys)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Weights of a checkpoint file by key: wrapper dictionaries opened (EMA first), prefixes stripped.

    Raises CheckpointError for anything that is not a file of weights.
    """
    path = Path(path)
    _check_suffix(path)
    reject_impostors(path)
    state = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _unwrap(path, _read_pickle(path))
    for _ in _PREFIXES:
        for prefix in _PREFIXES:
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(path, f"has the suffix {path.suffix!r}; checkpoints have one of {', '.join(SUFFIXES)}")


def reject_impostors(path: Path) -> None:
    """Raise CheckpointError for what is no file, empty, a git-lfs pointer or a web page, whatever its suffix."""
    if not path.is_file():
        raise CheckpointError(path, "does not exist" if not path.exists() else "is not a file")
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if not head:
        raise CheckpointError(path, "is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(path, "is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    if head[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise CheckpointError(path, "is a web page, not weights; the link led to a page, fetch the file itself")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(path, f"is truncated, or is not a safetensors file ({error})") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file, {} for other checkpoints; raises CheckpointError for a damaged one."""
    path = Path(path)
    _check_suffix(path)
    reject_impostors(path)
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(path, f"is truncated, or is not a safetensors file ({error})") from None


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            raise CheckpointError(path, "is truncated (its archive has no end); download or copy it again") from None
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError(path, "is a TorchScript program, not weights; use the state_dict it was made from")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise CheckpointError(path, "is truncated; download or copy it again") from None
        raise CheckpointError(path, "holds Python objects beside weights, or is no checkpoint at all; it is not opened "
                                    "because that could run code. Ask for weights alone, best as safetensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(path, f"is truncated or damaged ({reason})") from None


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                return _unwrap(path, content[wrapper])
        state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if state:
            return state
        raise CheckpointError(path, f"holds no weights; its entries: {_first_ten(map(str, content))}")
    raise CheckpointError(path, f"holds a {type(content).__name__}, not a dictionary of weights")


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
