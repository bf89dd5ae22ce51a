"""Plain 3×3 convolutions trained with parallel branches (as RepVGG, arXiv 2101.03697) that fold into one convolution.

Shapes: x (B, C, H, W) -> (B, C, H, W), any H and W. Edge operator contract throughout. `fold_blocks` before export.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Module = TypeVar("Module", bound=nn.Module)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class RepConv(nn.Module):
    """scale · (3×3 + 1×1) + identity · x + bias, with a scale a channel; `identity` None has no such branch.

    The branches are added as kernels, not as maps: the same numbers at the price of one convolution in training too.
    `gain` makes the first kernels smaller, not their scale: that would slow down their training as much.
    """

    def __init__(self, in_channels: int, out_channels: int, *, gain: float = 1.0,
                 identity: float | None = None) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        with torch.no_grad():
            self.conv3.weight *= gain
            self.conv1.weight *= gain
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.identity = None if identity is None else nn.Parameter(torch.full((out_channels,), identity))

    def kernel(self) -> Tensor:
        """The branches as one 3×3 kernel, (out, in, 3, 3)."""
        kernel = self.scale[:, None, None, None] * (self.conv3.weight + F.pad(self.conv1.weight, (1, 1, 1, 1)))
        if self.identity is None:
            return kernel
        return kernel + F.pad(torch.diag(self.identity)[:, :, None, None], (1, 1, 1, 1))

    def fold(self) -> nn.Conv2d:
        """One plain convolution that gives the same."""
        kernel = self.kernel().detach()
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1, device=kernel.device, dtype=kernel.dtype)
        conv.load_state_dict({"weight": kernel, "bias": self.bias.detach()})
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, padding=1)


class RepBlock(nn.Module):
    """x + 3×3(activation(3×3(x))); `width` is hidden / channels, `activation` one of `ACTIVATIONS`.

    ReLU, which runtimes fuse into the convolution, imitated Restormer stages best (results/LOG.md, 2026-11-29).
    """

    def __init__(self, channels: int, *, width: float = 1.0, activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
        hidden = max(1, round(channels * width))
        self.enter = RepConv(channels, hidden, identity=0.0 if hidden == channels else None)
        self.activation = ACTIVATIONS[activation]()
        self.leave = RepConv(hidden, channels, gain=0.1, identity=0.0 if hidden == channels else None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.activation(self.enter(x)))


def fold_blocks(network: Module) -> Module:
    """A copy in which every RepConv is one plain convolution; the network itself where it has none."""
    if not any(isinstance(module, RepConv) for module in network.modules()):
        return network
    folded = copy.deepcopy(network)
    for module in list(folded.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RepConv):
                setattr(module, name, child.fold())
    return folded
