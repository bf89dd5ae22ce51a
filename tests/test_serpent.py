from __future__ import annotations

import pytest
import torch

from ens.blocks import create_stack
from ens.networks import create_network
from ens.networks.serpent import Serpent


def make_tiny(patch_size: int) -> Serpent:
    torch.manual_seed(0)
    network = create_network("serpent", embed_dim=8, depths=(1, 2, 1), patch_size=patch_size, d_state=2)
    assert isinstance(network, Serpent)
    return network.eval()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_run_can_be_cut_anywhere_and_slots_can_be_filled(patch_size: int) -> None:
    network, image = make_tiny(patch_size), torch.rand(1, 3, 16, 32)
    assert [spec.name for spec in network.slots] == ["encoder1", "encoder2", "bottleneck", "decoder2", "decoder1"]
    with torch.no_grad():
        whole = network.restore(image)
        assert whole.shape == image.shape
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
        captured = network.capture(image, [spec.name for spec in network.slots])
        for spec in network.slots:
            given, out = captured[spec.name]
            assert given.shape == out.shape == (1, spec.channels, 16 // spec.downscale, 32 // spec.downscale)
            network.fill(spec.name, create_stack("identity", spec.channels, 1))
        assert network(torch.rand(1, 3, 13, 7)).shape == (1, 3, 13, 7)


def test_gradient_reaches_every_parameter() -> None:
    network = make_tiny(2).train()
    network(torch.rand(1, 3, 8, 16)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_wrong_sizes_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="1, 2 or 4"):
        Serpent(patch_size=3)
    with pytest.raises(ValueError, match="at least 1"):
        Serpent(depths=(2, 0))
