"""DVMSR (arXiv 2405.03008, NTIRE 2024 efficient super-resolution): sizes and key names of the released network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ens.blocks.norm import MapNorm
from ens.blocks.vimm import ViMMBlock
from ens.networks.groups import MeanShift, PatchNorm, count_blocks, create_group, group_steps
from ens.networks.steps import Network, SlotSpec, Step


class DVMSR(Network):
    """DVMSR with the published constructor names; `state_dict` keys are the released ones, 424,428 parameters.

    Input (B, 3, H, W) in [0, 1] -> (B, 3, sH, sW), not clamped, any H and W. The blocks of each group are a slot,
    `group1` to `group{len(depths)}`; as released they have no residual of their own. Raises ValueError for sizes
    that do not fit.
    """

    def __init__(self, *, embed_dim: int = 60, depths: Sequence[int] = (2, 2, 2, 2), upscale: int = 4,
                 d_state: int = 16) -> None:
        super().__init__()
        if not depths or min(*depths, embed_dim, upscale) < 1:
            raise ValueError(f"depths, embed_dim and upscale must be at least 1, got {depths}, {embed_dim}, {upscale}")
        options = (("state", d_state), ("residual", False))
        prefixes = [f"layers.{i}" for i in range(len(depths))]
        self.upscale = upscale
        self.slots = tuple(SlotSpec(f"group{i}", f"{prefix}.residual_group.blocks", embed_dim, 1, depth, "vimm",
                                    options=options) for i, (prefix, depth) in enumerate(
                                        zip(prefixes, depths, strict=True), 1))
        self.steps = (Step("subtract_mean", free=("image",)), Step("conv_first", save="first"), Step("patch_embed"),
                      *(step for prefix in prefixes for step in group_steps(prefix)), Step("norm_f"),
                      Step("conv_after_body"), Step("upsample", add="first", free=("first",)), Step("add_mean"))
        self.subtract_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.conv_first = nn.Conv2d(3, embed_dim, 3, padding=1)
        self.patch_embed = PatchNorm(embed_dim)
        self.layers = nn.ModuleList(create_group(embed_dim, [
            ViMMBlock(embed_dim, state=d_state, residual=False) for _ in range(depth)]) for depth in depths)
        self.norm_f = MapNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(embed_dim, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of a released DVMSR from its `state_dict`; KeyError or ValueError where none fit."""
    return {"embed_dim": state["conv_first.weight"].shape[0], "depths": count_blocks(list(state), "layers"),
            "upscale": round((state["upsample.0.weight"].shape[0] / 3) ** 0.5),
            "d_state": state["layers.0.residual_group.blocks.0.mixer.A_log"].shape[1]}
