"""Uformer's block (arXiv 2106.03106): attention inside windows, and a feed-forward with a depth-wise convolution.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W; inside (B, H, W, C), windows (windows·B, N, C) with N = window².
Parameter names stay near the released ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.sides import is_known


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
        y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
        position = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("position", position, persistent=False)
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
            scores = (scores.view(-1, *mask.shape[:1], *scores.shape[1:]) + mask[:, None]).view(scores.shape)
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
        height, width = x.shape[1:3]
        if all(is_known(side % self.window == 0) for side in (height, width)):
            return self._attend_padded(x)
        # Whole windows less the side, not a remainder: what a tracer then has is a multiple of the window in its eyes.
        bottom, right = ((side + self.window - 1) // self.window * self.window - side for side in (height, width))
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self._attend_padded(x)[:, :height, :width]

    def _attend_padded(self, x: Tensor) -> Tensor:
        """Attention inside the windows of a map whose sides are multiples of the window, (B, H, W, C) -> same."""
        mask = None
        if self.offset:
            x = x.roll((-self.offset, -self.offset), (1, 2))
            mask = self._separate_regions(x)
        windows = split_windows(x, self.window)
        if self.modulator is not None:
            windows = windows + self.modulator.weight
        x = join_windows(self.attn(windows, mask), self.window, x.shape)
        return x.roll((self.offset, self.offset), (1, 2)) if self.offset else x

    def _separate_regions(self, x: Tensor) -> Tensor:
        """−100 between pixels that the shift has brought into one window from opposite borders: (W, N, N)."""
        regions = []
        for side in x.shape[1:3]:
            at = torch.arange(side, device=x.device)
            regions.append((at >= side - self.window).int() + (at >= side - self.offset).int())
        region = split_windows((3 * regions[0][:, None] + regions[1])[None, ..., None], self.window)[..., 0]
        return (region[:, None] != region[:, :, None]).to(x.dtype) * -100.0


def split_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B·H·W/window², window², C), the windows of one image row by row."""
    batch, height, width, channels = x.shape
    # Rank 4 all the way, which edge runtimes need: a row of windows is an image of its own.
    x = x.reshape(batch * (height // window), window, width // window, window * channels)
    return x.transpose(1, 2).reshape(-1, window**2, channels)


def join_windows(windows: Tensor, window: int, shape: torch.Size) -> Tensor:
    """Inverse of split_windows for an image of this shape."""
    batch, height, width, channels = shape
    x = windows.view(batch * (height // window), width // window, window, window * channels)
    return x.transpose(1, 2).reshape(shape)
