"""PLKSR's block (arXiv 2404.11848): a large dense kernel on the first channels, everything else small convolutions.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Convolutions, slices and products only: edge operator contract.
Parameter names are the released ones, `channe_mixer` with its misspelling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIXERS = {"DCCM": (3, 3), "CCM": (3, 1), "ICCM": (1, 3)}
"""Kernel sizes of the two convolutions of each channel mixer."""


class PartialLargeKernel(nn.Module):
    """Dense k×k convolution on the first `large` channels, the rest passes.

    With `with_idt` an identity branch stands beside the convolution. It is one tap of the kernel, so it is added to
    the weight and never runs: an exported graph holds a single convolution either way.
    """

    tap: Tensor | None

    def __init__(self, large: int, *, kernel_size: int, with_idt: bool) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.large = large
        self.conv = nn.Conv2d(large, large, kernel_size, padding=kernel_size // 2)
        tap = F.pad(torch.eye(large)[..., None, None], [kernel_size // 2] * 4) if with_idt else None
        self.register_buffer("tap", tap, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, :self.large], x[:, self.large:]
        if self.tap is None:
            first = self.conv(first)
        else:
            first = F.conv2d(first, self.conv.weight + self.tap, self.conv.bias, padding=self.conv.padding)
        return torch.cat([first, rest], 1)


class ElementAttention(nn.Module):
    """x · sigmoid(3×3 convolution of x), under the released key `f`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.f(x)


class PLKBlock(nn.Module):
    """x + 1×1(attention(large kernel(channel mixer(x)))): no normalisation, released keys.

    `ccm_type` is the channel mixer: DCCM (3×3, 3×3), CCM (3×3, 1×1) or ICCM (1×1, 3×3). The large kernel sees
    `split_ratio` of the channels, `max_large_channels` at most: its cost grows with their square, and deep levels of
    a U-Net are wide. `use_ea` is element-wise attention (the tiny network has none). Raises ValueError for another
    `ccm_type` and for an even `kernel_size`.
    """

    def __init__(self, channels: int, *, kernel_size: int = 17, split_ratio: float = 0.25, ccm_type: str = "DCCM",
                 use_ea: bool = True, with_idt: bool = False, max_large_channels: int = 16) -> None:
        super().__init__()
        if ccm_type not in MIXERS:
            raise ValueError(f"ccm_type is {ccm_type!r}; allowed: {', '.join(MIXERS)}")
        first, second = MIXERS[ccm_type]
        large = max(1, min(int(channels * split_ratio), max_large_channels))
        self.channe_mixer = nn.Sequential(nn.Conv2d(channels, 2 * channels, first, padding=first // 2), nn.GELU(),
                                          nn.Conv2d(2 * channels, channels, second, padding=second // 2))
        self.lk = PartialLargeKernel(large, kernel_size=kernel_size, with_idt=with_idt)
        self.attn = ElementAttention(channels) if use_ea else nn.Identity()
        self.refine = nn.Conv2d(channels, channels, 1)
        # As released: the first convolution of the mixer and all biases keep torch's initialisation.
        for name in ("channe_mixer.2", "lk.conv", "refine", *(("attn.f.0",) if use_ea else ())):
            nn.init.trunc_normal_(self.get_parameter(f"{name}.weight"), std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.refine(self.attn(self.lk(self.channe_mixer(x))))
