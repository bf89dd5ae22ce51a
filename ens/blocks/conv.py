"""Gated depth-wise convolution block (NAFNet-like, arXiv 2204.04676) and the feed-forward other families share.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Edge operator contract throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ens.blocks.norm import ChannelNorm


def projection(in_channels: int, out_channels: int, *, gain: float = 1.0) -> nn.Conv2d:
    """1×1 convolution; a gain below 1 on the last one of a branch starts the block near identity."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    with torch.no_grad():
        conv.weight.mul_(gain)
    return conv


def depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    """Depth-wise convolution that keeps the size; an even kernel raises ValueError."""
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


class GatedConv(nn.Module):
    """norm, 1×1 to 2·hidden, depth-wise, product of the halves, 1×1 back: a feed-forward that sees its neighbours."""

    def __init__(self, channels: int, hidden: int, *, kernel_size: int = 3, attention: bool = False) -> None:
        super().__init__()
        self.hidden = hidden
        self.norm = ChannelNorm(channels)
        self.project_in = projection(channels, 2 * hidden)
        self.dwconv = depthwise(2 * hidden, kernel_size)
        self.attention = projection(hidden, hidden) if attention else None
        self.project_out = projection(hidden, channels, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.project_in(self.norm(x)))
        x = x[:, :self.hidden] * x[:, self.hidden:]
        if self.attention is not None:
            x = x * self.attention(x.mean((2, 3), keepdim=True))
        return self.project_out(x)


class ConvBlock(nn.Module):
    """x + gated convolution with channel attention, then x + gated convolution. Local but for two channel means.

    `expand` is hidden / channels of both halves.
    """

    def __init__(self, channels: int, *, expand: float = 1.0, kernel_size: int = 3) -> None:
        super().__init__()
        hidden = max(1, round(channels * expand))
        self.mixer = GatedConv(channels, hidden, kernel_size=kernel_size, attention=True)
        self.ffn = GatedConv(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.ffn(x)
