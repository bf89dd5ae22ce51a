"""Meters: a value of every objective but the quality, and the identity that says what it was counted on."""

from __future__ import annotations

import pytest
import torch

from ens.evaluate.cost import count_cost
from ens.evaluate.meters import METERS, PEAK, build_peak
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import create_filling
from ens.objectives import LATENCY, OBJECTIVES, QUALITY
from ens.space import Choice

OPTIONS = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 1, 1]}


def test_every_objective_but_the_quality_has_a_meter() -> None:
    assert {*METERS, PEAK, QUALITY, LATENCY} == set(OBJECTIVES)


def test_meters_need_no_weights_and_count_the_whole_hybrid() -> None:
    with torch.device("meta"):
        skeleton = create_network("restormer", **OPTIONS)
    space = build_space("s", skeleton, choices=[Choice("conv", 1), Choice("vssd", 2)])
    meters = {name: build(skeleton, space) for name, build in METERS.items()}
    genotype = (0, 1, 2, 0, 1, 2, 0, 1)
    hybrid = create_network("restormer", **OPTIONS)
    for name, choice in space.replaced(genotype).items():
        hybrid.fill(name, create_filling(hybrid.slot(name), choice))
    assert meters["macs"].measure(genotype) == count_cost(hybrid, (1, 3, 256, 256)).macs
    assert meters["params"].measure(genotype) == sum(weight.numel() for weight in hybrid.parameters())
    assert meters["penalty"].measure(genotype) == space.penalty(genotype)


def test_identities_tell_prices_apart() -> None:
    with torch.device("meta"):
        skeleton = create_network("restormer", **OPTIONS)
    cheap, dear = (build_space("s", skeleton, choices=[Choice("conv", 1)], penalty_per_block=price)
                   for price in (0.1, 0.2))
    assert METERS["penalty"](skeleton, cheap).identity != METERS["penalty"](skeleton, dear).identity


def test_the_tally_of_a_meter_reaches_its_least_and_no_less() -> None:
    with torch.device("meta"):
        skeleton = create_network("restormer", **OPTIONS)
    space = build_space("s", skeleton, slots={"latent": [Choice("conv", 1), Choice("rep", 4)],
                                              "refinement": [Choice("rep", 1), Choice("identity", 1)]})
    meters = [*(build(skeleton, space) for build in METERS.values()), build_peak(skeleton, space, (64, 64))]
    for meter in meters:
        assert meter.tally.least == pytest.approx(min(map(meter.measure, space.enumerate())))
    assert meters[-1].tally.is_maximum
