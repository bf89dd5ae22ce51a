"""Uformer's block (arXiv 2106.03106): attention inside windows, and a feed-forward with a depth-wise convolution.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W; inside (B, H, W, C), windows (windows·B, N, C) with N = window².
Parameter names stay near the released ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ens.blocks.windows import (
    add_mask,
    join_windows,
    relative_positions,
    run_padded,
    separate_regions,
    split_windows,
)


class QueryKeyValue(nn.Module):
    """Released key names `to_q` and `to_kv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.to_q(x), self.to_kv(x)], -1)


class WindowAttention(nn.Module):
    """Multi-head attention between the N pixels of a window with a learnt bias for each relative position."""

    position: Tensor

    def __init__(self, channels: int, *, heads: int, window: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels {channels} is not a multiple of heads {heads}")
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1)**2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("position", relative_positions((window, window)), persistent=False)
        self.qkv = QueryKeyValue(channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """windows (W·B, N, C), mask (W, N, N) added to the scores of each of the W windows -> (W·B, N, C)."""
        count, pixels, _ = windows.shape
        qkv = self.qkv(windows).view(count, pixels, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)
        scores = scores + self.relative_position_bias_table[self.position].permute(2, 0, 1)
        if mask is not None:
            scores = add_mask(scores, mask)
        return self.proj((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(windows.shape))


class LeFF(nn.Module):
    """Locally enhanced feed-forward: linear, depth-wise 3×3, linear, with GELU between; (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(channels, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dwconv(self.linear1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class UformerBlock(nn.Module):
    """x + window attention(norm(x)), then x + LeFF(norm(x)): the released `LeWinTransformerBlock`.

    Windows are `window` pixels wide, shifted by half of that in blocks of odd `index` unless `shift` is off;
    `modulator` adds a learnt bias to every pixel of a window (the decoder's blocks have it). Sides that are no
    multiple of the window are padded with zeros inside the block.
    """

    def __init__(self, channels: int, *, heads: int = 1, window: int = 8, mlp_ratio: float = 4.0, shift: bool = True,
                 modulator: bool = False, index: int = 0) -> None:
        super().__init__()
        self.window = window
        self.offset = window // 2 if shift and index % 2 else 0
        self.modulator = nn.Embedding(window**2, channels) if modulator else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads=heads, window=window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = LeFF(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self._attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2).contiguous()

    def _attend(self, x: Tensor) -> Tensor:
        return run_padded(self._attend_padded, x, self.window)

    def _attend_padded(self, x: Tensor) -> Tensor:
        """Attention inside the windows of a map whose sides are multiples of the window, (B, H, W, C) -> same."""
        mask, window = None, (self.window, self.window)
        if self.offset:
            x = x.roll((-self.offset, -self.offset), (1, 2))
            mask = separate_regions(x, window, (self.offset, self.offset))
        windows = split_windows(x, window)
        if self.modulator is not None:
            windows = windows + self.modulator.weight
        x = join_windows(self.attn(windows, mask), window, x.shape)
        return x.roll((self.offset, self.offset), (1, 2)) if self.offset else x
