"""Blocks that repeat: which of them count as equal, and that each keeps its own weights in the exported graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from ens.export.formats import write_checked
from ens.export.repeats import list_kinds
from ens.networks import create_network
from ens.networks.steps import Network
from ens.networks.wrap import wrap_network


def small_restormer() -> Network:
    torch.manual_seed(0)
    return create_network("restormer", dim=8, num_blocks=(3, 2, 1, 1), num_refinement_blocks=1).eval()


def names(network: Network) -> list[list[str]]:
    return [[block.name for block in members] for members in list_kinds(network)]


def test_blocks_of_equal_sizes_are_one_kind_across_stages() -> None:
    assert names(small_restormer()) == [
        ["encoder_level1.0", "encoder_level1.1", "encoder_level1.2"],
        ["encoder_level2.0", "encoder_level2.1", "decoder_level2.0", "decoder_level2.1"],
        ["encoder_level3.0", "decoder_level3.0"], ["latent.0"],
        ["decoder_level1.0", "decoder_level1.1", "decoder_level1.2", "refinement.0"]]


def test_a_block_whose_options_differ_is_a_kind_of_its_own() -> None:
    network = create_network("uformer", embed_dim=8, depths=(4, *(1,) * 8), num_heads=(1,) * 9, win_size=2)
    assert names(network)[:2] == [[f"encoderlayer_0.blocks.{i}" for i in (0, 2)],  # windows as they are
                                  [f"encoderlayer_0.blocks.{i}" for i in (1, 3)]]  # windows shifted by half


@pytest.mark.parametrize("share", ["a weight", "the block"])
def test_a_block_that_shares_is_in_no_kind(share: str) -> None:
    network = small_restormer()
    first, second, _ = network.get_submodule("encoder_level1").children()
    if share == "a weight":
        second.norm1.body.weight = first.norm1.body.weight
    else:
        network.encoder_level1[1] = first
    assert names(network)[0] == ["encoder_level1.2"]


@pytest.mark.slow
def test_every_block_keeps_its_own_weights_and_each_kind_is_traced_once(tmp_path: Path) -> None:
    network, lines = small_restormer(), []
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    modules = dict(network.named_modules())
    error = write_checked(network, tmp_path / "net.onnx", photo=torch.rand(1, 3, 40, 56), on_event=lines.append)
    assert error < 1e-5
    assert sum("tracing" in line and "kind" in line for line in lines[1:]) == 5
    assert {node.domain for node in onnx.load(tmp_path / "net.onnx").graph.node} == {""}
    assert dict(network.named_modules()) == modules  # the marks are gone from the network
    assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "net.onnx").read_bytes()  # no traces of frames


def test_the_network_is_whole_again_after_a_failed_export(tmp_path: Path) -> None:
    class Refusing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_exporting():
                raise ValueError("this block cannot be traced")
            return x

    network = small_restormer()
    network.fill("latent.0", Refusing())
    modules = dict(network.named_modules())
    with pytest.raises(RuntimeError, match="cannot be traced"):
        write_checked(network, tmp_path / "net.onnx", photo=torch.rand(1, 3, 40, 56))
    assert dict(network.named_modules()) == modules


def test_blocks_that_do_nothing_repeat_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Identity(), nn.Identity(), nn.Conv2d(8, 3, 3, padding=1))
    network = wrap_network(module.eval(), slots=["1", "2"], name="empty")
    assert names(network) == [["wrapped.1", "wrapped.2"]]
    assert write_checked(network, tmp_path / "net.onnx", photo=torch.rand(1, 3, 40, 56)) < 1e-5
