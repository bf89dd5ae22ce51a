"""Serpent-style network (arXiv 2403.17902): a multi-scale state-space U-Net on patch embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ens.blocks.norm import MapNorm
from ens.blocks.serpent import SerpentBlock
from ens.networks.steps import Network, SlotSpec, Step


class PatchMerge(nn.Module):
    """Four neighbours into one pixel: (B, C, H, W) -> (B, 2C, H/2, W/2), as VMamba merges."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        self.norm = MapNorm(4 * channels)
        self.reduction = nn.Conv2d(4 * channels, 2 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.unshuffle(x)))


class PatchExpand(nn.Module):
    """One pixel into four: (B, C, H, W) -> (B, C/2, 2H, 2W), the mirror image of PatchMerge."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expansion = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.shuffle = nn.PixelShuffle(2)
        self.norm = MapNorm(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.shuffle(self.expansion(x)))


class Serpent(Network):
    """Serpent-style U-Net: (B, in_channels, H, W) in [0, 1] -> same, any H and W.

    Known from the paper: patch embedding, a U-Net-like hierarchy of VMamba blocks with S6 and four-direction
    unrolling, global restoration at a cost linear in the pixels. Our reading, because code and tables were not at
    hand: patches of `patch_size` by a strided convolution, `depths` blocks a level (encoder levels, then the
    bottleneck; the decoder mirrors the encoder), patch merging to twice the channels, patch expansion, skips
    concatenated and reduced by a 1×1 convolution, pixel shuffle back to the image, global residual. Key names and
    sizes are ours. Slots: `encoder1` …, `bottleneck`, …, `decoder1`. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, *, in_channels: int = 3, embed_dim: int = 48, depths: Sequence[int] = (2, 2, 2, 2),
                 patch_size: int = 2, d_state: int = 16, expand: float = 2.0) -> None:
        super().__init__()
        if patch_size not in (1, 2, 4):
            raise ValueError(f"patch_size is 1, 2 or 4, got {patch_size}")
        if not depths or min(*depths, embed_dim) < 1:
            raise ValueError(f"depths and embed_dim must be at least 1, got {depths} and {embed_dim}")
        levels = len(depths) - 1
        self.in_channels = in_channels
        self.size_multiple = patch_size * 2**levels
        names = [*(f"encoder{i}" for i in range(1, levels + 1)), "bottleneck",
                 *(f"decoder{i}" for i in range(levels, 0, -1))]
        order = [*range(levels + 1), *range(levels - 1, -1, -1)]
        self.slots = tuple(SlotSpec(name, name, embed_dim * 2**level, patch_size * 2**level, depths[level], "serpent",
                                    options=(("state", d_state), ("expand", expand)))
                           for name, level in zip(names, order, strict=True))
        self.patch_embed = nn.Sequential(nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size),
                                         MapNorm(embed_dim))
        for spec in self.slots:
            self.add_module(spec.module, nn.Sequential(*(
                SerpentBlock(spec.channels, state=d_state, expand=expand) for _ in range(spec.depth))))
        for level in range(1, levels + 1):
            width = embed_dim * 2**level
            self.add_module(f"merge{level}", PatchMerge(width // 2))
            self.add_module(f"expand{level}", PatchExpand(width))
            self.add_module(f"reduce{level}", nn.Conv2d(width, width // 2, 1, bias=False))
        self.output = nn.Sequential(nn.Conv2d(embed_dim, in_channels * patch_size**2, 3, padding=1),
                                    nn.PixelShuffle(patch_size))
        self.steps = _list_steps(levels)


def _list_steps(levels: int) -> tuple[Step, ...]:
    steps = [Step("patch_embed")]
    for i in range(1, levels + 1):
        steps += [Step(f"encoder{i}", save=f"skip{i}"), Step(f"merge{i}")]
    steps += [Step("bottleneck")]
    for i in range(levels, 0, -1):
        steps += [Step(f"expand{i}"), Step(f"reduce{i}", cat=f"skip{i}", free=(f"skip{i}",)), Step(f"decoder{i}")]
    return (*steps, Step("output"), Step(add="image", free=("image",)))
