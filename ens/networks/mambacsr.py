"""MambaCSR (arXiv 2408.11758, super-resolution of compressed images): sizes and key names of the released networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ens.blocks.norm import MapNorm
from ens.blocks.rlmb import CrossScaleFusion, RLMBBlock
from ens.networks.groups import (
    MeanShift,
    PatchNorm,
    count_blocks,
    create_group,
    create_shuffles,
    group_steps,
    infer_upscale,
)
from ens.networks.steps import Network, SlotSpec, Step

_FEATURES = 64
"""Channels between the body and the pixels, fixed in the released code."""


class MambaCSR(Network):
    """MambaCSR with the published constructor names; `state_dict` keys are the released ones.

    With `cross_scale_scan` (the final network, 22,051,842 parameters) a half-size branch of len(depths2) groups is
    fused into the body behind each of its first groups; without it there are 18,372,603. Input (B, 3, H, W) in
    [0, 1] -> (B, 3, sH, sW), any H and W. The blocks of each group are a slot: `group1` …, and `low_group1` … of the
    half-size branch. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, *, embed_dim: int = 180, d_state: int = 16, depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
                 depths2: Sequence[int] = (6,), mlp_ratio: float = 2.0, upscale: int = 4,
                 cross_scale_scan: bool = True, scan_size: int = 8) -> None:
        super().__init__()
        low_depths = tuple(depths2) if cross_scale_scan else ()
        if len(low_depths) > len(depths):
            raise ValueError(f"depths2 has at most as many entries as depths, got {depths2} and {depths}")
        self.size_multiple = 16 if cross_scale_scan else 1
        self.upscale = upscale
        self.layers = nn.ModuleList()
        self.layers2, self.layers3 = nn.ModuleList(), nn.ModuleList()
        self.slots = ()
        for i, depth in enumerate(depths):
            self._add_group("layers", f"group{i + 1}", embed_dim, depth, 1, mlp_ratio, d_state, scan_size)
            if i < len(low_depths):
                self._add_group("layers2", f"low_group{i + 1}", embed_dim, low_depths[i], 2, mlp_ratio, d_state,
                                scan_size)
                self.layers3.append(CrossScaleFusion(embed_dim))
        self.steps = _list_steps(len(depths), len(low_depths))
        self._add_ends(embed_dim, upscale)
        if low_depths:
            self.halve = nn.AvgPool2d(2)  # bilinear ×0.5 without corner alignment, on even sides
            self.patch_embed2 = PatchNorm(embed_dim)

    def _add_group(self, layers: str, name: str, channels: int, depth: int, downscale: int, mlp_ratio: float,
                   state: int, scan_size: int) -> None:
        """One residual group under `layers`, its blocks a slot."""
        # As released: a group of fewer than six blocks takes windows of 32 where a full one takes `scan_size`.
        window = scan_size if depth >= 6 else 32
        options = (("state", state), ("mlp_ratio", mlp_ratio), ("window", window))
        blocks: list[nn.Module] = [RLMBBlock(channels, state=state, mlp_ratio=mlp_ratio, window=window, index=i)
                                   for i in range(depth)]
        groups = self.get_submodule(layers)
        assert isinstance(groups, nn.ModuleList)
        module = f"{layers}.{len(groups)}.residual_group.blocks"
        self.slots = (*self.slots, SlotSpec(name, module, channels, downscale, depth, "rlmb", options=options))
        groups.append(create_group(channels, blocks))

    def _add_ends(self, channels: int, upscale: int) -> None:
        self.subtract_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.patch_embed = PatchNorm(channels)
        self.norm = MapNorm(channels)
        self.conv_after_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(channels, _FEATURES, 3, padding=1), nn.LeakyReLU())
        self.upsample = create_shuffles(_FEATURES, upscale)
        self.conv_last = nn.Conv2d(_FEATURES, 3, 3, padding=1)


def _list_steps(groups: int, low_groups: int) -> tuple[Step, ...]:
    steps = [Step("subtract_mean", free=("image",)), Step("conv_first", save="first"), Step("patch_embed")]
    for i in range(groups):
        steps += group_steps(f"layers.{i}")
        if i >= low_groups:
            continue
        steps += [Step(save="high")]
        steps += [Step("halve", load="first"), Step("patch_embed2")] if i == 0 else [Step(load="low")]
        steps += [*group_steps(f"layers2.{i}", save="low"), Step(f"layers3.{i}", load="high", pair="low",
                                                               free=("high",))]
    steps += [Step("norm", free=("low",)), Step("conv_after_body"),
              Step("conv_before_upsample", add="first", free=("first",)), Step("upsample"), Step("conv_last"),
              Step("add_mean")]
    return tuple(steps)


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of a released MambaCSR from its `state_dict`; KeyError or ValueError where none fit."""
    keys, block = list(state), "layers.0.residual_group.blocks.0"
    embed_dim = state["conv_first.weight"].shape[0]
    depths2 = count_blocks(keys, "layers2")
    return {"embed_dim": embed_dim, "d_state": state[f"{block}.self_attention.A_logs"].shape[1],
            "depths": count_blocks(keys, "layers"), "depths2": depths2, "cross_scale_scan": bool(depths2),
            "mlp_ratio": state[f"{block}.mlp.fc1.weight"].shape[0] / embed_dim,
            "upscale": infer_upscale(state, _FEATURES)}
