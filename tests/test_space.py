"""Slots, choices and genotypes: what is printed can be read back, and mistakes are told."""

from __future__ import annotations

import numpy as np
import pytest

from ens.space import Choice, SearchSpace, Slot, format_genotype, parse_choice, parse_genotype

TEACHER = Choice("restormer", 4, teacher=True)
SPACE = SearchSpace("s", (Slot("a", (TEACHER, Choice("vssd", 2), Choice("vssd", 4))), Slot("b", (TEACHER,)),
                          Slot("c", (TEACHER, Choice("conv", 1)))))


def test_labels_are_read_back() -> None:
    for text in ("mambair×2", "mambair*2", " mambair x 2 "):
        assert parse_choice(text) == Choice("mambair", 2)
    for choice in (Choice("vssd", 3), Choice("vssd", 1, (("gated", True), ("scale", 0.5), ("state", 16)))):
        assert parse_choice(choice.label) == choice


@pytest.mark.parametrize("text", ["", "mambair", "×2", "Mamba×2", "mambair×-1", "mambair×2×3"])
def test_other_labels_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="family×depth"):
        parse_choice(text)


def test_enumeration_is_complete_sorted_and_counted() -> None:
    genotypes = list(SPACE.enumerate())
    assert len(set(genotypes)) == len(genotypes) == SPACE.num_genotypes == 6 and genotypes == sorted(genotypes)
    assert SPACE.num_surrogates == 3 and genotypes[0] == SPACE.teacher


def test_samples_are_genotypes_of_the_space() -> None:
    rng = np.random.default_rng(0)
    assert {SPACE.check(SPACE.sample(rng)) for _ in range(200)} == set(SPACE.enumerate())


def test_genotypes_are_read_back_and_checked() -> None:
    for genotype in SPACE.enumerate():
        assert parse_genotype(format_genotype(genotype), SPACE) == genotype
    for text, message in (("0-0", "3 entries"), ("3-0-0", "slot a allows 0 to 2"), ("0-x-0", "not understood")):
        with pytest.raises(ValueError, match=message):
            parse_genotype(text, SPACE)


def test_the_penalty_counts_stages_and_surrogate_blocks() -> None:
    assert SPACE.penalty((0, 0, 0)) == 6.0 and SPACE.penalty((2, 0, 1)) == pytest.approx(0.4 + 2.0 + 0.1)


def test_a_transformer_choice_costs_its_share_of_the_stage_and_identity_nothing() -> None:
    """ENS prices what a block is: a quarter of a transformer stage is a quarter of its price, not a surrogate's."""
    slot = Slot("a", (TEACHER, Choice("restormer", 1), Choice("identity", 1), Choice("uformer", 2), Choice("conv", 3)))
    space = SearchSpace("s", (slot,))
    assert [space.penalty((index,)) for index in range(5)] == [2.0, 0.5, 0.0, 1.0, pytest.approx(0.3)]
    dearer = SearchSpace("s", (slot,), penalty_teacher=4.0, penalty_per_block=0.5, transformers=("conv",))
    assert [dearer.penalty((index,)) for index in range(5)] == [4.0, 0.5, 0.0, 1.0, 3.0]


def test_a_slot_starts_with_the_teacher_and_repeats_nothing() -> None:
    with pytest.raises(ValueError, match="teacher"):
        Slot("a", (Choice("vssd", 1), TEACHER))
    with pytest.raises(ValueError, match="different"):
        Slot("a", (TEACHER, Choice("vssd", 1), Choice("vssd", 1)))
