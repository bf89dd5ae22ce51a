"""Every shipped study names slots, families and options that exist, and states the size it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ens.config import load_study
from ens.networks.steps import create_filling
from ens.run_folder import RunFolder

SPACES = Path(__file__).resolve().parents[1] / "search_spaces"
SIZES = {"restormer_denoise": (8, 34_560, 22), "restormer_derain": (8, 34_560, 22), "restormer_deblur": (8, 34_560, 22),
         "plksr_sr_x4": (28, 5**28, 112), "dvmsr_sr_x4": (4, 4_096, 28), "mambacsr_csr_x4": (7, 7**7, 42),
         "uformer_denoise": (9, 7**9, 54), "dat_sr_x4": (18, 6**18, 90)}


def test_every_study_is_listed_here() -> None:
    assert {path.stem for path in SPACES.glob("*.yaml")} >= set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_space_has_the_size_it_claims_and_every_choice_can_be_built(name: str) -> None:
    study = load_study(SPACES / f"{name}.yaml")
    run = RunFolder(Path(), study)
    network, space = run.skeleton, run.space
    with torch.device("meta"):
        assert (len(space.slots), space.num_genotypes, space.num_surrogates) == SIZES[name]
        built = set()
        for slot in space.slots:
            for choice in slot.choices[1:]:
                spec = network.slot(slot.name)
                if (spec.channels, spec.heads, choice.label) not in built:
                    create_filling(spec, choice)
                    built.add((spec.channels, spec.heads, choice.label))
