"""Layer normalisation over the channels of every pixel, written with operators edge runtimes delegate.

Shapes: x (B, C, H, W) throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = ("BiasFree", "WithBias")


class _Affine(nn.Module):
    """Holds the released key names `body.weight` and `body.bias`."""

    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class ChannelNorm(nn.Module):
    """Restormer's LayerNorm (arXiv 2111.09881, released code): (B, C, H, W) -> same.

    `layer_norm="BiasFree"` divides by the standard deviation without subtracting the mean first, although the
    variance is the centred one; `"WithBias"` is the usual form. An exported graph takes its means as 1×1 convolutions
    with constant weights: a reduction over the channel axis splits the graph on XNNPACK, a convolution does not.
    Raises ValueError for another `layer_norm`.
    """

    def __init__(self, channels: int, *, layer_norm: str = "WithBias", eps: float = 1e-5) -> None:
        super().__init__()
        if layer_norm not in NORMS:
            raise ValueError(f"layer_norm is {layer_norm!r}; allowed: {', '.join(NORMS)}")
        self.body = _Affine(channels, bias=layer_norm == "WithBias")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # a square of 256 is beyond its range, and the root of infinity gives zeros
            return self.forward(x.float()).half()
        centred = x - channel_mean(x)
        scale = torch.rsqrt(channel_mean(centred * centred) + self.eps)
        weight = self.body.weight.view(1, -1, 1, 1)
        if self.body.bias is None:
            return x * scale * weight
        return centred * scale * weight + self.body.bias.view(1, -1, 1, 1)


def channel_mean(x: Tensor) -> Tensor:
    """Mean over the channels, (B, C, H, W) -> (B, 1, H, W); a convolution when the graph is being exported."""
    if torch.compiler.is_exporting():
        channels = x.shape[1]
        # Not made from x: an exporter then knows that the kernel is a constant.
        return F.conv2d(x, torch.full((1, channels, 1, 1), 1.0 / channels, dtype=x.dtype, device=x.device))
    return x.mean(1, keepdim=True)


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map with torch's key names, as released token networks store it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
