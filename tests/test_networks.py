"""Networks: published sizes and keys, one traversal, any size of image."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ens.blocks.bounds import MAX_PARAMETERS
from ens.networks import create_network
from ens.networks.checkpoints import hash_weights
from ens.networks.restormer import Restormer
from ens.networks.steps import Network, block_slots, pad_to_multiple

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
SMALL: dict[str, Any] = {"dim": 8, "num_blocks": (1, 2, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)}


def small(**options: Any) -> Network:
    torch.manual_seed(0)
    return create_network("restormer", **{**SMALL, **options}).eval()


@pytest.mark.parametrize(("options", "parameters"), [
    ({}, 26_126_644), ({"layer_norm": "BiasFree"}, 26_111_668),
    ({"in_channels": 1, "out_channels": 1, "layer_norm": "BiasFree"}, 26_109_076),
    ({"in_channels": 6, "dual_pixel": True}, 26_132_548)], ids=["WithBias", "BiasFree", "gray", "dual_pixel"])
def test_released_restormers_have_the_released_number_of_parameters(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        network = create_network("restormer", **options)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(block_slots(network.slots)) == 44


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent: golden vectors not compared")
@pytest.mark.parametrize("name", ["restormer_biasfree", "restormer_withbias"])
def test_restormer_reproduces_the_released_implementation(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        arguments = file.metadata()
    norm = arguments.pop("LayerNorm_type")
    network = create_network("restormer", layer_norm=norm,
                             **{key: ast.literal_eval(value) for key, value in arguments.items()})
    network.load_state_dict({key.removeprefix("state."): value for key, value in tensors.items()
                             if key.startswith("state.")}, strict=True)
    with torch.no_grad():
        error = (network(tensors["input.x"]) - tensors["output.y"]).norm() / tensors["output.y"].norm()
    assert error < 1e-4


@pytest.mark.parametrize("options", [{}, {"in_channels": 6, "dual_pixel": True}], ids=["plain", "dual_pixel"])
def test_running_in_two_parts_equals_running_at_once(options: dict[str, Any]) -> None:
    network = small(**options)
    image = torch.rand(1, network.in_channels, 16, 24)
    with torch.no_grad():
        whole = network.run(network.start(image))["x"]
        for stop in range(len(network.steps) + 1):
            state = network.run(network.start(image), 0, stop)
            assert torch.equal(network.run(state, stop)["x"], whole), f"split before step {stop}"


def test_kept_features_are_freed_when_nobody_reads_them_any_more() -> None:
    network = small()
    with torch.no_grad():
        assert set(network.run(network.start(torch.rand(1, 3, 8, 8)))) == {"x"}


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 16), (33, 41)])
def test_any_size_comes_back(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert small()(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_padding_is_reflected_on_the_right_and_bottom_only() -> None:
    image = torch.arange(30.0).view(1, 1, 5, 6)
    padded = pad_to_multiple(image, 8)
    assert padded.shape == (1, 1, 8, 8)
    assert torch.equal(padded[..., :5, :6], image)
    assert torch.equal(padded[..., :5, 6:], image[..., [4, 3]])
    assert torch.equal(padded[..., 5:, :6], image[..., [3, 2, 1], :])
    assert torch.equal(pad_to_multiple(image[..., :2, :2], 8)[0, 0, :, 0], torch.tensor([0.0, *[6.0] * 7]))


def test_a_global_residual_is_added_unless_dual_pixel() -> None:
    network = small()
    torch.nn.init.zeros_(network.output.weight)  # type: ignore[arg-type, union-attr]
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(image), image)


def test_capture_sees_what_the_slots_see() -> None:
    network, image = small(), torch.rand(1, 3, 16, 16)
    features = network.capture(image, ["latent", "encoder_level2.1"])
    with torch.no_grad():
        for name, (before, after) in features.items():
            assert torch.equal(network.get_submodule(network.slot(name).module)(before), after)
            assert before.shape == (1, network.slot(name).channels, *(16 // network.slot(name).downscale,) * 2)


def test_the_recipe_rebuilds_the_network() -> None:
    network = small(layer_norm="BiasFree")
    assert network.recipe is not None
    name, options = network.recipe
    assert create_network(name, **options).state_dict().keys() == network.state_dict().keys()


def test_wrong_names_list_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"'restorer' is unknown.*restormer"):
        create_network("restorer")
    with pytest.raises(ValueError, match=r"no option 'depth'.*num_blocks"):
        create_network("restormer", depth=3)
    with pytest.raises(KeyError, match="encoder_level1"):
        small().slot("encoder")
    with pytest.raises(ValueError, match="layer_norm"):
        create_network("restormer", layer_norm="None")


@pytest.mark.parametrize(("name", "options", "message"), [
    ("restormer", {"dim": 10**9}, "dim is a whole number from 1 to 4096"), ("restormer", {"dim": -48}, "dim"),
    ("restormer", {"num_blocks": (10**9, 1, 1, 1)}, "num_blocks is a list of up to 32 whole numbers from 1 to 256"),
    ("restormer", {"num_blocks": (0, 1, 1, 1)}, "num_blocks"), ("restormer", {"num_blocks": "4444"}, "num_blocks"),
    ("restormer", {"num_refinement_blocks": 10**9}, "num_refinement_blocks"), ("restormer", {"bias": "yes"}, "bias"),
    ("restormer", {"dim": 4000, "heads": (1, 1, 1, 1)}, "would have .* parameters; allowed: 500,000,000"),
    ("mambacsr", {"depths": (1,) * 33}, "depths is a list of up to 32"), ("plksr", {"n_blocks": 10**9}, "n_blocks"),
    ("plksr", {"upscaling_factor": 10**6}, "upscaling_factor"), ("dvmsr", {"d_state": 10**9}, "d_state"),
    ("uformer", {"win_size": 10**5}, "win_size"), ("serpent", {"expand": 1e12}, "expand is a number above 0"),
])
def test_sizes_that_nobody_can_mean_are_refused_before_anything_is_built(
        name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network(name, **options)


def test_the_bounds_leave_room_for_every_published_size_and_draw_no_random_number() -> None:
    with torch.device("meta"):
        largest = create_network("uformer", embed_dim=32, depths=(1, 2, 8, 8, 2, 8, 8, 2, 1))
    assert sum(parameter.numel() for parameter in largest.parameters()) * 5 < MAX_PARAMETERS
    torch.manual_seed(3)
    direct = Restormer(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 1, 1))
    torch.manual_seed(3)
    created = create_network("restormer", dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 1, 1))
    assert hash_weights(created) == hash_weights(direct)
