"""FORMATS: suffix -> how a network is written and opened. A file appears only after its own runtime has reproduced it.

To add one: a file with a writer and an opener, a row in `FORMATS`, and a test.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ens.atomic import atomic_path, write_atomic
from ens.export.failures import first_line, raise_shortage
from ens.networks.steps import Network, pad_to_multiple

_LARGEST_PHOTO_PX = 512
_ROUNDING = 1e-5
"""Relative error that nobody asks float64 about."""


class ExportError(RuntimeError):
    """A network that cannot be exported, or an exported file that does not reproduce it."""


class ParityError(ExportError):
    """A file that runs and does not reproduce its network: the one failure that weights may be to blame for."""


@dataclass(frozen=True)
class OpenedFile:
    """`run` maps (1, channels, H, W), sides multiples of the size multiple, as `Network.restore` does; `metadata` is
    what `write_checked` put in. `release` gives back the memory that the runtime keeps from one run to the next.
    """

    run: Callable[[Tensor], Tensor]
    metadata: dict[str, str]
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Format:
    """`write(network, path, metadata, on_event)`, and `open(path, threads)` in the format's own runtime."""

    name: str
    write: Callable[[Network, Path, Mapping[str, str], Callable[[str], None]], None]
    open: Callable[[Path, int | None], OpenedFile]


def _write_onnx(network: Network, path: Path, metadata: Mapping[str, str], on_event: Callable[[str], None]) -> None:
    from ens.export.onnx import write_onnx  # brings onnxscript, a second

    write_onnx(network, path, metadata, on_event)


def _open_onnx(path: Path, threads: int | None) -> OpenedFile:
    from ens.export.onnx import open_onnx, release_onnx, run_onnx

    session, metadata = open_onnx(path, threads)
    return OpenedFile(lambda image: run_onnx(session, image), metadata, lambda: release_onnx(session))


FORMATS: dict[str, Format] = {
    ".onnx": Format("ens onnx 1", _write_onnx, _open_onnx),
}


