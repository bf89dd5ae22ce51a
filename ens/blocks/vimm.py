"""DVMSR's vision Mamba block (arXiv 2405.03008): one causal raster scan of the whole image.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W; inside, tokens (B, L, C) with L = H·W in row-major order.
Parameter names are the released ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.directions import initial_step_bias
from ens.ops.selective_scan import selective_scan


class MambaMixer(nn.Module):
    """Mamba-1's mixer (arXiv 2312.00752) with mamba-ssm's key names: (B, L, C) -> same; a token sees earlier ones."""

    def __init__(self, channels: int, *, state: int, expand: float, kernel_size: int = 4) -> None:
        super().__init__()
        self.inner = inner = int(expand * channels)
        self.rank = rank = math.ceil(channels / 16)
        self.state = state
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel_size, groups=inner, padding=kernel_size - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -rank**-0.5, rank**-0.5)
        # The released DVMSR overwrites this bias with zeros by accident; trained weights do not care, training does.
        self.dt_proj.bias = nn.Parameter(initial_step_bias(inner))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        value, gate = self.in_proj(tokens).transpose(1, 2).split(self.inner, 1)
        # The padding stands on both sides; without its right part the convolution is causal.
        value = F.silu(self.conv1d(value)[..., :length])
        projected = self.x_proj.weight @ value
        delta = self.dt_proj.weight @ projected[:, :self.rank]
        B, C = projected[:, self.rank:self.rank + self.state], projected[:, self.rank + self.state:]
        y = selective_scan(value, delta, -torch.exp(self.A_log), B, C, self.D, gate, self.dt_proj.bias,
                           delta_softplus=True)
        assert isinstance(y, Tensor)
        return self.out_proj(y.transpose(1, 2))


class ViMMBlock(nn.Module):
    """Mamba(norm(x)), plus x where `residual`: the released network has no residual here, only around its groups.

    `state` is N, `expand` inner / channels.
    """

    def __init__(self, channels: int, *, state: int = 16, expand: float = 2.0, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.mixer = MambaMixer(channels, state=state, expand=expand)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.norm(x.flatten(2).transpose(1, 2))).transpose(1, 2).view(x.shape)
        return x + y if self.residual else y
