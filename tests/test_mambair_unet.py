from __future__ import annotations

import pytest
import torch

from ens.networks import create_network
from ens.networks.mambair_unet import MambaIRUNet


@pytest.mark.parametrize(("mlp_ratio", "params"), [(2.0, 30_750_424), (1.5, 26_779_480)])
def test_parameter_counts_are_the_published_ones(mlp_ratio: float, params: int) -> None:
    with torch.device("meta"):
        network = MambaIRUNet(mlp_ratio=mlp_ratio)
    assert sum(p.numel() for p in network.parameters()) == params


def make_tiny() -> MambaIRUNet:
    torch.manual_seed(0)
    network = create_network("mambair_unet", dim=8, num_blocks=(1, 2, 1, 1), num_refinement_blocks=1, d_state=4)
    assert isinstance(network, MambaIRUNet)
    return network.eval()


def test_keys_are_restormers_skeleton_with_mambair_blocks() -> None:
    keys = set(make_tiny().state_dict())
    assert {"patch_embed.proj.weight", "encoder_level2.1.self_attention.x_proj_weight",
            "latent.0.conv_blk.cab.0.weight", "down1_2.body.0.weight", "reduce_chan_level3.weight",
            "refinement.0.skip_scale2", "output.weight"} <= keys


def test_any_size_keeps_its_size_and_the_run_can_be_cut_anywhere() -> None:
    network, image = make_tiny(), torch.rand(1, 3, 11, 18)
    with torch.no_grad():
        assert network(image).shape == image.shape
        image = torch.rand(1, 3, 8, 16)
        whole = network.restore(image)
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
