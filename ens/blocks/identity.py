"""The family that drops a slot: (B, C, H, W) -> the same tensor."""

from __future__ import annotations

from torch import Tensor, nn


class IdentityBlock(nn.Module):
    """Return the input. Takes `channels` as every family does, and ignores it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x
