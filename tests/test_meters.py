"""Meters: a value of every objective but the quality, and the identity that says what it was counted on."""

from __future__ import annotations

import torch

from ens.evaluate.cost import count_cost
from ens.evaluate.meters import METERS, Meter, build_meters
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import create_filling
from ens.objectives import LATENCY, OBJECTIVES
from ens.space import Choice

OPTIONS = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 1, 1]}


def test_every_objective_but_the_quality_has_a_meter() -> None:
    assert {*METERS, "psnr_drop_db", LATENCY} == set(OBJECTIVES)


def test_meters_need_no_weights_and_count_the_whole_hybrid() -> None:
    with torch.device("meta"):
        skeleton = create_network("restormer", **OPTIONS)
    space = build_space("s", skeleton, choices=[Choice("conv", 1), Choice("vssd", 2)])
    meters = build_meters(skeleton, space)
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
    assert build_meters(skeleton, cheap)["penalty"].identity != build_meters(skeleton, dear)["penalty"].identity


def test_a_meter_may_be_a_maximum() -> None:
    peak = Meter("largest slot", lambda genotype: float(max((3, 5, 4)[index] for index in genotype)))
    assert peak.measure((0, 1, 2)) == 5.0
