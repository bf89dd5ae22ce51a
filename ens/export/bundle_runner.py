"""Restore a PNG or JPEG with the ONNX file beside this script: needs onnxruntime, numpy and Pillow, nothing else.

    python restore.py samples/1.png restored.png [--tile 512] [--threads 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

Array = Any


def pad(image: Array, multiple: int) -> Array:
    """Reflect on the right and bottom to the next multiple; repeat the edge where the image is too small for that."""
    for axis in (1, 0):
        rest = -image.shape[axis] % multiple
        widths = [(0, rest if side == axis else 0) for side in range(3)]
        image = np.pad(image, widths, "reflect" if rest < image.shape[axis] else "edge")
    return image


def starts(side: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin along a side, the last one ending with it."""
    return [0] if side <= tile else [*range(0, side - tile, stride), side - tile]


def ramp(side: int, overlap: int, first: bool, last: bool) -> Array:
    """Weights of a tile's pixels: 1, falling over the middle half of the overlap where another tile goes on."""
    distance = np.arange(side, dtype=np.float32) + np.float32(0.5)
    fall = ((distance - np.float32(overlap / 4)) / np.float32(max(overlap / 2, 1))).clip(np.float32(1e-6), 1)
    ones = np.ones(side, np.float32)
    return (ones if first else fall) * (ones if last else fall[::-1])


def restore(session: onnxruntime.InferenceSession, image: Array, tile: int, overlap: int) -> Array:
    """(H, W, C) float32 in [0, 1] -> (H·upscale, W·upscale, C), in overlapping tiles that are blended."""
    facts = session.get_modelmeta().custom_metadata_map
    multiple, scale = int(facts["size_multiple"]), int(facts["upscale"])
    padded = pad(image, multiple).transpose(2, 0, 1)
    tile = max(tile // multiple, -(-overlap // multiple) + 1) * multiple
    stride = (tile - overlap) // multiple * multiple
    tops, lefts = (starts(side, tile, stride) for side in padded.shape[1:])
    total = np.zeros((padded.shape[0], padded.shape[1] * scale, padded.shape[2] * scale), np.float32)
    weights = np.zeros_like(total[0])
    for top in tops:
        for left in lefts:
            part = session.run(None, {"image": padded[None, :, top:top + tile, left:left + tile].copy()})[0][0]
            weight = (ramp(part.shape[1], overlap * scale, top == tops[0], top == tops[-1])[:, None]
                      * ramp(part.shape[2], overlap * scale, left == lefts[0], left == lefts[-1]))
            rows, columns = (slice(at * scale, at * scale + side)
                             for at, side in zip((top, left), part.shape[1:], strict=True))
            total[:, rows, columns] += part * weight
            weights[rows, columns] += weight
    return (total / weights).transpose(1, 2, 0)[:image.shape[0] * scale, :image.shape[1] * scale]


def main() -> None:
    """Read, restore, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--tile", type=int, default=512, help="side of the tiles in pixels")
    parser.add_argument("--overlap", type=int, default=64, help="overlap of the tiles in pixels")
    parser.add_argument("--threads", type=int, default=0, help="threads, 0 for as many as there are cores")
    given = parser.parse_args()
    if not 0 <= given.overlap < given.tile:
        parser.error("the overlap is at least 0 and smaller than the tile")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_pattern = given.threads, False
    model = next(Path(__file__).resolve().parent.glob("*.onnx"))
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    channels = session.get_inputs()[0].shape[1]
    photo = ImageOps.exif_transpose(Image.open(given.source))
    pixels = np.asarray(photo.convert("RGB" if channels == 3 else "L"), np.float32)
    image = restore(session, pixels.reshape(*pixels.shape[:2], channels) / 255, given.tile, given.overlap)
    restored = np.rint(image.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    Image.fromarray(restored.squeeze(-1) if channels == 1 else restored).save(
        given.target, icc_profile=photo.info.get("icc_profile"))


if __name__ == "__main__":
    main()
