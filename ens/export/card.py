"""The card of an exported file: YAML beside it that says what it is, what it costs, and how to run it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from torch import Tensor

from ens.atomic import write_atomic
from ens.export.formats import (
    ExportError,
    check_size,
    describe_network,
    find_format,
    open_file,
    parity_images,
    write_checked,
)
from ens.export.torch_export import Size
from ens.networks.steps import Network
from ens.space import suggest

EXPORTS: dict[str, tuple[str, str]] = {
    "onnx": (".onnx", "ort"),
    "openvino": (".onnx", "openvino"),  # the same file, checked in this runtime too
    "pt2": (".pt2", "torch"),
    "pte": (".pte", "executorch"),
}
"""Name of a format on the command line -> suffix of its file and the runtime that checks it."""


def list_targets(network: Network, names: Sequence[str],
                 size: Size | None) -> list[tuple[str, list[str], Size | None]]:
    """What to write for the named formats: suffix, runtimes that check it, size. Raises ExportError for what cannot be.
    """
    runtimes: dict[str, list[str]] = {}
    for name in names:
        if name not in EXPORTS:
            raise ExportError(f"no format {name!r}{suggest(name, EXPORTS)}; allowed: {', '.join(EXPORTS)}")
        suffix, runtime = EXPORTS[name]
        runtimes.setdefault(suffix, []).append(runtime)
    return [(suffix, found, check_size(network, suffix, size)) for suffix, found in runtimes.items()]


def export_file(network: Network, path: Path, *, photo: Tensor, facts: Mapping[str, str], size: Size | None = None,
                runtimes: Sequence[str] = (), on_event: Callable[[str], None]) -> None:
    """Write a file by `write_checked`, then its card with the relative error. Raises ExportError.

    Of OpenVINO the card also says how far the device's default precision is off, which nothing is demanded of.
    """
    error = write_checked(network, path, photo=photo, facts=facts, size=size, runtimes=runtimes, on_event=on_event)
    known = {**facts, "runtimes": ", ".join(runtimes), "relative_error": f"{error:.1e}"}
    if "openvino" in runtimes:
        image = parity_images(network, photo, size)[-1]
        exact, default = (open_file(path, runtime=name).run(image) for name in ("openvino", "openvino-default"))
        known["openvino_default_precision_deviation"] = f"{float((default - exact).norm() / exact.norm()):.1e}"
    write_card(path, known, metadata=describe_network(network, size))
    on_event(f"export: {path} agrees with PyTorch to {error:.1e}")


def write_card(model: str | Path, facts: Mapping[str, str], *, metadata: Mapping[str, str]) -> Path:
    """Write the card `MODEL.yaml`: `facts`, the file's hash, its input and output, and how to run it; return its path.

    `metadata` are those in the file (`size_multiple`, `upscale`, `channels`, and `height` and `width` of a fixed size).
    A file with a selective scan gets a note that it is slow.
    """
    model = Path(model)
    data = model.read_bytes()
    multiple, upscale, channels = (int(metadata[key]) for key in ("size_multiple", "upscale", "channels"))
    fixed = [int(metadata[key]) for key in ("height", "width") if key in metadata]
    sides = "{}, {}".format(*fixed) if fixed else "H, W"
    restored = "{}, {}".format(*(side * upscale for side in fixed)) if fixed else f"{upscale}·H, {upscale}·W"
    card = {"model": model.name, "model_sha256": hashlib.sha256(data).hexdigest(), **facts,
            **({"note": _SLOW_NOTE} if _holds_scan(model, data) else {}),
            "input": f"image: float32 (1, {channels}, {sides}), RGB in [0, 1]"
                     + ("" if fixed else f", H and W multiples of {multiple}"),
            "output": f"restored: float32 (1, {channels}, {restored})",
            "run": _RUN.format(mode={1: "L", 3: "RGB"}.get(channels, "RGB"), multiple=multiple, upscale=upscale,
                               height=fixed[0] if fixed else f"height + -height % {multiple}",
                               width=fixed[1] if fixed else f"width + -width % {multiple}",
                               restore=find_format(model.suffix).snippet.format(model=model.name))}
    text = yaml.dump(card, Dumper=_CardDumper, sort_keys=False, allow_unicode=True, width=1000)
    path = _name_card(model)
    write_atomic(path, text.encode())
    return path


def read_card(model: Path) -> dict[str, str]:
    """What the card of an exported file says; nothing where there is none."""
    path = _name_card(model)
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def _name_card(model: Path) -> Path:
    return model.with_name(f"{model.name}.yaml")


def _holds_scan(model: Path, data: bytes) -> bool:
    if model.suffix != ".onnx":
        return False
    import onnx

    return any(node.op_type == "Scan" for node in onnx.load_from_string(data).graph.node)


_SLOW_NOTE = ("a selective scan in this file runs as an ONNX Scan, pixel after pixel: correct, and slow. The "
              ".safetensors file in ens, or a hybrid without selective scans, is many times faster")
_RUN = """\
import numpy as np, PIL.Image
photo = np.atleast_3d(np.asarray(PIL.Image.open("in.png").convert("{mode}"), np.float32)) / 255
height, width = photo.shape[:2]
for axis, pad in ((1, {width} - width), (0, {height} - height)):
    widths = [(0, pad if side == axis else 0) for side in range(3)]
    photo = np.pad(photo, widths, "reflect" if pad < photo.shape[axis] else "edge")
image = np.ascontiguousarray(photo.transpose(2, 0, 1)[None])
{restore}
restored = np.asarray(restored)[0].transpose(1, 2, 0)[:height * {upscale}, :width * {upscale}]
PIL.Image.fromarray((restored.clip(0, 1) * 255).round().astype("uint8").squeeze()).save("out.png")
"""


class _CardDumper(yaml.SafeDumper):
    """Text of several lines as a block, so that the snippet can be copied."""


_CardDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
