"""Hybrids: built from a teacher and fillings, stored in one file that describes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ens.blocks import FAMILIES, create_stack
from ens.export.hybrid import build_hybrid, load_hybrid, open_network, read_facts, save_hybrid
from ens.networks import create_network
from ens.networks.checkpoints import CheckpointError, hash_weights, load_checkpoint, save_checkpoint
from ens.networks.steps import Network, create_filling
from ens.space import Choice

FACTS = {"task": "denoise", "protocol": "denoise-color-awgn", "teacher_sha256": "ab" * 32, "genotype": "0-1"}


def teacher() -> Network:
    torch.manual_seed(0)
    return create_network("restormer", dim=8, num_blocks=(1, 2, 1, 1), num_refinement_blocks=1, heads=(1, 2, 2, 4))


def fill(network: Network, choices: dict[str, Choice]) -> dict[str, nn.Module]:
    return {name: create_filling(network.slot(name), choice) for name, choice in choices.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_bit_for_bit(tmp_path: Path, family: str) -> None:
    network = teacher()
    choices = {"latent": Choice(family, 2), "encoder_level2.1": Choice(family, 1)}
    hybrid = build_hybrid(network, fill(network, choices))
    save_hybrid(tmp_path / "h.safetensors", hybrid, choices=choices, facts=FACTS)
    loaded = open_network(tmp_path / "h.safetensors")
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(image), hybrid(image))
    assert hash_weights(loaded) == hash_weights(hybrid)
    assert not loaded.training


def test_options_and_facts_are_kept(tmp_path: Path) -> None:
    network = teacher()
    choices = {"latent": Choice("vssd", 1, (("state", 8), ("expand", 0.5)))}
    save_hybrid(tmp_path / "h.safetensors", build_hybrid(network, fill(network, choices)), choices=choices, facts=FACTS)
    assert load_hybrid(tmp_path / "h.safetensors").latent[0].mixer.states == 8  # type: ignore[index, union-attr]
    assert read_facts(tmp_path / "h.safetensors") == FACTS


def test_building_leaves_teacher_and_fillings_alone() -> None:
    network = teacher()
    before, fillings = hash_weights(network), {"latent": create_stack("conv", 64, 1)}
    hybrid = build_hybrid(network, fillings)
    for parameter in hybrid.parameters():
        nn.init.ones_(parameter)
    assert hash_weights(network) == before
    assert not any((value == 1).all() for name, value in fillings["latent"].state_dict().items() if "project" in name)


def test_the_filling_is_what_runs() -> None:
    network = teacher()
    hybrid = build_hybrid(network, {"latent": nn.Identity()})
    image, seen = torch.rand(1, 3, 16, 16), network.slot_step("latent")
    with torch.no_grad():
        before = network.run(network.start(image), stop=seen)
        expected = network.run(before, seen + 1)["x"]
        assert torch.equal(hybrid.restore(image), expected)


def test_a_stage_and_its_block_cannot_both_be_filled() -> None:
    with pytest.raises(ValueError, match="inside 'latent'"):
        build_hybrid(teacher(), {"latent": nn.Identity(), "latent.0": nn.Identity()})
    with pytest.raises(KeyError, match="no slot 'middle'"):
        build_hybrid(teacher(), {"middle": nn.Identity()})


def test_a_checkpoint_opens_as_well_and_is_no_hybrid(tmp_path: Path) -> None:
    network = teacher()
    save_checkpoint(tmp_path / "t.safetensors", network, facts={"task": "denoise"})
    assert hash_weights(open_network(tmp_path / "t.safetensors")) == hash_weights(network)
    assert read_facts(tmp_path / "t.safetensors") == {"task": "denoise"}
    with pytest.raises(CheckpointError, match="no hybrid"):
        load_hybrid(tmp_path / "t.safetensors")


def test_a_hybrid_is_no_checkpoint(tmp_path: Path) -> None:
    save_hybrid(tmp_path / "h.safetensors", build_hybrid(teacher(), {}), choices={}, facts={})
    with pytest.raises(CheckpointError, match="open_network"):
        load_checkpoint(tmp_path / "h.safetensors")


def test_nothing_is_written_for_bad_weights_or_clashing_facts(tmp_path: Path) -> None:
    network = teacher()
    with pytest.raises(ValueError, match="network"):
        save_hybrid(tmp_path / "h.safetensors", network, choices={}, facts={"network": "mine"})
    network.output.weight.data[0] = float("inf")  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="infinity"):
        save_hybrid(tmp_path / "h.safetensors", network, choices={}, facts={})
    assert not list(tmp_path.iterdir())


def rewrite(path: Path, *, metadata: dict[str, Any] | None = None, **tensors: torch.Tensor) -> None:
    with safe_open(path, "pt") as file:
        kept = dict(file.metadata())
    save_file({**load_file(path), **tensors}, path, {**kept, **(metadata or {})})


@pytest.mark.parametrize(("change", "expected"), [
    ({"output.bias": torch.ones(3)}, "unexpected keys: output.bias"),
    ({"output.weight": torch.ones(3, 16, 3, 3)}, "hash differs"),
    ({"metadata": {"network": "nafnet"}}, "nafnet"),
    ({"metadata": {"slots": "{not json"}}, "is damaged.*entry slots.*sound copy"),
    ({"metadata": {"slots": "[]"}}, "is damaged.*entry slots"),
    ({"metadata": {"slots": '{"latent": {"family": "conv", "depth": 1000000000, "options": {}}}'}},
     "entry slots.latent"),
    ({"metadata": {"slots": '{"latent": {"family": "conv", "depth": 1, "options": {"expand": 1e9}}}'}},
     "option expand is a number above 0, 16 at most"),
    ({"metadata": {"slots": '{"middle": {"family": "conv", "depth": 1, "options": {}}}'}}, "no slot 'middle'"),
    ({"metadata": {"options": '{"num_blocks": [1, 1, 1, 100000000]}'}}, "num_blocks is a list of up to 32"),
    ({"metadata": {"options": "[" * 100_000}}, "entry options"),
    ({"metadata": {"weights_sha256": "12"}}, "entry weights_sha256"),
    ({"metadata": {"slots": '{"latent": {"family": "magic", "depth": 1, "options": {}}}'}}, "magic"),
    ({"metadata": {"format": "ens hybrid 9"}}, "ens hybrid 9"),
])
def test_a_file_changed_afterwards_is_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "h.safetensors"
    save_hybrid(path, teacher(), choices={}, facts=FACTS)
    rewrite(path, **change)
    with pytest.raises(CheckpointError, match=expected):
        open_network(path)
