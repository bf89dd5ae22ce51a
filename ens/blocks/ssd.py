"""Causal state-space duality block (Mamba-2, arXiv 2405.21060) that scans rows and columns both ways.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Exported it is matrix products: no flip, no cumulative sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.conv import GatedConv, depthwise, projection
from ens.blocks.norm import ChannelNorm
from ens.ops.ssd import ssd_rows


class RowColumnMixer(nn.Module):
    """The first half of the heads scans every row, the second half every column, each forward and backward.

    A row (or column) is one sequence, so the length is a side of the image, not its area. The step size is a sigmoid,
    not Mamba-2's softplus, which edge runtimes lack.
    """

    def __init__(self, channels: int, *, hidden: int, states: int, heads: int) -> None:
        super().__init__()
        if heads % 2 or hidden % heads:
            raise ValueError(f"num_heads must be even and divide the hidden channels, got {heads} and {hidden}")
        self.hidden, self.states, self.heads = hidden, states, heads
        self.norm = ChannelNorm(channels)
        self.project_in = projection(channels, 2 * hidden + 4 * states + heads)
        self.dwconv = depthwise(hidden + 4 * states, 3)
        # Mamba-2's spread: decay rates from 1 to 16, step sizes from 1e-3 to 1e-1 on a logarithmic scale.
        self.A_log = nn.Parameter(torch.linspace(0.0, math.log(16.0), heads // 2).repeat(2))
        step = torch.logspace(-3, -1, heads // 2).repeat(2)
        self.dt_bias = nn.Parameter(torch.logit(step))
        self.D = nn.Parameter(torch.ones(heads))
        self.project_out = projection(hidden, channels, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden, half = self.hidden, self.hidden // 2
        projected = self.project_in(self.norm(x))
        gate, dt = projected[:, :hidden], projected[:, -self.heads:]
        mixed = F.silu(self.dwconv(projected[:, hidden:-self.heads]))
        dt = torch.sigmoid(dt + self.dt_bias.view(1, -1, 1, 1))
        value, matrices = mixed[:, :hidden], mixed[:, hidden:]
        states, heads = 2 * self.states, self.heads // 2
        rows = self._scan(value[:, :half], dt[:, :heads], matrices[:, :states], 0)
        columns = self._scan(value[:, half:].transpose(2, 3), dt[:, heads:].transpose(2, 3),
                             matrices[:, states:].transpose(2, 3), heads).transpose(2, 3)
        return self.project_out(torch.cat([rows, columns], 1) * gate)

    def _scan(self, value: Tensor, dt: Tensor, matrices: Tensor, first: int) -> Tensor:
        """Both directions along the last axis; value (B, E, H, W), dt (B, heads, H, W), matrices (B, 2N, H, W)."""
        heads = slice(first, first + dt.shape[1])
        y = ssd_rows(value.unflatten(1, (dt.shape[1], -1)), dt, -torch.exp(self.A_log[heads]),
                     matrices[:, :self.states], matrices[:, self.states:], self.D[heads])
        return y.flatten(1, 2)


class SSDBlock(nn.Module):
    """x + row and column scans, then x + gated depth-wise feed-forward. `state` is N."""

    def __init__(self, channels: int, *, state: int = 16, expand: float = 1.0, ffn_expand: float = 1.0,
                 num_heads: int = 4) -> None:
        super().__init__()
        self.mixer = RowColumnMixer(channels, hidden=round(channels * expand), states=state, heads=num_heads)
        self.ffn = GatedConv(channels, max(1, round(channels * ffn_expand)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.ffn(x)
