"""FORMATS: suffix -> how a network is written and opened. A file appears only after its own runtime has reproduced it.

To add one: a file with a writer and an opener, a row in `FORMATS`, and a test.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ens.atomic import atomic_path
from ens.blocks.rep import fold_blocks
from ens.export.failures import first_line, raise_shortage
from ens.export.statistics import Restore, Share, share_in_torch
from ens.export.torch_export import Size
from ens.networks.steps import Network, pad_to_multiple, pad_to_size

_LARGEST_PHOTO_PX = 512
_ROUNDING = 1e-5
"""Relative error that nobody asks float64 about."""


class ExportError(RuntimeError):
    """A network that cannot be exported, or an exported file that does not reproduce it."""


class MissingRuntime(ExportError):
    """A runtime that is not installed; the message says how to."""


class TracingError(ExportError):
    """A network that the exporter of a format cannot take: its code is to blame, whatever its weights."""


class ParityError(ExportError):
    """A file that runs and does not reproduce its network: the one failure that weights may be to blame for."""


@dataclass(frozen=True)
class OpenedFile:
    """`run` maps (1, channels, H, W), sides multiples of the size multiple, as `Network.restore` does; `metadata` is
    what `write_checked` put in. `release` gives back the memory that the runtime keeps from one run to the next.
    """

    run: Restore
    metadata: dict[str, str]
    release: Callable[[], None] = lambda: None
    share: Share | None = None
    """Gives the tiles of an image the same statistics; None where they are out of reach."""


@dataclass(frozen=True)
class Format:
    """`write(network, path, metadata, size, on_event)` for images of one size or, None, of any, and
    `open(path, threads)` in the format's own runtime. `default_size` is the size of a format whose sides are never
    free; `snippet` the Python that makes `restored` of `image` with that runtime alone.
    """

    name: str
    write: Callable[[Network, Path, Mapping[str, str], Size | None, Callable[[str], None]], None]
    open: Callable[[Path, int | None], OpenedFile]
    snippet: str
    default_size: Size | None = None


def _write_onnx(network: Network, path: Path, metadata: Mapping[str, str], size: Size | None,
                on_event: Callable[[str], None]) -> None:
    from ens.export.onnx import write_onnx  # brings onnxscript, a second

    write_onnx(network, path, metadata, size, on_event)


def _open_onnx(path: Path, threads: int | None) -> OpenedFile:
    from ens.export.onnx_runtime import open_graph, open_onnx, release_onnx, run_onnx
    from ens.export.onnx_statistics import share_in_graph

    session, metadata = open_onnx(path, threads)

    def run(image: Tensor) -> Tensor:
        return run_onnx(session, image)

    return OpenedFile(run, metadata, lambda: release_onnx(session),
                      share_in_graph(path, run, lambda data: open_graph(data, threads)))


def _open_openvino(path: Path, threads: int | None, *, exact: bool = True) -> OpenedFile:
    with needing("openvino"):
        from ens.export import openvino
    from ens.export.onnx_runtime import open_graph
    from ens.export.onnx_statistics import share_in_graph

    model, metadata = openvino.open_openvino(path, threads, exact=exact)

    def run(image: Tensor) -> Tensor:
        return openvino.run_openvino(model, image)

    return OpenedFile(run, metadata, share=share_in_graph(
        path, run, lambda data: open_graph(data, threads),
        lambda data: openvino.open_graph(data, threads, exact=exact)))


def _write_program(network: Network, path: Path, metadata: Mapping[str, str], size: Size | None,
                   on_event: Callable[[str], None]) -> None:
    from ens.export.torch_export import write_program

    write_program(network, path, metadata, size)


def _open_program(path: Path, threads: int | None) -> OpenedFile:
    from ens.export.torch_export import open_program, run_program

    module, metadata = open_program(path, threads)

    def run(image: Tensor) -> Tensor:
        return run_program(module, image)

    def share(tiles: Iterable[Tensor]) -> Restore:
        return share_in_torch(run, int(metadata["size_multiple"]), int(metadata["channels"]))(tiles)

    return OpenedFile(run, metadata, share=share)


def _write_executorch(network: Network, path: Path, metadata: Mapping[str, str], size: Size | None,
                      on_event: Callable[[str], None]) -> None:
    with needing("executorch"):
        from ens.export.executorch import write_executorch

    assert size is not None  # by `default_size`
    write_executorch(network, path, metadata, size)


def _open_executorch(path: Path, threads: int | None) -> OpenedFile:
    with needing("executorch"):
        from ens.export.executorch import open_executorch

    return OpenedFile(*open_executorch(path, threads))


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Around the import of an optional runtime: MissingRuntime where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingRuntime(f"this needs {extra}, which is not installed: pip install 'ens[{extra}]'") from error


FORMATS: dict[str, Format] = {
    ".onnx": Format("ens onnx 1", _write_onnx, _open_onnx, (
        'import onnxruntime\nrestored = onnxruntime.InferenceSession("{model}").run(None, {{"image": image}})[0]')),
    ".pt2": Format("ens pt2 1", _write_program, _open_program, (
        'import torch\nrestored = torch.export.load("{model}").module()(torch.from_numpy(image)).detach()')),
    ".pte": Format("ens pte 1", _write_executorch, _open_executorch, (
        'import torch, executorch.runtime\nprogram = executorch.runtime.Runtime.get().load_program("{model}")\n'
        'restored = program.load_method("forward").execute([torch.from_numpy(image)])[0]'), default_size=(256, 256)),
}
RUNTIMES: dict[str, tuple[str, Callable[[Path, int | None], OpenedFile]]] = {
    "ort": (".onnx", _open_onnx),
    "openvino": (".onnx", _open_openvino),
    "openvino-default": (".onnx", functools.partial(_open_openvino, exact=False)),  # the device's own precision
    "torch": (".pt2", _open_program),
    "executorch": (".pte", _open_executorch),
}
"""Runtime -> the suffix of the files it runs, and how it opens one (path, threads)."""


def find_format(suffix: str) -> Format:
    """The format of a suffix; raises ExportError with those there are."""
    if suffix not in FORMATS:
        raise ExportError(f"the suffix of an exported file is one of {', '.join(FORMATS)}, not {suffix!r}")
    return FORMATS[suffix]


def open_file(path: Path, threads: int | None = None, *, runtime: str = "") -> OpenedFile:
    """Open an exported file in a runtime, its format's own unless named; raises what the runtime raises, and
    ExportError for a runtime there is not or that does not run such files.
    """
    if not runtime:
        return find_format(path.suffix.lower()).open(path, threads)
    if runtime not in RUNTIMES:
        raise ExportError(f"no runtime {runtime!r}; allowed: {', '.join(RUNTIMES)}")
    suffix, opener = RUNTIMES[runtime]
    if path.suffix.lower() != suffix:
        raise ExportError(f"{runtime} runs {suffix} files, not {path.name}")
    return opener(path, threads)


def check_size(network: Network, suffix: str, size: Size | None) -> Size | None:
    """The size a file gets: as given, the format's own, or None for free sides; raises ExportError for none."""
    multiple = network.size_multiple
    if size is None and (own := FORMATS[suffix].default_size):
        size = own[0] // multiple * multiple, own[1] // multiple * multiple
    if size and (min(size) < 1 or any(side % multiple for side in size)):
        raise ExportError(f"the sides of images for this network are multiples of {multiple}, not "
                          f"{size[0]}x{size[1]}")
    return size


