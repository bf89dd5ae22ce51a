"""ONNX files of networks, and the card beside them. A file appears only after ONNX Runtime has reproduced the network.

Shapes: image (1, C, H, W) in [0, 1], H and W multiples of `size_multiple` -> (1, C, H·upscale, W·upscale).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnxruntime
import torch
import yaml
from torch import Tensor, nn
from torch.export import Dim

from ens.atomic import atomic_path, write_atomic
from ens.export.graph import tidy_graph
from ens.networks.steps import Network, pad_to_multiple

ONNX_FORMAT = "ens onnx 1"
OPSET = 20
"""GELU is one operator from here on; below it ONNX Runtime is a tenth slower, above it is not faster (measured)."""
_LARGEST_SIDE = 65536
_LARGEST_PHOTO_PX = 512


class ExportError(RuntimeError):
    """A network that cannot be exported, or an exported file that does not reproduce it."""


class _Restore(nn.Module):
    """`Network.restore` as the forward that is exported."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.restore(image)


def export_onnx(network: Network, path: str | Path, *, photo: Tensor, tolerance: float = 1e-4,
                facts: Mapping[str, str] | None = None) -> float:
    """Write the network as ONNX with dynamic height and width; return the largest relative error ‖a−b‖/‖b‖ seen.

    ONNX Runtime opens the file and must reproduce PyTorch on three sizes and on `photo` (1, C, H, W), a real degraded
    image. The file's metadata holds `size_multiple`, `upscale`, `channels` and `facts`. Raises ExportError, leaving
    no file, when the network cannot be exported or the error exceeds `tolerance`.
    """
    path = Path(path)
    network = network.cpu().eval()
    if photo.ndim != 4 or photo.shape[:2] != (1, network.in_channels):
        raise ValueError(f"the photo is (1, {network.in_channels}, H, W), got {tuple(photo.shape)}")
    metadata = {"format": ONNX_FORMAT, "size_multiple": str(network.size_multiple), "upscale": str(network.upscale),
                "channels": str(network.in_channels)}
    taken = sorted(set(metadata) & set(facts or {}))
    if taken:
        raise ValueError(f"facts may not be called {', '.join(taken)}; these names describe the file")
    model = _convert(network, {**metadata, **(facts or {})})
    with atomic_path(path) as temporary:
        temporary.write_bytes(model)
        error = measure_parity(network, temporary, photo=photo)
        if not error <= tolerance:
            raise ExportError(f"{path.name}: ONNX Runtime differs from PyTorch by {error:.1e} relative, more than "
                              f"{tolerance:.0e}; the file was not kept")
    return error


def _convert(network: Network, metadata: Mapping[str, str]) -> bytes:
    multiple = network.size_multiple
    largest = _LARGEST_SIDE // multiple
    # Two different sides above 1, so that the exporter takes neither for a constant nor one for the other.
    example = torch.zeros(1, network.in_channels, 6 * multiple, 8 * multiple)
    sides = {2: multiple * Dim("h", min=1, max=largest), 3: multiple * Dim("w", min=1, max=largest)}
    try:
        with torch.no_grad(), _hushed():
            program = torch.onnx.export(_Restore(network).eval(), (example,), dynamo=True, opset_version=OPSET,
                                        dynamic_shapes={"image": sides}, input_names=["image"],
                                        output_names=["restored"], verbose=False)
    except Exception as error:  # whatever the exporter meets, the answer is the same: no file, and why
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise ExportError(f"the network cannot be exported to ONNX: {reason}") from error
    assert program is not None
    tidy_graph(program.model)
    program.model.metadata_props.update(metadata)
    return bytes(program.model_proto.SerializeToString())


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter reports on itself in warnings, log lines and prints; only errors matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def measure_parity(network: Network, path: str | Path, *, photo: Tensor) -> float:
    """Largest relative error of an ONNX file against the network, on noise of three sizes and on a photo."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    multiple, generator = network.size_multiple, torch.Generator().manual_seed(0)
    images = [torch.rand(1, network.in_channels, multiple * -(-height // multiple), multiple * -(-width // multiple),
                         generator=generator) for height, width in ((64, 64), (48, 88), (8, 16))]
    images.append(pad_to_multiple(photo[..., :_LARGEST_PHOTO_PX, :_LARGEST_PHOTO_PX].float(), multiple))
    errors = []
    for image in images:
        with torch.no_grad():
            expected = network.restore(image)
        got = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        if got.shape != expected.shape:
            raise ExportError(f"the exported file gives {tuple(got.shape)} for {tuple(image.shape)}, the network "
                              f"{tuple(expected.shape)}")
        errors.append((got - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())  # NaN where any is NaN


def write_card(path: str | Path, facts: Mapping[str, str], *, model: str) -> None:
    """Write the YAML card of an exported file: `facts`, its hash, its input and output, and how to run it.

    A file with a selective scan gets a note that it is slow. `model` is the name of the ONNX file beside the card.
    """
    path = Path(path)
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
padded = np.pad(photo, ((0, -height % {multiple}), (0, -width % {multiple}), (0, 0)), "symmetric").transpose(2, 0, 1)
restored = onnxruntime.InferenceSession("{model}").run(None, {{"image": padded[None]}})[0][0].transpose(1, 2, 0)
restored = (restored[:height * {upscale}, :width * {upscale}].clip(0, 1) * 255).round().astype("uint8").squeeze()
PIL.Image.fromarray(restored).save("out.png")
"""


class _CardDumper(yaml.SafeDumper):
    """Text of several lines as a block, so that the snippet can be copied."""


_CardDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
