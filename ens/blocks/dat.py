"""DAT's blocks (Dual Aggregation Transformer, arXiv 2308.03364): attention in windows and between channels in turn.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W; inside (B, H, W, C). Parameter names are the released ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.restormer import unit_rows
from ens.blocks.windows import (
    Size,
    add_mask,
    join_windows,
    relative_positions,
    run_padded,
    separate_regions,
    split_windows,
)


class StoredNorm(nn.BatchNorm2d):
    """Batch normalisation by its stored statistics, in training too: an affine map of each channel.

    Distillation and fine-tuning start from a trained network and have small batches, whose own statistics would differ
    from those that evaluation uses; and one image through a global mean has none at all.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class PositionBias(nn.Module):
    """A small network from the offset between two pixels to one bias a head: (offsets, 2) -> (offsets, heads)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, heads))

    def forward(self, offsets: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class WindowAttention(nn.Module):
    """Multi-head attention between the pixels of windows, shifted by half a window or not, with a position bias.

    The map's sides are multiples of the window: (B, H, W, 3·channels) queries, keys and values -> (B, H, W, channels).
    """

    rpe_biases: Tensor

    def __init__(self, channels: int, *, heads: int, window: Size, shift: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.offset = (window[0] // 2, window[1] // 2) if shift else (0, 0)
        offsets = [torch.arange(1 - side, side) for side in window]
        # In the released files, and what tells the window's sides there.
        self.register_buffer("rpe_biases", torch.cartesian_prod(*offsets).float())
        self.pos = PositionBias(max(1, channels // 16), heads)

    def forward(self, qkv: Tensor) -> Tensor:
        rows, columns = self.offset
        mask = None
        if rows or columns:
            qkv = qkv.roll((-rows, -columns), (1, 2))
            mask = separate_regions(qkv, self.window, self.offset)
        x = join_windows(self._attend(split_windows(qkv, self.window), mask), self.window, qkv.shape)
        return x.roll((rows, columns), (1, 2)) if rows or columns else x

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(W·B, N, 3·channels) -> (W·B, N, channels); mask (W, N, N) is added to the scores of each of W windows."""
        count, pixels, _ = windows.shape
        qkv = windows.view(count, pixels, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)
        # Made anew: kept, these numbers would be nine tenths of an exported file, the same for every block.
        position = relative_positions(self.window, windows.device)
        scores = scores + self.pos(self.rpe_biases)[position].permute(2, 0, 1)
        if mask is not None:
            scores = add_mask(scores, mask)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(count, pixels, -1)


class _Interaction(nn.Module):
    """What both attentions have: the projections, a convolution beside the attention, and the gates between the two.

    Section 3.3 of the paper, the adaptive interaction module.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed, narrow = max(1, channels // 8), max(1, channels // 16)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.dwconv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), StoredNorm(channels),
                                    nn.GELU())
        self.channel_interaction = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), StoredNorm(squeezed), nn.GELU(),
            nn.Conv2d(squeezed, channels, 1))
        self.spatial_interaction = nn.Sequential(
            nn.Conv2d(channels, narrow, 1), StoredNorm(narrow), nn.GELU(), nn.Conv2d(narrow, 1, 1))

    def gate_by_channels(self, x: Tensor, other: Tensor) -> Tensor:
        """x · one factor a channel, from the means of the other map."""
        return x * torch.sigmoid(self.channel_interaction(other))

    def gate_by_pixels(self, x: Tensor, other: Tensor) -> Tensor:
        """x · one factor a pixel of the other map."""
        return x * torch.sigmoid(self.spatial_interaction(other))


class SpatialAttention(_Interaction):
    """Attention in windows, half of the channels in `window` and half in its transpose: (B, H, W, C) -> same.

    Each half has half of the heads. Sides that are no multiple of the larger side of the window are padded with zeros.
    """

    def __init__(self, channels: int, *, heads: int, window: Size, shift: bool) -> None:
        super().__init__(channels)
        heads = max(1, heads // 2)
        if channels % (2 * heads):
            raise ValueError(f"channels {channels} is not a multiple of {2 * heads}: two halves of {heads} heads each")
        self.multiple = max(window)
        if any(self.multiple % side for side in window):
            raise ValueError(f"the larger side of a window is a multiple of the other, got {window}")
        self.attns = nn.ModuleList(WindowAttention(channels // 2, heads=heads, window=sides, shift=shift)
                                   for sides in (window, (window[1], window[0])))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        attended = run_padded(self._attend, qkv, self.multiple).permute(0, 3, 1, 2)
        local = self.dwconv(qkv[..., 2 * x.shape[-1]:].permute(0, 3, 1, 2))
        y = self.gate_by_channels(attended, local) + self.gate_by_pixels(local, attended)
        return self.proj(y.permute(0, 2, 3, 1))

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3·C) -> (B, H, W, C)."""
        half = qkv.shape[-1] // 6
        parts = qkv.split(half, -1)  # first and second half of q, of k, of v
        return torch.cat([attention(torch.cat(parts[i::2], -1)) for i, attention in enumerate(self.attns)], -1)


class ChannelAttention(_Interaction):
    """Attention between the channels of a head, as in Restormer: (B, H, W, C) -> same."""

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__(channels)
        if channels % heads:
            raise ValueError(f"channels {channels} is not a multiple of heads {heads}")
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).permute(0, 3, 1, 2)
        q, k = (unit_rows(qkv[:, i * channels:(i + 1) * channels]) for i in (0, 1))
        v = qkv[:, 2 * channels:]
        size = (batch, self.heads, channels // self.heads, height * width)
        scores = q.reshape(size) @ k.reshape(size).transpose(-2, -1)
        attended = torch.softmax(scores * self.temperature, -1) @ v.reshape(size)
        attended = attended.reshape(batch, channels, height, width)
        local = self.dwconv(v)
        y = self.gate_by_pixels(attended, local) + self.gate_by_channels(local, attended)
        return self.proj(y.permute(0, 2, 3, 1))


class SpatialGate(nn.Module):
    """First half of the channels · depth-wise convolution of the second: (B, H, W, 2·C) -> (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return first * self.conv(self.norm(second).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GatedFeedForward(nn.Module):
    """SGFN: linear, GELU, spatial gate, linear; (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"the feed-forward has {hidden} hidden channels, which do not divide in two halves")
        self.fc1 = nn.Linear(channels, hidden)
        self.sg = SpatialGate(hidden // 2)
        self.fc2 = nn.Linear(hidden // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.sg(F.gelu(self.fc1(x))))


class DATBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): the released `DATB`.

    Blocks of even `index` attend in windows of `split_height`×`split_width` pixels and its transpose, those of odd
    index between channels. Every other block with windows shifts them by half: those whose index is 2, 6, 10 …, or with
    `shift_first`, as in every other group of the released network, 0, 4, 8 ….
    """

    def __init__(self, channels: int, *, heads: int = 1, split_height: int = 8, split_width: int = 32,
                 expansion_factor: float = 2.0, shift_first: bool = False, index: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn: nn.Module = ChannelAttention(channels, heads=heads) if index % 2 else SpatialAttention(
            channels, heads=heads, window=(split_height, split_width), shift=index % 4 == (0 if shift_first else 2))
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = GatedFeedForward(channels, int(channels * expansion_factor))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.ffn(self.norm2(x))
        return x.permute(0, 3, 1, 2).contiguous()