def write_checked(network: Network, path: str | Path, *, photo: Tensor, tolerance: float = 1e-4,
                  facts: Mapping[str, str] | None = None, size: Size | None = None,
                  runtimes: Sequence[str] = (), on_event: Callable[[str], None] | None = None) -> float:
    """Write the network in the format of the suffix; return the largest relative error ‖a−b‖/‖b‖ that was seen.

    The file takes images of `size` (height, width) or, None, of any, where the format can. Every one of `runtimes`, the
    format's own by default, opens it and must reproduce PyTorch on images of noise of three sizes (or of that one), on
    black, white, constant and half-black ones, and on `photo` (1, C, H, W), a real degraded image. Metadata are
    `describe_network` and `facts`. `on_event` gets a line a step. Raises ExportError, leaving no file, when the
    network cannot be exported or run, ParityError when the error exceeds `tolerance`; MemoryError or OSError where
    memory or disk ran out, whatever an exporter or runtime has made of it.
    """
    path, say = Path(path), on_event or (lambda line: None)
    kind, network = find_format(path.suffix), network.cpu().eval()
    size = check_size(network, path.suffix, size)
    if photo.ndim != 4 or photo.shape[:2] != (1, network.in_channels):
        raise ValueError(f"the photo is (1, {network.in_channels}, H, W), got {tuple(photo.shape)}")
    metadata = {"format": kind.name, **describe_network(network, size)}
    taken = sorted(set(metadata) & set(facts or {}))
    if taken:
        raise ValueError(f"facts may not be called {', '.join(taken)}; these names describe the file")
    with atomic_path(path) as temporary:
        say("export: tracing the network; each kind of block takes a few seconds")
        with _translated(f"the network cannot be exported to {path.suffix}", TracingError):
            kind.write(fold_blocks(network), temporary, {**metadata, **(facts or {})}, size, say)
        say("export: comparing the file with PyTorch")
        with _translated("the exported file does not run"):
            openers = [RUNTIMES[name][1] for name in runtimes] or [kind.open]
            opened = [opener(temporary, None).run for opener in openers]
            error = measure_parity(network, *opened, photo=photo, size=size)
        if not error <= tolerance:
            raise ParityError(f"{path.name}: its runtime differs from PyTorch by {error:.1e} relative, more than "
                              f"{tolerance:.0e}; the file was not kept")
    return error


