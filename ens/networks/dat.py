"""DAT (Dual Aggregation Transformer, arXiv 2308.03364): sizes and key names of the released networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ens.blocks.dat import DATBlock
from ens.blocks.norm import MapNorm
from ens.networks.groups import MeanShift, create_shuffles, group_steps, infer_upscale
from ens.networks.steps import Network, SlotSpec, Step, count_row

_FEATURES = 64
"""Channels between the body and the pixels of "pixelshuffle", fixed in the released code."""
CONNECTIONS = ("1conv", "3conv")
UPSAMPLERS = ("pixelshuffle", "pixelshuffledirect")


class DAT(Network):
    """DAT with the published constructor names; `state_dict` keys are the released ones.

    Defaults are DAT ×4 (14.80 M parameters). DAT-S has `expansion_factor=2.0, split_size=(8, 16)`, DAT-2
    `expansion_factor=2.0`, and DAT-light, 572,766 parameters, `embed_dim=60, depth=(18,), num_heads=(6,),
    expansion_factor=2.0, resi_connection="3conv", upsampler="pixelshuffledirect"`. Input (B, 3, H, W) in [0, 1] ->
    (B, 3, sH, sW), not clamped, any H and W: as released, only queries, keys and values are padded to whole windows, so
    `size_multiple` is 1 (to reflect the image instead costs 0.025 dB on Set14 ×4). The blocks of each group are a slot,
    `group1` to `group{len(depth)}`. Batch normalisation takes its stored statistics, in training too. Raises ValueError
    for sizes that do not fit.
    """

    def __init__(self, *, embed_dim: int = 180, depth: Sequence[int] = (6,) * 6, num_heads: Sequence[int] = (6,) * 6,
                 expansion_factor: float = 4.0, split_size: Sequence[int] = (8, 32), resi_connection: str = "1conv",
                 upsampler: str = "pixelshuffle", upscale: int = 4) -> None:
        super().__init__()
        _check(depth, num_heads, split_size, resi_connection, upsampler)
        self.upscale = upscale
        self.slots = tuple(SlotSpec(
            f"group{i + 1}", f"layers.{i}.blocks", embed_dim, 1, blocks, "dat", heads,
            (("split_height", split_size[0]), ("split_width", split_size[1]), ("expansion_factor", expansion_factor),
             ("shift_first", i % 2 == 1))) for i, (blocks, heads) in enumerate(zip(depth, num_heads, strict=True)))
        self.steps = _list_steps(len(depth), upsampler)
        self.subtract_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.conv_first = nn.Conv2d(3, embed_dim, 3, padding=1)
        self.before_RG = nn.Sequential(nn.Identity(), MapNorm(embed_dim))  # the released one makes tokens of the map
        self.layers = nn.ModuleList(_create_group(spec, resi_connection) for spec in self.slots)
        self.norm = MapNorm(embed_dim)
        self.conv_after_body = _create_convolution(embed_dim, resi_connection)
        if upsampler == "pixelshuffle":
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, _FEATURES, 3, padding=1), nn.LeakyReLU())
            self.upsample = create_shuffles(_FEATURES, upscale)
            self.conv_last = nn.Conv2d(_FEATURES, 3, 3, padding=1)
        else:
            self.upsample = nn.Sequential(nn.Conv2d(embed_dim, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))


def _check(depth: Sequence[int], num_heads: Sequence[int], split_size: Sequence[int], resi_connection: str,
           upsampler: str) -> None:
    if not depth or len(depth) != len(num_heads):
        raise ValueError(f"depth and num_heads have one entry a group, got {depth} and {num_heads}")
    if len(split_size) != 2:
        raise ValueError(f"split_size is height and width of a window, got {split_size}")
    for name, given, allowed in (("resi_connection", resi_connection, CONNECTIONS),
                                 ("upsampler", upsampler, UPSAMPLERS)):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}")


def _create_group(spec: SlotSpec, resi_connection: str) -> nn.ModuleDict:
    """Blocks under `blocks` and what follows them under `conv`; `group_steps` runs it."""
    options: dict[str, Any] = dict(spec.options)
    blocks = (DATBlock(spec.channels, heads=spec.heads, index=index, **options) for index in range(spec.depth))
    return nn.ModuleDict({"blocks": nn.Sequential(*blocks),
                          "conv": _create_convolution(spec.channels, resi_connection)})


def _create_convolution(channels: int, resi_connection: str) -> nn.Module:
    """A 3×3 convolution, or three with a quarter of the channels between them."""
    if resi_connection == "1conv":
        return nn.Conv2d(channels, channels, 3, padding=1)
    narrow = channels // 4
    return nn.Sequential(nn.Conv2d(channels, narrow, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(narrow, narrow, 1),
                         nn.LeakyReLU(0.2), nn.Conv2d(narrow, channels, 3, padding=1))


def _list_steps(groups: int, upsampler: str) -> tuple[Step, ...]:
    body = (step for i in range(groups) for step in group_steps(f"layers.{i}", blocks="blocks"))
    names = ("conv_before_upsample", "upsample", "conv_last") if upsampler == "pixelshuffle" else ("upsample",)
    return (Step("subtract_mean", free=("image",)), Step("conv_first", save="first"), Step("before_RG"), *body,
            Step("norm"), Step("conv_after_body"), Step(names[0], add="first", free=("first",)),
            *(Step(name) for name in names[1:]), Step("add_mean"))


def infer_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options of a released DAT from its `state_dict`; KeyError or ValueError where none fit."""
    groups = [f"layers.{i}.blocks" for i in range(count_row(state, "layers"))]
    attention = "attn.attns.0"
    embed_dim = state["conv_first.weight"].shape[0]
    furthest = state[f"{groups[0]}.0.{attention}.rpe_biases"].max(0).values
    shuffled = "conv_before_upsample.0.weight" in state
    return {"embed_dim": embed_dim, "depth": tuple(count_row(state, group) for group in groups),
            "num_heads": tuple(2 * state[f"{group}.0.{attention}.pos.pos3.2.weight"].shape[0] for group in groups),
            "expansion_factor": state[f"{groups[0]}.0.ffn.fc1.weight"].shape[0] / embed_dim,
            "split_size": tuple(int(side) + 1 for side in furthest),
            "resi_connection": "1conv" if "conv_after_body.weight" in state else "3conv",
            "upsampler": "pixelshuffle" if shuffled else "pixelshuffledirect",
            "upscale": infer_upscale(state, _FEATURES if shuffled else 3)}
