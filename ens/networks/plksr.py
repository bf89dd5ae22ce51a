"""PLKSR (arXiv 2404.11848): sizes and key names of the released super-resolution networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ens.blocks.plk import MIXERS, PLKBlock
from ens.networks.steps import Network, SlotSpec, Step, count_row


class RepeatChannels(nn.Module):
    """(B, C, H, W) -> (B, count·C, H, W), every channel `count` times in a row.

    In front of a pixel shuffle this is nearest-neighbour upsampling, without a resize in the exported graph.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, i:i + 1] for i in range(x.shape[1]) for _ in range(self.count)], 1)


class PLKSR(Network):
    """PLKSR with the published constructor names; `state_dict` keys are the released ones.

    Defaults are the full network (×2 7,365,324 parameters, ×3 7,373,979, ×4 7,386,096); the tiny one is
    `n_blocks=12, kernel_size=13, use_ea=False` (2,349,772, 2,358,427, 2,370,544). Input (B, 3, H, W) in [0, 1] ->
    (B, 3, sH, sW), any H and W. Every block is a slot, `block1` to `block{n_blocks}`. Raises ValueError for sizes
    that do not fit.
    """

    def __init__(self, *, dim: int = 64, n_blocks: int = 28, upscaling_factor: int = 4, ccm_type: str = "DCCM",
                 kernel_size: int = 17, split_ratio: float = 0.25, use_ea: bool = True,
                 with_idt: bool = False) -> None:
        super().__init__()
        if min(dim, n_blocks, upscaling_factor) < 1:
            raise ValueError("dim, n_blocks and upscaling_factor must be at least 1, got "
                             f"{dim}, {n_blocks} and {upscaling_factor}")
        repeats = upscaling_factor**2
        options = (("kernel_size", kernel_size), ("split_ratio", split_ratio), ("ccm_type", ccm_type),
                   ("use_ea", use_ea), ("with_idt", with_idt), ("max_large_channels", dim))
        self.upscale = upscaling_factor
        self.slots = tuple(SlotSpec(f"block{i}", f"feats.{i}", dim, 1, 1, "plk", options=options, single=True)
                           for i in range(1, n_blocks + 1))
        self.steps = (*(Step(f"feats.{i}") for i in range(n_blocks + 1)), Step(f"feats.{n_blocks + 1}", save="detail"),
                      Step("repeat", load="image", free=("image",)), Step("to_img", add="detail", free=("detail",)))
        blocks = (PLKBlock(dim, kernel_size=kernel_size, split_ratio=split_ratio, ccm_type=ccm_type, use_ea=use_ea,
                           with_idt=with_idt, max_large_channels=dim) for _ in range(n_blocks))
        self.feats = nn.Sequential(nn.Conv2d(3, dim, 3, padding=1), *blocks,
                                   nn.Conv2d(dim, 3 * repeats, 3, padding=1))
        for name in ("0", str(n_blocks + 1)):
            nn.init.trunc_normal_(self.feats.get_parameter(f"{name}.weight"), std=0.02)
        self.repeat = RepeatChannels(repeats)
        self.to_img = nn.PixelShuffle(upscaling_factor)


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of a released PLKSR from its `state_dict`; KeyError or ValueError where none fit."""
    n_blocks = count_row(state, "feats") - 2
    dim = state["feats.0.weight"].shape[0]
    large, _, kernel_size, _ = state["feats.1.lk.conv.weight"].shape
    kernels = (state["feats.1.channe_mixer.0.weight"].shape[-1], state["feats.1.channe_mixer.2.weight"].shape[-1])
    mixers = {sizes: name for name, sizes in MIXERS.items()}
    return {"dim": dim, "n_blocks": n_blocks, "kernel_size": kernel_size, "ccm_type": mixers[kernels],
            "upscaling_factor": round((state[f"feats.{n_blocks + 1}.weight"].shape[0] / 3) ** 0.5),
            "split_ratio": large / dim, "use_ea": "feats.1.attn.f.0.weight" in state}
