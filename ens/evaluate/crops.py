"""Restored crops for people to look at: input, every network's output and target side by side, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ens.data.images import encode_png, to_pixels
from ens.data.pairs import ValidationSet
from ens.evaluate.metrics import score_input, score_psnr_db
from ens.evaluate.protocols import Protocol


def draw_crops(networks: Mapping[str, nn.Module], images: ValidationSet, protocol: Protocol, numbers: Sequence[int], *,
               side_px: int = 96) -> dict[str, list[tuple[str, bytes]]]:
    """Image name -> captions with PSNR and PNG bytes: input, each network by its name, target; of the images with these
    numbers.

    The PSNR is that of the whole image, the picture the square of at most `side_px` where the networks differ most.
    """
    rows = {}
    for image in (images.images[number] for number in numbers):
        same_size = image.degraded.shape == image.clean.shape
        gain = f"\n{score_input(image.degraded, image.clean, protocol).psnr_db:.2f} dB" if same_size else ""
        with torch.inference_mode():
            outputs = {name: network(image.degraded[None])[0].clamp(0, 1) for name, network in networks.items()}
        row = [("input" + gain, image.degraded)]
        row += [(f"{name}\n{score_psnr_db(output, image.clean, protocol):.2f} dB", output)
                for name, output in outputs.items()]
        row.append(("target", image.clean))
        square = _find_square(torch.stack(list(outputs.values())), side_px)
        rows[image.name] = [(caption, _cut_png(pixels, square, scale=image.clean.shape[-1] / pixels.shape[-1]))
                            for caption, pixels in row]
    return rows


def _find_square(outputs_NCHW: Tensor, side: int) -> tuple[int, int, int]:
    """Top, left and side of the square, by steps of 8 px, over which the outputs differ most."""
    range_HW = (outputs_NCHW.amax(0) - outputs_NCHW.amin(0)).mean(0)
    side = min(side, *range_HW.shape)
    means = avg_pool2d(range_HW[None, None], side, stride=8)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return 8 * top, 8 * left, side


def _cut_png(image: Tensor, square: tuple[int, int, int], *, scale: float) -> bytes:
    """A square of an image that is `scale` times smaller than the one it was found in."""
    top, left, side = (round(length / scale) for length in square)
    part = image[:, top:top + side, left:left + side].clamp(0, 1).permute(1, 2, 0)
    return encode_png(to_pixels(part.contiguous().numpy()))
