"""The space of a network: what may be offered where, and what is refused when a study is read."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ens.networks import create_network, wrap
from ens.networks.slots import build_space
from ens.networks.steps import Network, create_filling
from ens.networks.wrap import wrap_network
from ens.space import Choice, parse_choice

CONV = [Choice("conv", 1)]


@pytest.fixture(autouse=True)
def _forget_wrapped_modules() -> Iterator[None]:
    yield
    wrap._WRAPPED.clear()


@pytest.fixture(scope="module")
def network() -> Network:
    with torch.device("meta"):
        return create_network("restormer", dim=8, num_blocks=[1, 2, 1, 2], num_refinement_blocks=1)


@pytest.mark.parametrize("slots", [["latent", "latent.0"], ["latent.1", "encoder_level1", "latent"],
                                   ["encoder_level1.0", "encoder_level1"]])
def test_a_stage_and_its_own_block_are_refused_with_both_names(network: Network, slots: list[str]) -> None:
    with pytest.raises(ValueError, match=r"slot '(latent|encoder_level1)\.\d' lies in slot '(latent|encoder_level1)'"):
        build_space("s", network, slots=dict.fromkeys(slots, CONV))


def test_stages_whose_names_begin_alike_and_blocks_of_one_stage_do_not_overlap(network: Network) -> None:
    names = ["latent.0", "latent.1", "encoder_level1", "encoder_level2"]
    space = build_space("s", network, slots=dict.fromkeys(names, CONV))
    assert {slot.name for slot in space.slots} == set(names)


def test_nested_slots_of_a_wrapped_module_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 3, 1))
    nested = wrap_network(module, slots=["1", "1.0"], name="nested")
    with pytest.raises(ValueError, match=r"'1\.0' lies in slot '1'"):
        build_space("s", nested, choices=CONV)
    assert len(build_space("s", nested, slots={"1.0": CONV}).slots) == 1


@pytest.mark.parametrize("text", ["conv×1000000000", "identity×257", "restormer×0", "mambair×100000000000000000000"])
def test_absurd_depths_are_refused_at_once_with_the_range(network: Network, text: str) -> None:
    choice, started = parse_choice(text), time.monotonic()
    with pytest.raises(ValueError, match=r"depth of .*; allowed: 1 to 256"):
        build_space("s", network, choices=[choice])
    with pytest.raises(ValueError, match=r"slot latent: .*; allowed: 1 to 256"):
        create_filling(network.slot("latent"), choice)
    assert time.monotonic() - started < 1


def test_prices_of_a_space_come_from_its_options(network: Network) -> None:
    choices = [Choice("mambair", 1), Choice("restormer", 1)]
    usual = build_space("s", network, slots={"latent": choices})
    other = build_space("s", network, slots={"latent": choices}, penalty_teacher=3.0, transformers=["mambair"])
    assert [usual.penalty((i,)) for i in range(3)] == [2.0, 0.1, 1.0]
    assert [other.penalty((i,)) for i in range(3)] == [3.0, 1.5, 0.1]
    assert other.transformers == ("mambair",)


def test_words_there_are_not_are_refused_with_those_there_are(network: Network) -> None:
    with pytest.raises(ValueError, match="'blok'; allowed: stage, pair, block"):
        build_space("s", network, granularity="blok")
    with pytest.raises(ValueError, match=(r"'restorer' \(did you mean restormer\?\) "
            r"to price as a transformer; allowed: restormer, mambair")):
        build_space("s", network, transformers=["restorer"])
    with pytest.raises(ValueError, match="no slot 'middle'; the network has encoder_level1"):
        build_space("s", network, slots={"middle": CONV})


def test_pairs_of_blocks_are_slots_and_one_that_is_left_over_is_its_own() -> None:
    torch.manual_seed(0)
    network = create_network("restormer", dim=8, num_blocks=[2, 1, 1, 5], num_refinement_blocks=1).eval()
    space = build_space("s", network, granularity="pair", choices=[Choice("restormer", 1)])
    names = [slot.name for slot in space.slots]
    assert names[0] == "encoder_level1.0-1"
    assert [name for name in names if name.startswith("latent")] == ["latent.0-1", "latent.2-3", "latent.4"]
    image = torch.rand(1, 3, 16, 24)
    found = network.capture(image, ["latent", "latent.0-1", "latent.1", "latent.2-3"])
    assert torch.equal(found["latent.0-1"][0], found["latent"][0])
    assert torch.equal(found["latent.0-1"][1], found["latent.1"][1])
    with torch.no_grad():
        assert torch.equal(network.content("latent.2-3")(found["latent.2-3"][0]), found["latent.2-3"][1])
        before = network(image)
        network.fill("latent.0-1", network.content("latent.0-1"))
        assert torch.equal(network(image), before)
        network.fill("latent.2-3", nn.Identity())
        after = network.capture(image, ["latent.2-3", "latent.1", "latent.4"])
    assert torch.equal(after["latent.4"][0], after["latent.1"][1]), "nothing of the pair is left"


@pytest.mark.parametrize("slots", [["latent.0-1", "latent.1"], ["latent.0-1", "latent"], ["latent.0", "latent.0-1"]])
def test_a_pair_and_what_overlaps_it_are_refused(network: Network, slots: list[str]) -> None:
    with pytest.raises(ValueError, match="lies in slot"):
        build_space("s", network, slots=dict.fromkeys(slots, CONV))
