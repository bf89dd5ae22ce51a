"""MambaIR's block (arXiv 2402.15648): four-direction selective scan, then a channel-attention convolution.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Parameter names are the released ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.ops.scan_order import FOUR_DIRECTIONS, invert_order, scan_order
from ens.ops.selective_scan import selective_scan


class SS2D(nn.Module):
    """VMamba's four-direction scan (arXiv 2401.10166): (B, H, W, C) -> same; `expand` times C inner channels."""

    def __init__(self, channels: int, *, state: int, expand: float) -> None:
        super().__init__()
        self.inner = inner = int(expand * channels)
        self.rank = rank = math.ceil(channels / 16)
        self.state = state
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * state, inner).uniform_(-1, 1) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-1, 1) * rank**-0.5)
        self.dt_projs_bias = nn.Parameter(_initial_step_bias(4, inner))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.in_proj(x).split(self.inner, -1)
        value = F.silu(self.conv2d(value.permute(0, 3, 1, 2)))
        y = self.out_norm(self._scan(value).permute(0, 2, 3, 1))
        return self.out_proj(y * F.silu(gate))

    def _scan(self, x: Tensor) -> Tensor:
        """Sum of the four directions: (B, E, H, W) -> same."""
        batch, inner, height, width = x.shape
        flat = x.flatten(2).to(memory_format=torch.contiguous_format)
        # The projections are the same for every pixel, so they come before the reordering, all four at once.
        projected = (self.x_proj_weight.flatten(0, 1) @ flat).view(batch, 4, -1, height * width)
        delta = self.dt_projs_weight @ projected[:, :, :self.rank]
        B, C = projected[:, :, self.rank:self.rank + self.state], projected[:, :, self.rank + self.state:]
        orders = [scan_order(name, height, width).to(x.device) for name in FOUR_DIRECTIONS]
        u, delta, B, C = (torch.stack([m[..., order] if m is flat else m[:, k][..., order]
                                       for k, order in enumerate(orders)], 1) for m in (flat, delta, B, C))
        y = selective_scan(u.flatten(1, 2), delta.flatten(1, 2), -torch.exp(self.A_logs), B, C, self.Ds,
                           delta_bias=self.dt_projs_bias.flatten(), delta_softplus=True)
        assert isinstance(y, Tensor)
        directions = y.view(batch, 4, inner, -1).unbind(1)
        return torch.stack([part[..., invert_order(order)] for part, order in
                            zip(directions, orders, strict=True)]).sum(0).view(x.shape)


def _initial_step_bias(directions: int, inner: int) -> Tensor:
    """Inverse softplus of step sizes spread over 1e-3 to 1e-1 on a logarithmic scale (Mamba's initialisation)."""
    step = torch.exp(torch.rand(directions, inner) * math.log(100.0) + math.log(1e-3)).clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


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
