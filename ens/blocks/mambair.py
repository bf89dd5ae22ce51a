"""MambaIR's block (arXiv 2402.15648): four-direction selective scan, then a channel-attention convolution.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Parameter names are the released ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.directions import DirectionalScan
from ens.ops.scan_order import FOUR_DIRECTIONS, scan_order


class SS2D(DirectionalScan):
    """VMamba's four-direction scan (arXiv 2401.10166): (B, H, W, C) -> same; `expand` times C inner channels."""

    def __init__(self, channels: int, *, state: int, expand: float) -> None:
        super().__init__(channels, directions=4, state=state, expand=expand)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).split(self.inner, -1)
        # Channels stay innermost in memory: the scan then reads each pixel's channels as one vector.
        value = F.silu(self.conv2d(value.permute(0, 3, 1, 2)))
        orders = [scan_order(name, *value.shape[2:]) for name in FOUR_DIRECTIONS]
        y = self.scan_sum(value.flatten(2), orders).transpose(1, 2).view(gate.shape)
        return self.out_proj(self.out_norm(y) * F.silu(gate))


class ChannelAttention(nn.Module):
    """RCAN's channel attention under the released key `attention`."""

    def __init__(self, channels: int, *, squeeze: int) -> None:
        super().__init__()
        hidden = max(1, channels // squeeze)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(),
                                       nn.Conv2d(hidden, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class CAB(nn.Module):
    """3×3 down, GELU, 3×3 up, channel attention, under the released key `cab`."""

    def __init__(self, channels: int, *, compress: int = 3, squeeze: int = 30) -> None:
        super().__init__()
        hidden = max(1, channels // compress)
        self.cab = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.GELU(),
                                 nn.Conv2d(hidden, channels, 3, padding=1), ChannelAttention(channels, squeeze=squeeze))

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


class MambaIRBlock(nn.Module):
    """x·s1 + SS2D(norm(x)), then x·s2 + CAB(norm(x)): the released `VSSBlock`, image layout, released keys.

    `state` is N; `expand` is inner / channels of the scan (the released `mlp_ratio`: 1.5 in the SIDD network).
    """

    def __init__(self, channels: int, *, state: int = 16, expand: float = 2.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels, eps=1e-6)
        self.self_attention = SS2D(channels, state=state, expand=expand)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.conv_blk = CAB(channels)
        self.ln_2 = nn.LayerNorm(channels)
        self.skip_scale2 = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x * self.skip_scale + self.self_attention(self.ln_1(x))
        refined = self.conv_blk(self.ln_2(x).permute(0, 3, 1, 2).contiguous())
        return x.permute(0, 3, 1, 2).contiguous() * self.skip_scale2.view(1, -1, 1, 1) + refined