def describe_network(network: Network, size: Size | None = None) -> dict[str, str]:
    """What a file says of its input and output, a size only where it is fixed."""
    known = {"size_multiple": network.size_multiple, "upscale": network.upscale, "channels": network.in_channels}
    fixed = dict(zip(("height", "width"), size, strict=True)) if size else {}
    return {key: str(value) for key, value in {**known, **fixed}.items()}


@contextmanager
def _translated(what: str, kind: type[ExportError] = ExportError) -> Iterator[None]:
    """Exporters' and runtimes' errors, which share no public class, as a `kind`; shortages as what they are."""
    try:
        yield
    except (MemoryError, OSError, ExportError):
        raise
    except Exception as failure:
        raise_shortage(failure)
        raise kind(f"{what}: {first_line(failure.__cause__ or failure)}") from failure


def measure_parity(network: Network, *runs: Callable[[Tensor], Tensor], photo: Tensor,
                   size: Size | None = None) -> float:
    """Largest relative error ‖a−b‖/‖b‖ of `runs` against `network.restore`, NaN where one is; ExportError for shapes.

    Beyond twice PyTorch's own error, its distance from float64: where a norm divides almost nothing by almost nothing,
    on a border of a black area, two right results may differ by more than any tolerance.
    """
    errors = []
    for image in parity_images(network, photo, size):
        with torch.no_grad():
            expected = network.restore(image)
        errors += [_compare(network, image, expected, run(image)) for run in runs]
    return float(torch.stack(errors).max())


def _compare(network: Network, image: Tensor, expected: Tensor, got: Tensor) -> Tensor:
    if got.shape != expected.shape:
        raise ExportError(f"the exported file gives {tuple(got.shape)} for {tuple(image.shape)}, the network "
                          f"{tuple(expected.shape)}")
    # An output of nothing but zeros has no relative error: one least significant bit of 16 is the scale then.
    scale = expected.norm().clamp_min(expected.numel() ** 0.5 / 65535)
    error = (got - expected).norm() / scale
    if error > _ROUNDING:
        error = (error - 2 * _own_error(network, image, expected) / scale).clamp_min(0)
    return error


def _own_error(network: Network, image: Tensor, expected: Tensor) -> Tensor:
    """‖network in float32 − in float64‖; 0 for a network that does not run in float64."""
    try:
        with torch.no_grad():
            exact = copy.deepcopy(network).double().restore(image.double())
    except RuntimeError as failure:  # somebody's own network may make float32 tensors inside
        raise_shortage(failure)
        return torch.zeros(())
    return (expected - exact).norm().float()


def parity_images(network: Network, photo: Tensor, size: Size | None = None) -> list[Tensor]:
    """What an exported file is compared on: noise of three sizes, black, white, constant, half-black, and the photo;
    all of one `size` where the file's is fixed.
    """
    generator, multiple = torch.Generator().manual_seed(0), network.size_multiple
    sizes = [size] if size else [(max(multiple, height // multiple * multiple), max(multiple, width // multiple *
                                  multiple)) for height, width in ((64, 64), (48, 88), (8, 16))]
    images = [torch.rand(1, network.in_channels, height, width, generator=generator) for height, width in sizes]
    flat = [torch.full_like(images[len(images) // 2], value) for value in (0.0, 1.0, 0.5)]
    half = images[len(images) // 2].clone()
    half[..., : half.shape[-1] // 2] = 0
    height, width = size or (_LARGEST_PHOTO_PX, _LARGEST_PHOTO_PX)
    part = photo[..., :height, :width].float()
    return [*images, *flat, half, pad_to_size(part, size) if size else pad_to_multiple(part, multiple)]
