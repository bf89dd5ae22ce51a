"""Open any file that holds a network and restore images with it: tensors, files, folders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ens.data.images import (
    ImageError,
    Photo,
    Pixels,
    check_writable,
    list_images,
    list_skipped,
    name_output,
    read_photo,
    show_name,
    to_float,
    to_pixels,
    write_photo,
)
from ens.export.failures import first_line, translating
from ens.export.formats import FORMATS, ExportError, open_file
from ens.export.hybrid import open_network, read_facts
from ens.export.statistics import Restore, Share, share_in_torch
from ens.networks.steps import Network, pad_to_size
from ens.networks.weight_files import reject_impostors
from ens.runtime.tiling import Tiles, fit_tiles, restore_padded, restore_tiled, restore_within_memory
from ens.shortage import is_memory_error
from ens.space import BUILTIN


class SessionError(ValueError):
    """A file that cannot be opened for restoring; the message names the file and the reason."""


_STRIP_PX = 64
"""Rows that are rounded to integers at a time."""


@dataclass(frozen=True)
class Session:
    """An opened network. `run` maps (1, channels, H, W) in [0, 1], H and W multiples of `size_multiple`, to
    (1, channels, H·upscale, W·upscale); `facts` is what the file says of itself. `release` gives back the memory
    that the runtime keeps from one run to the next.
    """

    run: Restore
    size_multiple: int
    upscale: int
    channels: int
    facts: dict[str, str]
    release: Callable[[], None] = lambda: None
    largest_px: int | None = None
    """Side of the largest square that `run` takes, where the file's size is fixed; larger images go in tiles."""
    tiles: Tiles | None = None
    """What `restore` cuts larger images into; None: in one piece, where the file's size allows that."""
    share: Share | None = None
    """Gives all tiles of an image the same statistics of the map; None: each has its own."""

    def restore(self, image: Tensor) -> Tensor:
        """(B, channels, H, W) float32 in [0, 1], any H and W -> (B, channels, H·upscale, W·upscale)."""
        with translating():
            return torch.cat([self._restore(part) for part in image.split(1)])

    def _restore(self, image: Tensor) -> Tensor:
        tiles = self.tiles or self.fit(None, None)
        if tiles and max(image.shape[-2:]) > tiles.tile_px:
            return restore_tiled(self.run, image, tile_px=tiles.tile_px, overlap_px=tiles.overlap_px,
                                 size_multiple=self.size_multiple, upscale=self.upscale, share=self.share)
        return restore_padded(self.run, image, size_multiple=self.size_multiple, upscale=self.upscale)

    def tiled(self, tile_px: int | None, overlap_px: int | None) -> Session:
        """A session whose `restore` works in the tiles that `ens restore --tile` works in; raises as `fit` does."""
        return replace(self, tiles=None if tile_px is None else self.fit(tile_px, overlap_px))

    def fit(self, tile_px: int | None, overlap_px: int | None) -> Tiles | None:
        """The tiles to work in, None for an image in one piece; raises ValueError for tiles that cannot be."""
        side = tile_px or self.largest_px
        if side is None:
            return None
        tiles = fit_tiles(side, overlap_px=overlap_px, size_multiple=self.size_multiple)
        if self.largest_px and tiles.tile_px > self.largest_px:
            raise ValueError(f"the file takes images of up to {self.largest_px} px; tiles of {tiles.tile_px} px that "
                             f"overlap by {tiles.overlap_px} px are larger")
        return tiles


