"""The crops of a report are cut where networks differ, of the images that were asked for."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ens.data.images import Fingerprint
from ens.data.pairs import ValidationImage, ValidationSet
from ens.evaluate.crops import draw_crops
from ens.evaluate.protocols import find_protocol


class Patched(nn.Module):
    """Enlarges an image and makes a square of it white."""

    def __init__(self, scale: int, top: int, left: int) -> None:
        super().__init__()
        self.scale, self.top, self.left = scale, top, left

    def forward(self, image: Tensor) -> Tensor:
        large = image.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        large[:, :, self.top:self.top + 8, self.left:self.left + 8] = 1
        return large


def decode(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


def test_crops_hold_what_differs_and_show_the_same_place_of_a_smaller_input() -> None:
    for scale in (1, 2):
        degraded = torch.linspace(0, 0.5, 40).expand(3, 48, 40).contiguous()
        clean = degraded.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        images = [ValidationImage(f"{number}", degraded, clean) for number in range(3)]
        networks = {"plain": Patched(scale, 1000, 0), "patched": Patched(scale, 40 * scale - 8, 16)}
        rows = draw_crops(networks, ValidationSet(images, Fingerprint(3, (), "")), find_protocol("sr-y", scale=scale),
                          [2, 0], side_px=24)
        assert list(rows) == ["2", "0"]
        pictures = {caption.partition("\n")[0]: decode(png) for caption, png in rows["2"]}
        assert list(pictures) == ["input", "plain", "patched", "target"]
        white = (pictures["patched"] == 255).all(axis=2)
        assert white.sum() == 64 and pictures["patched"].shape == (24, 24, 3)
        assert pictures["input"].shape == (24 // scale, 24 // scale, 3)
        enlarged = pictures["input"].repeat(scale, 0).repeat(scale, 1)
        assert np.abs(enlarged.astype(int) - pictures["target"]).max() == 0, "the same place"
