"""Parts of the flat super-resolution networks (SwinIR's frame): mean shift, patch embedding, residual groups.

Shapes: maps (B, C, H, W), images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

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


def group_steps(prefix: str, *, save: str = "") -> tuple[Step, ...]:
    """x + conv(blocks(x)) of the group at `prefix`, as steps; the result is kept under `save`."""
    skip = f"{prefix}.skip"
    return (Step(save=skip), Step(f"{prefix}.residual_group.blocks"), Step(f"{prefix}.conv"),
            Step(add=skip, save=save, free=(skip,)))


def count_blocks(keys: list[str], prefix: str) -> tuple[int, ...]:
    """Number of blocks of each group under `prefix`, from the keys of a `state_dict`; ValueError names a gap."""
    return tuple(count_row(keys, f"{prefix}.{group}.residual_group.blocks") for group in range(count_row(keys, prefix)))
