"""MambaCSR's blocks (arXiv 2408.11758): two-direction window scans, and the scan across two scales.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W; inside (B, H, W, C), tokens (B, E, L). Released key names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.directions import DirectionalScan
from ens.blocks.mambair import CAB
from ens.ops.scan_order import cross_scale_order, window_order


class TokenGate(nn.Module):
    """y · sigmoid(bottleneck(mean over the tokens of norm(y))): (B, L, E) -> same. The released `BiAttn`."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        hidden = max(1, inner // 8)
        self.norm = nn.LayerNorm(inner)
        self.global_reduce = nn.Linear(inner, hidden)
        self.channel_select = nn.Linear(hidden, inner)

    def forward(self, y: Tensor) -> Tensor:
        mean = self.norm(y).mean(1, keepdim=True)
        return y * torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(mean))))


class GatedScan(DirectionalScan):
    """Scans whose results pass one shared gate each before they are added."""

    def __init__(self, channels: int, *, directions: int, state: int, expand: float) -> None:
        super().__init__(channels, directions=directions, state=state, expand=expand)
        self.multi_scan = nn.ModuleDict({"attn": TokenGate(self.inner)})

    def gate_and_add(self, parts: list[Tensor]) -> Tensor:
        """K times (B, E, L) -> (B, L, E)."""
        gate = self.multi_scan["attn"]
        return torch.stack([gate(part.transpose(1, 2)) for part in parts]).sum(0)


class WindowScan(GatedScan):
    """A window order and its reverse, (B, H, W, C) -> same: the released `LW_SS2D`.

    Sides are padded with zeros to a multiple of the window, and the padding is scanned too: it changes nothing the
    scan has written, but lets the state decay, as the released weights have learnt it.
    """

    def __init__(self, channels: int, *, window: int, vertical: bool, state: int = 16, expand: float = 2.0) -> None:
        super().__init__(channels, directions=2, state=state, expand=expand)
        self.window, self.vertical = window, vertical

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        value, gate = self.in_proj(x).split(self.inner, -1)
        value = F.silu(self.conv2d(value.permute(0, 3, 1, 2)))
        value = F.pad(value, (0, -width % self.window, 0, -height % self.window))
        order = window_order(value.shape[2], value.shape[3], self.window, vertical=self.vertical)
        parts = self.scan(value.flatten(2).contiguous(), [order, order.flip(0)])
        parts = [part.unflatten(2, value.shape[2:])[:, :, :height, :width].flatten(2) for part in parts]
        y = self.out_norm(self.gate_and_add(parts)).view(gate.shape)
        return self.out_proj(y * F.silu(gate))


class Mlp(nn.Module):
    """Linear, GELU, linear over the last axis."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RLMBBlock(nn.Module):
    """x·s1 + window scan(norm(x)) + 0.01·CAB(norm(x)), then x·s2 + MLP(norm(x)): the released block.

    `index` says which of the four scans the block has: windows of `window` pixels row by row, the same column by
    column, then windows of `sequence_window` both ways: a whole image up to that side, the patch the released
    networks were trained on. `state` is N, `expand` inner / channels of the scan, `mlp_ratio` hidden / channels of
    the MLP.
    """

    def __init__(self, channels: int, *, state: int = 16, expand: float = 2.0, mlp_ratio: float = 2.0,
                 window: int = 8, sequence_window: int = 64, index: int = 0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = WindowScan(channels, window=sequence_window if index % 4 >= 2 else window,
                                         vertical=index % 2 == 1, state=state, expand=expand)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.conv_block = CAB(channels, compress=24, squeeze=24)
        self.ln_2 = nn.LayerNorm(channels)
        self.skip_scale2 = nn.Parameter(torch.ones(channels))
        self.mlp = Mlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        normed = self.ln_1(x)
        local = self.conv_block(normed.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        x = x * self.skip_scale + self.self_attention(normed) + 0.01 * local
        x = x * self.skip_scale2 + self.mlp(self.ln_2(x))
        return x.permute(0, 3, 1, 2).contiguous()


class CrossScaleFusion(GatedScan):
    """Bring a half-size map into a map by scanning both at once: (B, C, H, W), (B, C, H/2, W/2) -> (B, C, H, W).

    Four position-aligned orders (`cross_scale_order`); H and W must be multiples of `window`, otherwise ValueError.
    The released key `in_proj_down` has a second half that nothing reads.
    """

    def __init__(self, channels: int, *, state: int = 16, expand: float = 2.0, window: int = 16) -> None:
        super().__init__(channels, directions=4, state=state, expand=expand)
        self.window = window
        self.in_proj_down = nn.Linear(channels, 2 * self.inner, bias=False)
        self.conv2d2 = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.skip_scale2 = nn.Parameter(torch.ones(channels))
        self.ln_1 = nn.LayerNorm(channels)
        self.ln_2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        height, width = high.shape[2:]
        x = high.permute(0, 2, 3, 1)
        value, gate = self.in_proj(self.ln_1(x)).split(self.inner, -1)
        fine = F.silu(self.conv2d(value.permute(0, 3, 1, 2))).flatten(2)
        coarse = F.linear(low.permute(0, 2, 3, 1), self.in_proj_down.weight[:self.inner]).permute(0, 3, 1, 2)
        coarse = F.silu(self.conv2d2(coarse)).flatten(2)
        ways: list[dict[str, Any]] = [{"vertical": vertical, "reverse": reverse}
                                      for vertical in (False, True) for reverse in (False, True)]
        orders = [cross_scale_order(height, width, self.window, **way) for way in ways]
        parts = self.scan(torch.cat([fine, coarse], 2), orders)
        y = self.gate_and_add([part[..., :height * width] for part in parts])
        y = self.out_norm(y).view(gate.shape) * F.silu(gate)
        x = x * self.skip_scale + self.out_proj(y)
        x = x * self.skip_scale2 + self.mlp(self.ln_2(x))
        return x.permute(0, 3, 1, 2).contiguous()
