"""Parts of the flat super-resolution networks (SwinIR's frame): mean shift, patch embedding, residual groups.

Shapes: maps (B, C, H, W), images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ens.blocks.norm import MapNorm
from ens.networks.steps import Step, count_row

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of DIV2K, as the released networks subtract it."""


class MeanShift(nn.Module):
    """x + sign · mean colour. The mean is no part of the `state_dict`, as released."""

    mean: Tensor

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.register_buffer("mean", sign * torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mean


class PatchNorm(nn.Module):
    """Layer normalisation of the embedded image under the released key `norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = MapNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def create_group(channels: int, blocks: list[nn.Module]) -> nn.ModuleDict:
    """Blocks and a 3×3 convolution under the released keys `residual_group.blocks.i` and `conv`.

    It has no forward: `group_steps` runs it, so that its blocks are a slot.
    """
    return nn.ModuleDict({"residual_group": nn.ModuleDict({"blocks": nn.Sequential(*blocks)}),
                          "conv": nn.Conv2d(channels, channels, 3, padding=1)})


def group_steps(prefix: str, *, blocks: str = "residual_group.blocks", save: str = "") -> tuple[Step, ...]:
    """x + conv(blocks(x)) of the group at `prefix`, as steps; the result is kept under `save`."""
    skip = f"{prefix}.skip"
    return (Step(save=skip), Step(f"{prefix}.{blocks}"), Step(f"{prefix}.conv"),
            Step(add=skip, save=save, free=(skip,)))


def create_shuffles(channels: int, upscale: int) -> nn.Sequential:
    """Convolutions and pixel shuffles by 2, or 3 at once, up to `upscale`: the released `upsample`.

    Raises ValueError for another factor.
    """
    factors = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}
    if upscale not in factors:
        raise ValueError(f"upscale is 1, 2, 3, 4 or 8, got {upscale}")
    return nn.Sequential(*(module for factor in factors[upscale] for module in (
        nn.Conv2d(channels, factor**2 * channels, 3, padding=1), nn.PixelShuffle(factor))))


def infer_upscale(state: Mapping[str, Tensor], channels: int) -> int:
    """The factor of `create_shuffles(channels, …)` under the released key `upsample`."""
    return math.prod(round((value.shape[0] / channels)**0.5) for key, value in state.items()
                     if key.startswith("upsample.") and key.endswith("weight"))


def count_blocks(keys: list[str], prefix: str) -> tuple[int, ...]:
    """Number of blocks of each group under `prefix`, from the keys of a `state_dict`; ValueError names a gap."""
    return tuple(count_row(keys, f"{prefix}.{group}.residual_group.blocks") for group in range(count_row(keys, prefix)))