def open_session(path: str | Path, *, threads: int | None = None, runtime: str = "",
                 create: Callable[[], Network] | None = None) -> Session:
    """Open an exported file in its runtime (or in `runtime`, one of RUNTIMES), or a hybrid, checkpoint or
    `builtin:NAME` in PyTorch (CPU); weights that do not describe their network as the one that `create` makes.

    `threads` limits the runtime's threads (PyTorch's, for the whole process). Raises SessionError for a file of
    another kind and CheckpointError for one that is absent, damaged or something else under a false name.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if str(path).startswith(BUILTIN):
        session = _open_weights(path, threads, runtime, create)
    else:
        path = Path(path)
        opener = _OPENERS.get(path.suffix.lower())
        if opener is None:
            raise SessionError(f"{path}: cannot be opened; the suffix is one of {', '.join(_OPENERS)}")
        session = opener(path, threads, runtime, create)
    # OpenMP ends the process where memory is too short for a thread: PyTorch's are started while there is some.
    torch.zeros(2**20).add_(1)
    return session


def _open_exported(path: Path, threads: int | None, runtime: str, create: object) -> Session:
    reject_impostors(path)
    try:
        with translating():
            opened = open_file(path, threads, runtime=runtime)
    except ExportError as error:  # the runtime is at fault, not the file
        raise SessionError(f"{path}: {error}") from None
    except FileNotFoundError as error:
        raise SessionError(f"{path}: {error}") from None
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever it is, it is in the file
        raise SessionError(f"{path}: is damaged or is not an {path.suffix} file ({first_line(error)})") from None
    facts = dict(opened.metadata)
    try:
        size_multiple, upscale, channels = (int(facts.pop(key)) for key in ("size_multiple", "upscale", "channels"))
        size = (int(facts.pop("height")), int(facts.pop("width"))) if "height" in facts else None
    except (KeyError, ValueError) as error:
        raise SessionError(f"{path}: was not exported by ens (no {error} in its metadata)") from None
    if size is None:
        return Session(opened.run, size_multiple, upscale, channels, facts, opened.release, share=opened.share)
    return Session(_fill_up(opened.run, size, upscale), size_multiple, upscale, channels, facts, opened.release,
                   largest_px=min(size))


def _fill_up(run: Restore, size: tuple[int, int], upscale: int) -> Restore:
    """`run`, which takes images of one size, for those that are no larger."""
    def restore(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if height > size[0] or width > size[1]:
            raise ValueError(f"the file takes images of up to {size[0]}x{size[1]}, not {height}x{width}")
        return run(pad_to_size(image, size))[..., :height * upscale, :width * upscale]
    return restore


def _open_weights(path: Path | str, threads: int | None, runtime: str, create: Callable[[], Network] | None) -> Session:
    if runtime not in ("", "torch"):
        raise SessionError(f"{path}: holds weights, which PyTorch runs; `ens export` makes files for {runtime}")
    network = open_network(path, create)
    if threads is not None:
        torch.set_num_threads(threads)

    def run(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return network.restore(image)

    return Session(run, network.size_multiple, network.upscale, network.in_channels,
                   {} if str(path).startswith(BUILTIN) else read_facts(path),
                   share=share_in_torch(run, network.size_multiple, network.in_channels))


_OPENERS: dict[str, Callable[[Path, int | None, str, Callable[[], Network] | None], Session]] = {
    **dict.fromkeys(FORMATS, _open_exported),
    **dict.fromkeys((".safetensors", ".pth", ".pt", ".ckpt"), _open_weights)}


def restore_photo(session: Session, photo: Photo, *, tile_px: int | None = None, overlap_px: int | None = None,
                  on_event: Callable[[str], None] | None = None) -> Photo:
    """Restore at the photo's own bit depth, in one piece or in tiles (`fit_tiles`). A colour network gets a gray photo
    as three equal channels, a gray network each colour alone; gray comes back gray. Alpha is carried over (resized
    where the network upscales), and so are the metadata.

    Beside the pixels of the photo and of the result, memory is taken for one row of tiles. Raises ValueError for a
    network that takes neither one nor three channels, MemoryError where the smallest tile is too much.
    """
    tiles = session.fit(tile_px, overlap_px)
    return _restore(session, photo, tiles, on_event or (lambda line: None))


def _restore(session: Session, photo: Photo, tiles: Tiles | None, say: Callable[[str], None],
             on_part: Callable[[float], None] = lambda part: None) -> Photo:
    if session.channels not in (1, 3):
        raise ValueError(f"the network takes {session.channels} channels; photos have 1 or 3")
    (height, width, channels), dtype = photo.pixels.shape, photo.pixels.dtype
    restored = np.empty((height * session.upscale, width * session.upscale, channels), dtype)

    def read(rows: Tensor, columns: Tensor) -> Tensor:
        pixels = photo.pixels[np.ix_(rows.numpy(), columns.numpy())]
        return torch.from_numpy(np.ascontiguousarray(to_float(pixels).transpose(2, 0, 1)))[None]

    def write(top: int, rows: Tensor) -> None:
        if channels == 1:
            rows = rows.mean(1, keepdim=True)
        for first in range(0, rows.shape[-2], _STRIP_PX):
            strip = to_pixels(rows[0, :, first:first + _STRIP_PX].numpy().transpose(1, 2, 0), dtype.type)
            restored[top + first:top + first + len(strip)] = strip
        if (done := top + rows.shape[-2]) < len(restored):
            on_part(done / len(restored))

    planes = _Planes(gray=session.channels == 1, count=channels if session.channels == 1 else 1)
    restore_within_memory(planes.restore([session.run] * planes.count), read, write, height=height, width=width,
                          tiles=tiles, size_multiple=session.size_multiple, upscale=session.upscale,
                          share=session.share and planes.share(session.share), release=session.release, on_event=say)
    return replace(photo, pixels=restored, alpha=_carry_alpha(photo, session.upscale))


@dataclass(frozen=True)
class _Planes:
    """What a network takes of a photo at a time: `count` colours alone (`gray`), or three channels at once."""

    gray: bool
    count: int

    def split(self, image: Tensor) -> Sequence[Tensor]:
        """(1, C, H, W) -> `count` images of 1 or of 3 channels."""
        return image.split(1, 1) if self.gray else (image.expand(-1, 3, -1, -1),)

    def restore(self, runs: Sequence[Restore]) -> Restore:
        """Restore each plane by its own of `runs`."""
        return lambda image: torch.cat([run(plane) for run, plane in zip(runs, self.split(image), strict=True)], 1)

    def share(self, share: Share) -> Share:
        """`share` of each plane alone."""
        return lambda tiles: self.restore([share(_OnePlane(tiles, self, index)) for index in range(self.count)])


@dataclass(frozen=True)
class _OnePlane:
    """The same plane of every tile."""

    tiles: Iterable[Tensor]
    planes: _Planes
    index: int

    def __iter__(self) -> Iterator[Tensor]:
        return (self.planes.split(tile)[self.index] for tile in self.tiles)


def _carry_alpha(photo: Photo, upscale: int) -> Pixels | None:
    if photo.alpha is None or upscale == 1:
        return photo.alpha
    return np.asarray(cv2.resize(photo.alpha, None, fx=upscale, fy=upscale, interpolation=cv2.INTER_CUBIC),
                      photo.alpha.dtype)


def restore_files(session: Session, source: str | Path, target: str | Path, *, tile_px: int | None = None,
                  overlap_px: int | None = None, on_event: Callable[[str], None] | None = None,
                  on_progress: Callable[[int, int, str], None] | None = None) -> list[ImageError]:
    """Restore an image file, or every image of a folder into another under the same names; return the failures.

    A failed image leaves no output and the rest go on. `on_event` gets a line for what is passed over, not kept or
    done otherwise than asked, `on_progress` (done, total, name, in tiles with what is done of it). Raises ValueError
    for tiles that cannot be or when a source would be overwritten, FileNotFoundError or ValueError for a folder that is
    absent or without images, OSError where the disk is full.
    """
    source, target, say = Path(source), Path(target), on_event or (lambda line: None)
    paths = list_images(source) if source.is_dir() else [source]
    _check_target(source, target, paths)
    tiles = session.fit(tile_px, overlap_px)
    if tiles is not None and tile_px and tiles.tile_px > tile_px:
        say(f"tiles of {tiles.tile_px} px instead of {tile_px}: they start at multiples of {tiles.size_multiple} px "
            f"and overlap by {tiles.overlap_px}")
    if source.is_dir() and (skipped := list_skipped(source)):
        say(f"restore: passed over {', '.join(skipped)}")
    into_folder = source.is_dir() or target.is_dir()
    (target if into_folder else target.parent).mkdir(parents=True, exist_ok=True)
    show, failures = on_progress or (lambda done, total, note: None), []
    for index, path in enumerate(paths):
        try:
            _restore_file(session, path, target / name_output(path) if into_folder else target, tiles, say,
                          functools.partial(_show_part, show, index, len(paths), path.name))
        except (ImageError, MemoryError, RuntimeError, ValueError) as error:
            failures.append(_name_failure(path, error))
        show(index + 1, len(paths), path.name)
    return failures


def _show_part(show: Callable[[int, int, str], None], done: int, total: int, name: str, part: float) -> None:
    show(done, total, f"{name}, {part:.0%}")


def _check_target(source: Path, target: Path, paths: list[Path]) -> None:
    if source.is_dir() and target.is_file():
        raise ValueError(f"{source} is a folder, so the target is one too; {target} is a file")
    if target.resolve() in (source.resolve(), paths[0].parent.resolve()):
        raise ValueError(f"{source} would be overwritten; give another target than {target}")


def _restore_file(session: Session, path: Path, target: Path, tiles: Tiles | None, say: Callable[[str], None],
                  on_part: Callable[[float], None]) -> None:
    photo = read_photo(path)
    check_writable(target, photo, upscale=session.upscale)
    # Frees the pixels that were read before the new ones are encoded.
    photo = _restore(session, photo, tiles, say, on_part)
    if lost := (*photo.metadata.lost, *write_photo(target, photo)):
        say(f"{show_name(path.name)}: not kept: {', '.join(lost)}")


def _name_failure(path: Path, error: Exception) -> ImageError:
    if is_memory_error(error):
        return ImageError(path, f"memory ran out ({first_line(error)})")
    return error if isinstance(error, ImageError) else ImageError(path, str(error))
