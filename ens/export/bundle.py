"""A stand-alone bundle: a folder that restores images on a machine without ens, and checksums of what is in it.

    NAME.onnx  NAME.yaml  restore.py  requirements.txt  samples/  SHA256SUMS
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ens.atomic import write_atomic
from ens.data.images import Photo, to_pixels, write_photo
from ens.data.pairs import ValidationImage
from ens.export.formats import FORMATS, ExportError

_NEEDED = ("numpy", "onnxruntime", "pillow")
_SUMS = "SHA256SUMS"


def write_bundle(folder: Path, model: Path, card: Path, images: Sequence[ValidationImage]) -> Path:
    """Write the bundle of an exported ONNX file with free sides, its card and a few degraded images; return `folder`.

    `SHA256SUMS` appears last (`sha256sum -c SHA256SUMS` checks the rest). Raises ExportError for a file of one size.
    """
    metadata = FORMATS[".onnx"].open(model, 1).metadata
    if "height" in metadata:
        raise ExportError(f"{model.name}: takes images of one size; a bundle needs a file with free sides")
    (folder / _SUMS).unlink(missing_ok=True)
    samples = {f"samples/{number}.png": image for number, image in enumerate(images, 1)}
    for name, image in samples.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = to_pixels(image.degraded.numpy().transpose(1, 2, 0).clip(0, 1))
        write_photo(folder / name, Photo(pixels))
    requirements = "".join(f"{name}>={version(name).partition('.')[0]}\n" for name in _NEEDED)
    files = {model.name: model.read_bytes(), card.name: card.read_bytes(), "requirements.txt": requirements.encode(),
             "restore.py": Path(__file__).with_name("bundle_runner.py").read_bytes()}
    for name, data in files.items():
        write_atomic(folder / name, data)
    sums = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
                   for name in sorted((*files, *samples)))
    write_atomic(folder / _SUMS, sums.encode())
    return folder
