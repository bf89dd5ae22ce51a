"""Files of weights: safetensors and pickles read for what they are, whatever their name; impostors named.

Nothing here can run code from a file: pickles are read with `weights_only=True`, and there is no way around it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
_LONGEST_HEADER = 100_000_000
"""Bytes; what the safetensors format allows."""
Read = TypeVar("Read")


class CheckpointError(ValueError):
    """A file that does not hold usable weights; the message names the file and says what it is."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def read_weight_file(path: Path) -> tuple[dict[str, str], object]:
    """Metadata and content of a checkpoint: by what the file is, whatever it is called; raises CheckpointError."""
    _check_suffix(path)
    reject_impostors(path)
    return read_safetensors(path) if _is_safetensors(path) else ({}, _read_pickle(path))


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


def _is_safetensors(path: Path) -> bool:
    """By the first bytes, since people rename; by the suffix where these say nothing.

    They are the length of a header that opens with a brace. One length in 32 begins like a pickle, but no pickle is the
    number of a length that is allowed.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return True
    return path.suffix.lower() == ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80"))


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; raises CheckpointError for a damaged one."""
    def read(file: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
        return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in list(file.keys())}

    reject_impostors(path)
    return _open_safetensors(path, read)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file, {} for other checkpoints; raises CheckpointError for a damaged one."""
    path = Path(path)
    _check_suffix(path)
    reject_impostors(path)
    return _open_safetensors(path, lambda file: dict(file.metadata() or {})) if _is_safetensors(path) else {}


def _open_safetensors(path: Path, read: Callable[[Any], Read]) -> Read:
    try:
        with safe_open(path, "pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"is truncated, or is not a safetensors file ({error}); download or copy it "
                                    "again") from None


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception as error:  # besides BadZipFile whatever damaged names and sizes make of it
            raise CheckpointError(path, f"is truncated or damaged ({error}); download or copy it again") from None
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError(path, "is a TorchScript program, not weights; use the state_dict it was made from")
    try:
        with path.open("rb") as file:  # given a path, torch goes by the suffix again
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise CheckpointError(path, "is truncated; download or copy it again") from None
        raise CheckpointError(path, "holds Python objects beside weights, or is no checkpoint at all; it is not opened "
                                    "because that could run code. Ask for weights alone, best as safetensors") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes may spell any instruction of the format, and fail in any way
        reason = str(error).split("\n")[0]
        raise CheckpointError(path, f"is truncated or damaged ({reason}); download or copy it again") from None
