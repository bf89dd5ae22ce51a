"""Half-resolution block: most of the work on a quarter of the pixels, and one 3×3 beside it on all of them.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Edge operator contract throughout. `fold_blocks` before export.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ens.blocks.conv import depthwise, projection
from ens.blocks.norm import ChannelNorm
from ens.blocks.rep import RepConv
from ens.blocks.sides import is_known


class HalfBlock(nn.Module):
    """x + 3×3(x) + pixel shuffle of a gated depth-wise convolution with channel attention at half resolution.

    `expand` is hidden / channels at half resolution, of the product of gate and values.
    """

    def __init__(self, channels: int, *, expand: float = 1.0, kernel_size: int = 5) -> None:
        super().__init__()
        self.hidden = max(1, round(channels * expand))
        self.full = RepConv(channels, channels, gain=0.1, identity=1.0)
        self.down = nn.Conv2d(channels, 2 * self.hidden, 2, stride=2)
        self.norm = ChannelNorm(2 * self.hidden)
        self.dwconv = depthwise(2 * self.hidden, kernel_size)
        self.attention = projection(self.hidden, self.hidden)
        self.project_out = projection(self.hidden, 4 * channels, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        even = all(is_known(side % 2 == 0) for side in (height, width))
        # Without knowing the sides: one more row and column, which a stride of 2 leaves out where they are even.
        y = self.dwconv(self.norm(self.down(x if even else F.pad(x, (0, 1, 0, 1)))))
        y = y[:, :self.hidden] * y[:, self.hidden:]
        y = F.pixel_shuffle(self.project_out(y * self.attention(y.mean((2, 3), keepdim=True))), 2)
        return self.full(x) + (y if even else y[..., :height, :width])
