"""Non-causal state-space duality block (VSSD, arXiv 2407.18559): one global state, two matrix products.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Edge operator contract: no scan, no flip, no cumulative sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ens.blocks.conv import GatedConv, depthwise, projection
from ens.blocks.norm import ChannelNorm
from ens.ops.ssd import ssd_noncausal


class NonCausalMixer(nn.Module):
    """Every pixel writes into one state (N, E), weighted by a softmax over the pixels per head, and reads from it.

    The depth-wise convolution in front makes the branch local as well, and `skip` lets its result pass the state
    (D of the recurrence). A softmax rather than a sum of step sizes: the state then does not grow with the image.
    """

    def __init__(self, channels: int, *, hidden: int, states: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden channels {hidden} are not a multiple of num_heads {heads}")
        self.hidden, self.states, self.heads = hidden, states, heads
        self.norm = ChannelNorm(channels)
        self.project_in = projection(channels, 2 * hidden + 2 * states + heads)
        self.dwconv = depthwise(hidden + 2 * states + heads, kernel_size)
        self.skip = nn.Parameter(torch.ones(1, hidden, 1, 1))
        self.project_out = projection(hidden, channels, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden, states = self.hidden, self.states
        projected = self.project_in(self.norm(x))
        gate, mixed = projected[:, :hidden], self.dwconv(projected[:, hidden:])
        # Sliced before flattened: the exporter then cuts the convolutions apart instead of slicing what they give.
        value = mixed[:, :hidden]
        write = mixed[:, hidden:hidden + states].flatten(2)
        read = mixed[:, hidden + states:hidden + 2 * states].flatten(2)
        weight = torch.softmax(mixed[:, hidden + 2 * states:].flatten(2), dim=-1)
        seen = ssd_noncausal(value.flatten(2).unflatten(1, (self.heads, -1)), weight, write, read)
        return self.project_out((seen.reshape(value.shape) + value * self.skip) * gate)


class VSSDBlock(nn.Module):
    """x + non-causal state-space mixer, then x + gated depth-wise feed-forward.

    `state` is N, `num_heads` the number of pixel weightings, `expand` and `ffn_expand` hidden / channels of the halves.
    """

    def __init__(self, channels: int, *, state: int = 32, expand: float = 1.0, ffn_expand: float = 1.0,
                 num_heads: int = 4, kernel_size: int = 3) -> None:
        super().__init__()
        self.mixer = NonCausalMixer(channels, hidden=round(channels * expand), states=state, heads=num_heads,
                                    kernel_size=kernel_size)
        self.ffn = GatedConv(channels, max(1, round(channels * ffn_expand)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.ffn(x)
