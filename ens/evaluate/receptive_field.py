"""Effective receptive field of a slot: what the centre of its output depends on (Luo et al. 2016; ENS, figure 2).

Shapes: features (B, C, H, W) of the slot; maps (H, W), the shares of the energy, which sum to 1.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from ens.data.pairs import ValidationImage
from ens.networks.steps import Network, pad_to_multiple

EnergyMap = NDArray[np.float64]

_FLOOR = 1e-7
"""Smallest share of the energy that the picture still tells from none."""


def measure_receptive_field(module: nn.Module, features: Sequence[Tensor], *, probes: int = 4,
                            seed: int = 0) -> EnergyMap:
    """Strength of the gradient of the centre output with respect to every input position: its norm over channels.

    The output is the slot's own update, output − input: the identity path would put one spike at every centre. The norm
    itself is summed, not its square, by which restormer, vssd and conv all measure 3 px (results/LOG.md). All channels
    of the centre count: the norm of the whole Jacobian is estimated with `probes` random signs a map (Hutchinson).
    Maps of several sizes are averaged over the smallest, centres together. Raises ValueError where no gradient, or one
    that is not finite, arrives.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (min(given.shape[axis] for given in features) for axis in (-2, -1))
    energy = np.zeros((height, width))
    for given in features:
        given = given.detach().clone().requires_grad_()
        row, column = given.shape[-2] // 2, given.shape[-1] // 2
        with torch.enable_grad():
            centre = (module(given) - given)[..., row, column]
        for _ in range(probes):
            signs = 2.0 * torch.randint(2, centre.shape, generator=generator) - 1
            (gradient,) = torch.autograd.grad(centre, given, signs.to(centre), retain_graph=True)
            part = gradient.double().square().sum((0, 1)).sqrt().cpu().numpy()
            top, left = row - height // 2, column - width // 2
            energy += part[top:top + height, left:left + width]
    total = energy.sum()
    if not 0 < total < np.inf:
        raise ValueError(f"the gradient of the centre has energy {total}; there is no receptive field to measure")
    return np.asarray(energy / total)


def measure_slot(network: Network, slot: str, images: Sequence[ValidationImage], *,
                 module: nn.Module | None = None) -> EnergyMap:
    """`measure_receptive_field` of what fills a slot, or of `module` in its place, on the features of these images."""
    features = [network.capture(pad_to_multiple(image.degraded[None], network.size_multiple), [slot])[slot][0]
                for image in images]
    return measure_receptive_field(module or network.content(slot), features)


def energy_side_px(energy: EnergyMap, share: float) -> int:
    """Side of the smallest square around the centre that holds `share` (0 to 1) of the energy, in the map's pixels."""
    rows, columns = (np.abs(np.arange(size) - size // 2) for size in energy.shape)
    radius = np.maximum(rows[:, None], columns[None, :])
    held = np.cumsum(np.bincount(radius.ravel(), weights=energy.ravel()))
    return 2 * int(np.searchsorted(held, share * held[-1])) + 1


def draw_receptive_fields(title: str, rows: Mapping[str, Mapping[str, EnergyMap]]) -> bytes:
    """A PNG with one row a choice and one column a state (name -> map), all on one logarithmic scale."""
    columns = list(dict.fromkeys(state for row in rows.values() for state in row))
    figure = Figure(figsize=(2.3 * len(columns) + 0.8, 2.5 * len(rows) + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (choice, row) in zip(axes, rows.items(), strict=True):
        for axis, state in zip(line, columns, strict=True):
            axis.set_axis_off()
            if state in row:
                shares = np.log10(np.maximum(row[state], _FLOOR))
                image = axis.imshow(shares, cmap="magma", vmin=np.log10(_FLOOR), vmax=0)
                sides = ", ".join(f"{share:.0%}: {energy_side_px(row[state], share)} px" for share in (0.5, 0.95))
                axis.set_title(f"{choice}, {state}\n{sides}", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the energy, log10")
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
