"""Restored crops for people to look at: input, every network's output and target side by side, as PNG."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ens.data.images import encode_png, to_pixels
from ens.data.pairs import ValidationSet
from ens.evaluate.metrics import score_input, score_psnr_db
from ens.evaluate.protocols import Protocol


def draw_crops(networks: Mapping[str, nn.Module], images: ValidationSet, protocol: Protocol, *, side_px: int = 128,
               photos: int = 3) -> dict[str, list[tuple[str, bytes]]]:
    """Image name -> captions with PSNR and PNG bytes: input, each network by its name, target.

    The PSNR is that of the whole image, the picture its centre of at most `side_px` a side.
    """
    rows = {}
    for image in images.images[:photos]:
        same_size = image.degraded.shape == image.clean.shape
        gain = f" {score_input(image.degraded, image.clean, protocol).psnr_db:.2f} dB" if same_size else ""
        row = [("input" + gain, image.degraded)]
        for name, network in networks.items():
            with torch.inference_mode():
                output = network(image.degraded[None])[0]
            row.append((f"{name} {score_psnr_db(output, image.clean, protocol):.2f} dB", output))
        row.append(("target", image.clean))
        rows[image.name] = [(caption, _centre_png(pixels, side_px)) for caption, pixels in row]
    return rows


def _centre_png(image: Tensor, side: int) -> bytes:
    height, width = image.shape[-2:]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    part = image[:, top:top + side, left:left + side].clamp(0, 1).permute(1, 2, 0)
    return encode_png(to_pixels(part.contiguous().numpy()))
