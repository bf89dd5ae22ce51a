"""Restormer (arXiv 2111.09881): sizes and key names of the released networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ens.blocks.restormer import RestormerBlock
from ens.networks.steps import Network, SlotSpec, Step, count_row


class _Body(nn.Module):
    """Convolution and pixel (un)shuffle under the released key `body.0`."""

    def __init__(self, conv: nn.Conv2d, shuffle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(conv, shuffle)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class PatchEmbed(nn.Module):
    """3×3 convolution under the released key `proj`."""

    def __init__(self, in_channels: int, channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def downsample(channels: int) -> nn.Module:
    """(B, C, H, W) -> (B, 2C, H/2, W/2)."""
    return _Body(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))


def upsample(channels: int) -> nn.Module:
    """(B, C, H, W) -> (B, C/2, 2H, 2W)."""
    return _Body(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.PixelShuffle(2))


STAGES = ("encoder_level1", "encoder_level2", "encoder_level3", "latent", "decoder_level3", "decoder_level2",
          "decoder_level1", "refinement")
WIDTHS = (1, 2, 4, 8, 4, 2, 2, 2)
LEVELS = (0, 1, 2, 3, 2, 1, 0, 0)


def unet_steps(*, dual_pixel: bool = False) -> tuple[Step, ...]:
    """The released U-Net: three levels of skips, no reduction at level 1, global residual unless dual-pixel."""
    steps = [Step("patch_embed", save="embed" if dual_pixel else ""),
             Step("encoder_level1", save="skip1"), Step("down1_2"), Step("encoder_level2", save="skip2"),
             Step("down2_3"), Step("encoder_level3", save="skip3"), Step("down3_4"), Step("latent"), Step("up4_3"),
             Step("reduce_chan_level3", cat="skip3", free=("skip3",)), Step("decoder_level3"), Step("up3_2"),
             Step("reduce_chan_level2", cat="skip2", free=("skip2",)), Step("decoder_level2"), Step("up2_1"),
             Step(cat="skip1", free=("skip1",)), Step("decoder_level1"), Step("refinement")]
    if dual_pixel:
        steps += [Step(save="refined"), Step("skip_conv", load="embed", free=("embed",)),
                  Step("output", add="refined", free=("refined",))]
    else:
        steps += [Step("output"), Step(add="image", free=("image",))]
    return tuple(steps)


class Restormer(Network):
    """Restormer with the published constructor names; `state_dict` keys are the released ones.

    `layer_norm` is "BiasFree" (all released denoisers) or "WithBias" (derain, deblur, defocus). Input
    (B, in_channels, H, W) in [0, 1] -> (B, out_channels, H, W), any H and W. `dual_pixel` takes six channels and has
    no global residual. Raises ValueError for sizes that do not fit.
    """

    size_multiple = 8

    def __init__(self, *, in_channels: int = 3, out_channels: int = 3, dim: int = 48,
                 num_blocks: Sequence[int] = (4, 6, 6, 8), num_refinement_blocks: int = 4,
                 heads: Sequence[int] = (1, 2, 4, 8), ffn_expansion_factor: float = 2.66, bias: bool = False,
                 layer_norm: str = "WithBias", dual_pixel: bool = False) -> None:
        super().__init__()
        if len(num_blocks) != 4 or len(heads) != 4:
            raise ValueError(f"num_blocks and heads have four entries, got {num_blocks} and {heads}")
        depths = (*num_blocks, *reversed(num_blocks[:3]), num_refinement_blocks)
        # The released code keeps 2·dim channels in the last two stages but only the first level's heads.
        stage_heads = (*heads, heads[2], heads[1], heads[0], heads[0])
        self.in_channels = in_channels
        options = (("ffn_expansion_factor", ffn_expansion_factor), ("bias", bias), ("layer_norm", layer_norm))
        self.slots = tuple(SlotSpec(name, name, dim * width, 2**level, depth, "restormer", head, options) for
                           name, width, level, depth, head in
                           zip(STAGES, WIDTHS, LEVELS, depths, stage_heads, strict=True))
        self.steps = unet_steps(dual_pixel=dual_pixel)
        self.patch_embed = PatchEmbed(in_channels, dim, bias=bias)
        for spec in self.slots:
            self.add_module(spec.module, nn.Sequential(*(
                RestormerBlock(spec.channels, heads=spec.heads, ffn_expansion_factor=ffn_expansion_factor, bias=bias,
                               layer_norm=layer_norm) for _ in range(spec.depth))))
        add_unet_resizes(self, dim=dim, bias=bias)
        if dual_pixel:
            self.skip_conv = nn.Conv2d(dim, 2 * dim, 1, bias=bias)
        self.output = nn.Conv2d(2 * dim, out_channels, 3, padding=1, bias=bias)


def add_unet_resizes(network: nn.Module, *, dim: int, bias: bool) -> None:
    """Add the released down-, up-samplers and reductions; bias reaches the reductions only, as released."""
    network.down1_2, network.down2_3, network.down3_4 = (downsample(dim * 2**level) for level in range(3))
    network.up4_3, network.up3_2, network.up2_1 = (upsample(dim * 2**level) for level in (3, 2, 1))
    network.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=bias)
    network.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=bias)


def count_unet_blocks(state: Mapping[str, Tensor]) -> list[int]:
    """Blocks of each stage; ValueError where one is missing, or where a decoder stage is no mirror of its encoder's."""
    depths = [count_row(state, stage) for stage in STAGES]
    for down, up in ((0, 6), (1, 5), (2, 4)):
        if depths[down] != depths[up]:
            raise ValueError(f"{STAGES[down]} has {depths[down]} blocks, {STAGES[up]} has {depths[up]}")
    return depths


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of a released Restormer from its `state_dict`; KeyError or ValueError where none fit."""
    dim, in_channels = state["patch_embed.proj.weight"].shape[:2]
    depths = count_unet_blocks(state)
    heads = [state[f"{stage}.0.attn.temperature"].shape[0] for stage in STAGES[:4]]
    hidden = {dim * width: state[f"{stage}.0.ffn.project_out.weight"].shape[1]
              for stage, width in zip(STAGES, WIDTHS, strict=True)}
    with_bias = "encoder_level1.0.norm1.body.bias" in state
    return {"in_channels": in_channels, "out_channels": state["output.weight"].shape[0], "dim": dim,
            "num_blocks": tuple(depths[:4]), "num_refinement_blocks": depths[7], "heads": tuple(heads),
            "ffn_expansion_factor": infer_expansion(hidden), "bias": "output.bias" in state,
            "layer_norm": "WithBias" if with_bias else "BiasFree", "dual_pixel": "skip_conv.weight" in state}


def infer_expansion(hidden: Mapping[int, int]) -> float:
    """The shortest decimal f with int(channels · f) == hidden for every pair of channels and hidden channels."""
    low = max(size / channels for channels, size in hidden.items())
    for digits in range(1, 9):
        factor = round(math.ceil(low * 10**digits - 1e-6) / 10**digits, digits)
        if all(int(channels * factor) == size for channels, size in hidden.items()):
            return factor
    raise ValueError(f"no expansion factor gives the hidden channels {dict(hidden)}")
