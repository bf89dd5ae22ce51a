"""Released files of every network are recognised by their keys, and their sizes inferred."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ens.networks import create_network
from ens.networks.checkpoints import SNIFFERS, load_checkpoint

SIZES: dict[str, dict[str, Any]] = {
    "restormer": {"dim": 8, "num_blocks": (1, 2, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)},
    "mambair_unet": {"dim": 8, "num_blocks": (1, 2, 1, 1), "num_refinement_blocks": 2, "mlp_ratio": 1.5, "d_state": 4},
    "plksr": {"dim": 16, "n_blocks": 2, "kernel_size": 5, "upscaling_factor": 3, "use_ea": False},
    "dvmsr": {"embed_dim": 12, "depths": (1, 2), "upscale": 3},
    "dat": {"embed_dim": 16, "depth": (3, 1), "num_heads": (2, 4), "split_size": (2, 4), "upscale": 2},
    "mambacsr": {"embed_dim": 8, "d_state": 2, "depths": (1, 2), "depths2": (1,), "upscale": 2},
}


@pytest.mark.parametrize("name", SNIFFERS)
def test_a_released_file_is_recognised(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, image = create_network(name, **SIZES[name]).eval(), torch.rand(1, 3, 16, 16)
    torch.save({"params": network.state_dict()}, tmp_path / "released.pth")
    opened = load_checkpoint(tmp_path / "released.pth")
    assert opened.recipe is not None and opened.recipe[0] == name
    with torch.no_grad():
        assert torch.equal(opened(image), network(image))


def test_no_network_passes_for_another() -> None:
    states = {name: create_network(name, **SIZES[name]).state_dict() for name in SNIFFERS}
    for name, sniffer in SNIFFERS.items():
        assert [other for other, state in states.items() if all(key in state for key in sniffer.markers)] == [name]
