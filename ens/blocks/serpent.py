"""Serpent's block (arXiv 2403.17902): VMamba's visual state-space block in its first form, without feed-forward.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W.
"""

from __future__ import annotations

from torch import Tensor, nn

from ens.blocks.mambair import SS2D


class SerpentBlock(nn.Module):
    """x + SS2D(norm(x)), scanned in four directions. `state` is N, `expand` inner / channels of the scan.

    Only the paper's description is known: a stack of VMamba blocks with four-direction unrolling. That the block has
    no feed-forward is our reading (VMamba's first form has none).
    """

    def __init__(self, channels: int, *, state: int = 16, expand: float = 2.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.self_attention = SS2D(channels, state=state, expand=expand)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attention(self.ln_1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