def write_checked(network: Network, path: str | Path, *, photo: Tensor, tolerance: float = 1e-4,
                  facts: Mapping[str, str] | None = None, on_event: Callable[[str], None] | None = None) -> float:
    """Write the network in the format of the suffix; return the largest relative error ‖a−b‖/‖b‖ that was seen.

    The format's runtime opens the file and must reproduce PyTorch on images of noise of three sizes, on black, white,
    constant and half-black ones, and on `photo` (1, C, H, W), a real degraded image. Metadata are `size_multiple`,
    `upscale`, `channels` and `facts`. `on_event` gets a line a step. Raises ExportError, leaving no file, when the
    network cannot be exported or run, ParityError when the error exceeds `tolerance`; MemoryError or OSError where
    memory or disk ran out, whatever an exporter or runtime has made of it.
    """
    path, say = Path(path), on_event or (lambda line: None)
    if path.suffix not in FORMATS:
        raise ExportError(f"{path}: the suffix of an exported file is one of {', '.join(FORMATS)}")
    kind, network = FORMATS[path.suffix], network.cpu().eval()
    if photo.ndim != 4 or photo.shape[:2] != (1, network.in_channels):
        raise ValueError(f"the photo is (1, {network.in_channels}, H, W), got {tuple(photo.shape)}")
    metadata = {"format": kind.name, "size_multiple": str(network.size_multiple), "upscale": str(network.upscale),
                "channels": str(network.in_channels)}
    taken = sorted(set(metadata) & set(facts or {}))
    if taken:
        raise ValueError(f"facts may not be called {', '.join(taken)}; these names describe the file")
    with atomic_path(path) as temporary:
        say("export: tracing the network; each kind of block takes a few seconds")
        with _translated(f"the network cannot be exported to {path.suffix}"):
            kind.write(network, temporary, {**metadata, **(facts or {})}, say)
        say("export: comparing the file with PyTorch")
        with _translated("the exported file does not run"):
            error = measure_parity(network, kind.open(temporary, None).run, photo=photo)
        if not error <= tolerance:
            raise ParityError(f"{path.name}: its runtime differs from PyTorch by {error:.1e} relative, more than "
                              f"{tolerance:.0e}; the file was not kept")
    return error


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Exporters' and runtimes' errors, which share no public class, as ExportError; shortages as what they are."""
    try:
        yield
    except (MemoryError, OSError, ExportError):
        raise
    except Exception as failure:
        raise_shortage(failure)
        raise ExportError(f"{what}: {first_line(failure.__cause__ or failure)}") from failure


def measure_parity(network: Network, run: Callable[[Tensor], Tensor], *, photo: Tensor) -> float:
    """Largest relative error ‖a−b‖/‖b‖ of `run` against `network.restore`, NaN where one is; ExportError for shapes.

    Beyond twice PyTorch's own error, its distance from float64: where a norm divides almost nothing by almost nothing,
    on a border of a black area, two right results may differ by more than any tolerance.
    """
    errors = []
    for image in parity_images(network, photo):
        with torch.no_grad():
            expected = network.restore(image)
        got = run(image)
        if got.shape != expected.shape:
            raise ExportError(f"the exported file gives {tuple(got.shape)} for {tuple(image.shape)}, the network "
                              f"{tuple(expected.shape)}")
        # An output of nothing but zeros has no relative error: one least significant bit of 16 is the scale then.
        scale = expected.norm().clamp_min(expected.numel() ** 0.5 / 65535)
        error = (got - expected).norm() / scale
        if error > _ROUNDING:
            error = (error - 2 * _own_error(network, image, expected) / scale).clamp_min(0)
        errors.append(error)
    return float(torch.stack(errors).max())


def _own_error(network: Network, image: Tensor, expected: Tensor) -> Tensor:
    """‖network in float32 − in float64‖; 0 for a network that does not run in float64."""
    try:
        with torch.no_grad():
            exact = copy.deepcopy(network).double().restore(image.double())
    except RuntimeError as failure:  # somebody's own network may make float32 tensors inside
        raise_shortage(failure)
        return torch.zeros(())
    return (expected - exact).norm().float()


def parity_images(network: Network, photo: Tensor) -> list[Tensor]:
    """What an exported file is compared on: noise of three sizes, black, white, constant, half-black, and the photo."""
    generator, multiple = torch.Generator().manual_seed(0), network.size_multiple
    sizes = [(max(multiple, height // multiple * multiple), max(multiple, width // multiple * multiple))
             for height, width in ((64, 64), (48, 88), (8, 16))]
    images = [torch.rand(1, network.in_channels, height, width, generator=generator) for height, width in sizes]
    flat = [torch.full_like(images[1], value) for value in (0.0, 1.0, 0.5)]
    half = images[1].clone()
    half[..., : half.shape[-1] // 2] = 0
    return [*images, *flat, half,
            pad_to_multiple(photo[..., :_LARGEST_PHOTO_PX, :_LARGEST_PHOTO_PX].float(), multiple)]


def write_card(path: str | Path, facts: Mapping[str, str], *, model: str) -> None:
    """Write the YAML card of an exported file: `facts`, its hash, its input and output, and how to run it.

    A file with a selective scan gets a note that it is slow. `model` is the name of the ONNX file beside the card.
    """
    path = Path(path)
    import onnx

    data = (path.parent / model).read_bytes()
    proto = onnx.load_from_string(data)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    multiple, upscale, channels = (int(metadata[key]) for key in ("size_multiple", "upscale", "channels"))
    note = {"note": _SLOW_NOTE} if any(node.op_type == "Scan" for node in proto.graph.node) else {}
    card = {"model": model, "model_sha256": hashlib.sha256(data).hexdigest(), **facts, **note,
            "input": f"image: float32 (1, {channels}, H, W), RGB in [0, 1], H and W multiples of {multiple}",
            "output": f"restored: float32 (1, {channels}, {upscale}·H, {upscale}·W)",
            "run": _RUN.format(model=model, mode={1: "L", 3: "RGB"}.get(channels, "RGB"), multiple=multiple,
                               upscale=upscale)}
    text = yaml.dump(card, Dumper=_CardDumper, sort_keys=False, allow_unicode=True, width=1000)
    write_atomic(path, text.encode())


_SLOW_NOTE = ("a selective scan in this file runs as an ONNX Scan, pixel after pixel: correct, and slow. The "
              ".safetensors file in ens, or a hybrid without selective scans, is many times faster")
_RUN = """\
import numpy as np, onnxruntime, PIL.Image
photo = np.atleast_3d(np.asarray(PIL.Image.open("in.png").convert("{mode}"), np.float32)) / 255
height, width = photo.shape[:2]
for axis, pad in ((1, -width % {multiple}), (0, -height % {multiple})):
    widths = [(0, pad if side == axis else 0) for side in range(3)]
    photo = np.pad(photo, widths, "reflect" if pad < photo.shape[axis] else "edge")
padded = photo.transpose(2, 0, 1)
restored = onnxruntime.InferenceSession("{model}").run(None, {{"image": padded[None]}})[0][0].transpose(1, 2, 0)
restored = (restored[:height * {upscale}, :width * {upscale}].clip(0, 1) * 255).round().astype("uint8").squeeze()
PIL.Image.fromarray(restored).save("out.png")
"""


class _CardDumper(yaml.SafeDumper):
    """Text of several lines as a block, so that the snippet can be copied."""


_CardDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
