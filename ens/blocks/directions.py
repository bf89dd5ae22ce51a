"""Selective scans of the same tokens in several orders: what VMamba's, MambaIR's and MambaCSR's mixers share.

Shapes: B batch, K directions, E inner channels, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.ops.selective_scan import selective_scan_directions


class DirectionalScan(nn.Module):
    """Projections and states of `directions` scans under VMamba's released keys; a subclass says what is scanned.

    `channels` are the block's, `expand` times as many run through the scans, `state` is N.
    """

    def __init__(self, channels: int, *, directions: int, state: int, expand: float) -> None:
        super().__init__()
        self.inner = inner = int(expand * channels)
        self.rank = rank = math.ceil(channels / 16)
        self.state = state
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(_uniform(directions, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(_uniform(directions, inner, rank))
        self.dt_projs_bias = nn.Parameter(initial_step_bias(directions, inner))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(directions * inner, 1))
        self.Ds = nn.Parameter(torch.ones(directions * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def scan(self, tokens: Tensor, orders: Sequence[Tensor]) -> list[Tensor]:
        """One scan an order: (B, E, L) -> K times (B, E, L), each back in the order of `tokens`."""
        return list(self._scan(tokens, orders, merge=False).unflatten(1, (len(orders), -1)).unbind(1))

    def scan_sum(self, tokens: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Sum of the scans, (B, E, L) -> same; fastest where the channels are innermost in memory."""
        return self._scan(tokens, orders, merge=True)

    def _scan(self, tokens: Tensor, orders: Sequence[Tensor], *, merge: bool) -> Tensor:
        # The projections are the same for every token, so they come before any reordering, all at once.
        projected = F.linear(tokens.transpose(1, 2), self.x_proj_weight.flatten(0, 1)).unflatten(2, (len(orders), -1))
        step, write, read = projected.split([self.rank, self.state, self.state], -1)
        delta = torch.cat([F.linear(part, weight) for part, weight in
                           zip(step.unbind(2), self.dt_projs_weight, strict=True)], 2)
        return selective_scan_directions(tokens, delta.transpose(1, 2), -torch.exp(self.A_logs),
                                         write.permute(0, 2, 3, 1), read.permute(0, 2, 3, 1), self.Ds,
                                         self.dt_projs_bias.flatten(), torch.stack(list(orders)).to(tokens.device),
                                         merge=merge)


def _uniform(*size: int) -> Tensor:
    """nn.Linear's initialisation of stacked weights (…, out, in)."""
    return torch.empty(size).uniform_(-1, 1) * size[-1]**-0.5


def initial_step_bias(*size: int) -> Tensor:
    """Inverse softplus of step sizes spread over 1e-3 to 1e-1 on a logarithmic scale (Mamba's initialisation)."""
    step = torch.exp(torch.rand(size) * math.log(100.0) + math.log(1e-3)).clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))
