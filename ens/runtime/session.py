"""Open any file that holds a network and restore images with it: tensors, files, folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ens.data.degradations import resize_bicubic
from ens.data.images import (
    ImageError,
    Photo,
    Pixels,
    list_images,
    read_photo,
    to_float,
    to_pixels,
    write_photo,
)
from ens.export.formats import FORMATS
from ens.export.hybrid import open_network, read_facts
from ens.networks.weight_files import reject_impostors
from ens.runtime.tiling import Restore, restore_padded, restore_within_memory
from ens.space import BUILTIN


class SessionError(ValueError):
    """A file that cannot be opened for restoring; the message names the file and the reason."""


@dataclass(frozen=True)
class Session:
    """An opened network. `run` maps (1, channels, H, W) in [0, 1], H and W multiples of `size_multiple`, to
    (1, channels, H·upscale, W·upscale); `facts` is what the file says of itself.
    """

    run: Restore
    size_multiple: int
    upscale: int
    channels: int
    facts: dict[str, str]

    def restore(self, image: Tensor) -> Tensor:
        """(B, channels, H, W) float32 in [0, 1], any H and W -> (B, channels, H·upscale, W·upscale)."""
        parts = [restore_padded(self.run, part, size_multiple=self.size_multiple, upscale=self.upscale)
                 for part in image.split(1)]
        return torch.cat(parts)


def open_session(path: str | Path, *, threads: int | None = None) -> Session:
    """Open an exported file in its runtime, or a hybrid, checkpoint or `builtin:NAME` in PyTorch (CPU).

    `threads` limits the runtime's threads (PyTorch's, for the whole process). Raises SessionError for a file of
    another kind and CheckpointError for one that is absent, damaged or something else under a false name.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if str(path).startswith(BUILTIN):
        return _open_weights(path, threads)
    path = Path(path)
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise SessionError(f"{path}: cannot be opened; the suffix is one of {', '.join(_OPENERS)}")
    return opener(path, threads)


def _open_exported(path: Path, threads: int | None) -> Session:
    reject_impostors(path)
    try:
        opened = FORMATS[path.suffix.lower()].open(path, threads)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise SessionError(f"{path}: {error}") from None
    except Exception as error:  # runtimes' errors share no public class
        reason = str(error).split("\n")[0]
        raise SessionError(f"{path}: is damaged or is not an {path.suffix} file ({reason})") from None
    facts = dict(opened.metadata)
    try:
        size_multiple, upscale, channels = (int(facts.pop(key)) for key in ("size_multiple", "upscale", "channels"))
    except (KeyError, ValueError) as error:
        raise SessionError(f"{path}: was not exported by ens (no {error} in its metadata)") from None
    return Session(opened.run, size_multiple, upscale, channels, facts)


def _open_weights(path: Path | str, threads: int | None) -> Session:
    network = open_network(path)
    if threads is not None:
        torch.set_num_threads(threads)

    def run(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return network.restore(image)

    return Session(run, network.size_multiple, network.upscale, network.in_channels,
                   {} if str(path).startswith(BUILTIN) else read_facts(path))


_OPENERS: dict[str, Callable[[Path, int | None], Session]] = {
    **dict.fromkeys(FORMATS, _open_exported),
    **dict.fromkeys((".safetensors", ".pth", ".pt", ".ckpt"), _open_weights)}


def restore_photo(session: Session, photo: Photo, *, tile_px: int | None = None, overlap_px: int = 32,
                  on_event: Callable[[str], None] | None = None) -> Photo:
    """Restore at the photo's own bit depth. A colour network gets a gray photo as three equal channels, a gray
    network each colour alone; gray comes back gray. Alpha is carried over (resized where the network upscales).

    Raises ValueError for a network that takes neither one nor three channels.
    """
    if session.channels not in (1, 3):
        raise ValueError(f"the network takes {session.channels} channels; photos have 1 or 3")
    image = torch.from_numpy(np.ascontiguousarray(to_float(photo.pixels).transpose(2, 0, 1)))
    channels = image.shape[0]
    batch = image[:, None] if session.channels == 1 else image.expand(3, -1, -1)[None]
    parts = [restore_within_memory(session.run, part, tile_px=tile_px, overlap_px=overlap_px, on_event=on_event,
                                   size_multiple=session.size_multiple, upscale=session.upscale)
             for part in batch.split(1)]
    restored = torch.cat(parts).flatten(0, 1)
    if channels == 1:
        restored = restored.mean(0, keepdim=True)
    pixels = to_pixels(restored.numpy().transpose(1, 2, 0), photo.pixels.dtype.type)
    return Photo(pixels, _carry_alpha(photo, session.upscale))


def _carry_alpha(photo: Photo, upscale: int) -> Pixels | None:
    if photo.alpha is None or upscale == 1:
        return photo.alpha
    height, width = photo.alpha.shape
    resized = resize_bicubic(to_float(photo.alpha)[..., None], height=height * upscale, width=width * upscale)
    return to_pixels(resized, photo.alpha.dtype.type)[..., 0]


def restore_files(session: Session, source: str | Path, target: str | Path, *, tile_px: int | None = None,
                  overlap_px: int = 32, on_event: Callable[[str], None] | None = None,
                  on_progress: Callable[[int, int, str], None] | None = None) -> list[ImageError]:
    """Restore an image file, or every image of a folder into another under the same names; return the failures.

    A failed image leaves no output and the rest go on. `on_progress` gets (done, total, name). Raises ValueError when
    a source would be overwritten, FileNotFoundError or ValueError for a folder that is absent or without images.
    """
    source, target = Path(source), Path(target)
    paths = list_images(source) if source.is_dir() else [source]
    if source.is_dir() and target.is_file():
        raise ValueError(f"{source} is a folder, so the target is one too; {target} is a file")
    if target.resolve() in (source.resolve(), paths[0].parent.resolve()):
        raise ValueError(f"{source} would be overwritten; give another target than {target}")
    into_folder = source.is_dir() or target.is_dir()
    (target if into_folder else target.parent).mkdir(parents=True, exist_ok=True)
    failures = []
    for index, path in enumerate(paths):
        try:
            photo = restore_photo(session, read_photo(path), tile_px=tile_px, overlap_px=overlap_px, on_event=on_event)
            write_photo(target / path.name if into_folder else target, photo)
        except ImageError as error:
            failures.append(error)
        except (MemoryError, RuntimeError, ValueError) as error:
            failures.append(ImageError(path, str(error)))
        if on_progress is not None:
            on_progress(index + 1, len(paths), path.name)
    return failures
