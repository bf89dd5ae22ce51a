"""MambaIR-UNet (arXiv 2402.15648, real denoising): Restormer's skeleton with MambaIR blocks, released key names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ens.blocks.mambair import MambaIRBlock
from ens.networks.restormer import (
    LEVELS,
    STAGES,
    WIDTHS,
    PatchEmbed,
    add_unet_resizes,
    count_unet_blocks,
    unet_steps,
)
from ens.networks.steps import Network, SlotSpec


class MambaIRUNet(Network):
    """MambaIR-UNet with the published constructor names; `state_dict` keys are the released ones.

    `mlp_ratio` is inner / channels of the scan, as the released class calls it: 2.0 is its default (30,750,424
    parameters), the published SIDD network has 1.5 (26,779,480). Input (B, in_channels, H, W) in [0, 1] ->
    (B, out_channels, H, W), any H and W. Raises ValueError for sizes that do not fit.
    """

    size_multiple = 8

    def __init__(self, *, in_channels: int = 3, out_channels: int = 3, dim: int = 48,
                 num_blocks: Sequence[int] = (4, 6, 6, 8), num_refinement_blocks: int = 4, mlp_ratio: float = 2.0,
                 d_state: int = 16, bias: bool = False) -> None:
        super().__init__()
        if len(num_blocks) != 4:
            raise ValueError(f"num_blocks has four entries, got {num_blocks}")
        depths = (*num_blocks, *reversed(num_blocks[:3]), num_refinement_blocks)
        self.in_channels = in_channels
        self.slots = tuple(SlotSpec(name, name, dim * width, 2**level, depth, "mambair")
                           for name, width, level, depth in zip(STAGES, WIDTHS, LEVELS, depths, strict=True))
        self.steps = unet_steps()
        self.patch_embed = PatchEmbed(in_channels, dim, bias=bias)
        for spec in self.slots:
            self.add_module(spec.module, nn.Sequential(*(
                MambaIRBlock(spec.channels, state=d_state, expand=mlp_ratio) for _ in range(spec.depth))))
        add_unet_resizes(self, dim=dim, bias=bias)
        self.output = nn.Conv2d(2 * dim, out_channels, 3, padding=1, bias=bias)


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of a released MambaIR-UNet from its `state_dict`; KeyError or ValueError where none fit."""
    dim, in_channels = state["patch_embed.proj.weight"].shape[:2]
    depths = count_unet_blocks(state)
    inner, d_state = state["encoder_level1.0.self_attention.A_logs"].shape
    return {"in_channels": in_channels, "out_channels": state["output.weight"].shape[0], "dim": dim,
            "num_blocks": tuple(depths[:4]), "num_refinement_blocks": depths[7], "mlp_ratio": inner / 4 / dim,
            "d_state": d_state, "bias": "output.bias" in state}
