"""Uformer (arXiv 2106.03106): U-shaped window attention. Sizes as published, key names near the released ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ens.blocks.uformer import UformerBlock
from ens.networks.steps import Network, SlotSpec, Step


class _Resize(nn.Module):
    """A convolution under the released key `conv.0` or `deconv.0`."""

    def __init__(self, key: str, conv: nn.Module) -> None:
        super().__init__()
        self.add_module(key, nn.Sequential(conv))
        self._key = key

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self._key)(x)


class _Projection(nn.Module):
    """3×3 convolution under the released key `proj.0`, with an activation behind it or none."""

    def __init__(self, in_channels: int, channels: int, *activation: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), *activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


_LEVELS = (0, 1, 2, 3, 4, 3, 2, 1, 0)
STAGES = (*(f"encoderlayer_{i}" for i in range(4)), "conv", *(f"decoderlayer_{i}" for i in range(4)))


class Uformer(Network):
    """Uformer with the published constructor names: (B, in_channels, H, W) in [0, 1] -> same, any H and W.

    Published sizes: T `embed_dim=16` (5.23 M parameters) and S `embed_dim=32` (20.63 M), both without `modulator`; B
    `embed_dim=32, depths=(1, 2, 8, 8, 2, 8, 8, 2, 1)` (50.88 M) with it. `depths` and `num_heads` have nine
    entries: four encoder stages, the bottleneck (`conv`, its released name), four decoder stages. Sides are padded to
    a multiple of 16 windows, as released. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, *, in_channels: int = 3, embed_dim: int = 32, depths: Sequence[int] = (2,) * 9,
                 num_heads: Sequence[int] = (1, 2, 4, 8, 16, 16, 8, 4, 2), win_size: int = 8, mlp_ratio: float = 4.0,
                 modulator: bool = True, shift_flag: bool = True) -> None:
        super().__init__()
        if len(depths) != 9 or len(num_heads) != 9:
            raise ValueError(f"depths and num_heads have nine entries, got {depths} and {num_heads}")
        self.in_channels = in_channels
        self.size_multiple = 16 * win_size
        options = (("window", win_size), ("mlp_ratio", mlp_ratio), ("shift", shift_flag))
        # Decoder stages see the skip beside their own features, hence twice the channels.
        self.slots = tuple(
            SlotSpec(name, f"{name}.blocks", embed_dim * 2**level * (2 if i > 4 else 1), 2**level, depth, "uformer",
                     head, (*options, ("modulator", modulator and i > 4)))
            for i, (name, level, depth, head) in enumerate(zip(STAGES, _LEVELS, depths, num_heads, strict=True)))
        self.steps = _list_steps()
        self.input_proj = _Projection(in_channels, embed_dim, nn.LeakyReLU())
        for i, spec in enumerate(self.slots):
            blocks = (UformerBlock(spec.channels, heads=spec.heads, window=win_size, mlp_ratio=mlp_ratio,
                                   shift=shift_flag, modulator=modulator and i > 4, index=index)
                      for index in range(spec.depth))
            self.add_module(spec.name, nn.ModuleDict({"blocks": nn.Sequential(*blocks)}))
        for i in range(4):
            width = embed_dim * 2**i
            self.add_module(f"dowsample_{i}", _Resize("conv", nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)))
            wide = embed_dim * (16 if i == 0 else 2**(5 - i))
            self.add_module(f"upsample_{i}", _Resize("deconv", nn.ConvTranspose2d(wide, embed_dim * 2**(3 - i), 2,
                                                                                 stride=2)))
        self.output_proj = _Projection(2 * embed_dim, in_channels)


def _list_steps() -> tuple[Step, ...]:
    steps = [Step("input_proj")]
    for i in range(4):
        steps += [Step(f"encoderlayer_{i}.blocks", save=f"skip{i}"), Step(f"dowsample_{i}")]
    steps += [Step("conv.blocks")]
    for i in range(4):
        skip = f"skip{3 - i}"
        steps += [Step(f"upsample_{i}"), Step(cat=skip, free=(skip,)), Step(f"decoderlayer_{i}.blocks")]
    return (*steps, Step("output_proj"), Step(add="image", free=("image",)))
