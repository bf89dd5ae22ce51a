"""Restormer's transformer block (arXiv 2111.09881, section 3) in the form edge runtimes run in one piece.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.norm import ChannelNorm


class ChannelAttention(nn.Module):
    """MDTA: attention between channels, so its cost is linear in H·W (equation 1). Released key names."""

    def __init__(self, channels: int, *, heads: int, bias: bool = False) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels {channels} is not a multiple of heads {heads}")
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv_dwconv(self.qkv(x))
        # Slices, not chunk, and 4-D means over (2, 3): both keep the block one XNNPACK delegate.
        q, k = (unit_rows(qkv[:, i * channels:(i + 1) * channels]) for i in (0, 1))
        v = qkv[:, 2 * channels:]
        size = (batch, self.heads, channels // self.heads, height * width)
        attention = q.reshape(size) @ k.reshape(size).transpose(-2, -1)
        attention = torch.softmax(attention * self.temperature, dim=-1)
        return self.project_out((attention @ v.reshape(size)).reshape(batch, channels, height, width))


def unit_rows(x: Tensor) -> Tensor:
    """Divide each channel by its L2 norm over the pixels (the released code normalises along H·W).

    A mean and an rsqrt replace the norm; the sum is under the square root's smallest sensible value only where
    the released epsilon of 1e-12 on the norm would matter too.
    """
    if x.dtype == torch.float16:  # neither 1e-24 nor a square of 256 is a number there
        return unit_rows(x.float()).half()
    pixels = x.shape[2] * x.shape[3]
    mean_square = (x * x).mean((2, 3), keepdim=True)
    return x * (torch.rsqrt(mean_square + 1e-24) * pixels**-0.5)


class GatedFeedForward(nn.Module):
    """GDFN: gated depth-wise feed-forward (equation 2). `hidden = int(channels * expansion)`, truncated as released."""

    def __init__(self, channels: int, *, expansion: float = 2.66, bias: bool = False) -> None:
        super().__init__()
        self.hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * self.hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * self.hidden, 2 * self.hidden, 3, padding=1, groups=2 * self.hidden, bias=bias)
        self.project_out = nn.Conv2d(self.hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.project_in(x))
        return self.project_out(F.gelu(x[:, :self.hidden]) * x[:, self.hidden:])


class RestormerBlock(nn.Module):
    """x + MDTA(norm(x)), then x + GDFN(norm(x)). Loads the released weights by their own key names."""

    def __init__(self, channels: int, *, heads: int = 1, ffn_expansion_factor: float = 2.66, bias: bool = False,
                 layer_norm: str = "WithBias") -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels, layer_norm=layer_norm)
        self.attn = ChannelAttention(channels, heads=heads, bias=bias)
        self.norm2 = ChannelNorm(channels, layer_norm=layer_norm)
        self.ffn = GatedFeedForward(channels, expansion=ffn_expansion_factor, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))
