"""Prefix cache and cost table against plain evaluation and hand counts."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ens.data.images import Fingerprint
from ens.data.pairs import ValidationImage, ValidationSet
from ens.evaluate.cost import _LiveBytes as LiveBytes
from ens.evaluate.cost import build_cost_table, count_cost
from ens.evaluate.evaluator import CACHE_BYTES, Evaluator, evaluate_protocols
from ens.evaluate.meters import METERS
from ens.evaluate.metrics import score
from ens.evaluate.protocols import find_protocol
from ens.evaluate.racing import Race
from ens.networks import create_network
from ens.networks.steps import Network, create_filling
from ens.space import Choice, Measurement, SearchSpace, Slot

PROTOCOL = find_protocol("denoise-color-awgn")


def network() -> Network:
    torch.manual_seed(0)
    return create_network("restormer", dim=8, num_blocks=[2, 1, 1, 1], num_refinement_blocks=1, heads=[1, 1, 1, 1],
                          layer_norm="BiasFree").eval()


def images(count: int = 2) -> ValidationSet:
    generator = torch.Generator().manual_seed(1)
    made = tuple(ValidationImage(f"{i}.png", torch.rand(3, 24, 19 + i, generator=generator),
                                 torch.rand(3, 24, 19 + i, generator=generator)) for i in range(count))
    return ValidationSet(made, Fingerprint(count, "24×19", "0" * 64))


def space_of(net: Network, names: list[str], choices: list[Choice]) -> SearchSpace:
    specs = [net.slot(name) for name in names]
    return SearchSpace("t", tuple(Slot(spec.name, (Choice(spec.family, spec.depth, teacher=True), *choices))
                                  for spec in specs))


def fillings_of(net: Network, space: SearchSpace) -> list[list[nn.Module | str | None]]:
    return [[None, *(create_filling(net.slot(slot.name), choice).eval() for choice in slot.choices[1:])]
            for slot in space.slots]


@pytest.mark.parametrize("names", [["encoder_level1", "latent", "refinement"],
                                   pytest.param(["encoder_level1.0", "encoder_level1.1", "decoder_level2"],
                                                marks=pytest.mark.slow)])
def test_prefix_cache_changes_no_measurement(names: list[str]) -> None:
    net = network()
    space = space_of(net, names, [Choice("conv", 1), Choice("vssd", 1)])
    fillings, photos = fillings_of(net, space), images()
    genotypes = list(space.enumerate())
    np.random.default_rng(0).shuffle(genotypes)
    measurements = [measurement for cache_bytes in (CACHE_BYTES, 300_000, 0)
                    for batch in (genotypes[:9], genotypes)
                    for measurement in evaluator_of(net, space, fillings, photos, cache_bytes).evaluate(batch)]
    assert [measurement.genotype for measurement in measurements[:9]] == genotypes[:9]
    for measured in measurements:
        genotype = measured.genotype
        hybrid = copy.deepcopy(net)
        for slot, row, index in zip(space.slots, fillings, genotype, strict=True):
            if index:
                module = row[index]
                assert isinstance(module, nn.Module)
                hybrid.fill(slot.name, module)
        with torch.inference_mode():
            expected = tuple(score(hybrid(photo.degraded[None])[0], photo.clean, PROTOCOL).psnr_db
                             for photo in photos.images)
        assert measured.psnr_db == expected
        assert measured.values["params"] == sum(p.numel() for p in hybrid.parameters())
        assert measured.values["psnr_drop_db"] == pytest.approx(30 - np.mean(expected))
        assert measured.values["penalty"] == space.penalty(genotype)


def evaluator_of(net: Network, space: SearchSpace, fillings: list[list[nn.Module | str | None]],
                 photos: ValidationSet, cache_bytes: int = CACHE_BYTES) -> Evaluator:
    return Evaluator(net, space, fillings, images=photos, protocol=PROTOCOL,
                     meters={name: build(net, space) for name, build in METERS.items()},
                     teacher_psnr_db=[30.0] * len(photos.images), cache_bytes=cache_bytes)


def test_a_batch_runs_each_prefix_once_an_image() -> None:
    net = network()
    space = space_of(net, ["encoder_level1", "latent"], [Choice("conv", 1)])
    evaluator = evaluator_of(net, space, fillings_of(net, space), images(3))
    list(evaluator.evaluate(sorted(space.enumerate(), reverse=True)))
    first, second, steps = net.slot_step("encoder_level1"), net.slot_step("latent"), len(net.steps)
    assert evaluator.steps_run == 3 * (first + 2 * (second - first) + 4 * (steps - second))


def test_what_loses_a_race_is_spared_the_images_that_follow_and_all_else_is_as_before() -> None:
    """The first image's figures aside, the front is made up: nothing but its own cost keeps a genotype in the race."""
    net = network()
    space = space_of(net, ["encoder_level1", "latent"], [Choice("conv", 1)])
    evaluator, genotypes = evaluator_of(net, space, fillings_of(net, space), images(4)), list(space.enumerate())
    whole = list(evaluator.evaluate(genotypes))
    limit = whole[2].values["macs"]
    best = Measurement((1, 1), {"psnr_drop_db": -20.0, "macs": limit}, (50.0,) * 4)
    for one, raced in zip(whole, evaluator.evaluate(genotypes, Race([best], ("macs",))), strict=True):
        if one.values["macs"] < limit:
            assert raced == one
        else:
            assert raced.valid and len(raced.psnr_db) < 4 and raced.psnr_db == one.psnr_db[:len(raced.psnr_db)]
            assert raced.values["psnr_drop_db"] > -20 and raced.note.endswith("1-1 is better")
            assert raced.values["macs"] == one.values["macs"]


def test_states_are_kept_for_one_image_at_a_time() -> None:
    """Peak of live tensors, counted on the way: four images need no more than one."""
    net = network()
    space = space_of(net, ["encoder_level1", "latent"], [Choice("conv", 1)])
    peaks = []
    for count in (1, 4):
        same = ValidationSet(images(1).images * count, images(1).fingerprint)
        evaluator = evaluator_of(net, space, fillings_of(net, space), same)
        with LiveBytes() as live:
            list(evaluator.evaluate(list(space.enumerate())))
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]


def test_what_cannot_be_built_raises_or_is_nan_is_an_invalid_measurement_that_says_why() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("sizes do not fit")

    net = network()
    space = space_of(net, ["latent"], [Choice("conv", 1), Choice("vssd", 1), Choice("vssd", 2)])
    broken = create_filling(net.slot("latent"), Choice("conv", 1))
    with torch.no_grad():
        for value in broken.parameters():
            value.fill_(float("nan"))
    evaluator = evaluator_of(net, space, [[None, broken, "vssd×1 of latent failed", Raises()]], images(2))
    teacher, nan, missing, raised = evaluator.evaluate([(0,), (1,), (2,), (3,)])
    assert teacher.valid and len(teacher.psnr_db) == 2
    assert not nan.valid and "not finite" in nan.note
    assert not missing.valid and "failed" in missing.note
    assert not raised.valid and raised.note == "RuntimeError: sizes do not fit"


@pytest.mark.parametrize("error", [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 GB"), MemoryError(),
    OSError(28, "No space left on device"), ValueError("a library's own words")])
@pytest.mark.parametrize("hidden", [False, True])
def test_memory_and_disk_that_run_out_are_nobodys_fault(error: Exception, hidden: bool) -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                raise error
            except Exception:
                if hidden:
                    raise KeyError("what a library makes of it") from None
                raise

    net = network()
    space = space_of(net, ["latent"], [Choice("conv", 1)])
    evaluator = evaluator_of(net, space, [[None, Greedy()]], images(1))
    if isinstance(error, ValueError):
        assert not evaluator.measure((1,)).valid
    else:
        with pytest.raises(KeyError if hidden else type(error)):
            evaluator.measure((1,))


def test_images_that_are_perfect_or_too_small_are_left_out_of_means_and_counted() -> None:
    """Means of the two others, by hand; a small image has a PSNR, a perfect one an SSIM."""
    generator = torch.Generator().manual_seed(3)
    clean = [torch.rand(3, side, side, generator=generator) for side in (16, 24, 8, 20)]
    given = [image + 0.1 for image in clean[:3]] + [clean[3]]
    made = tuple(ValidationImage(f"{i}.png", degraded, target)
                 for i, (degraded, target) in enumerate(zip(given, clean, strict=True)))
    protocol = find_protocol("denoise-sidd")
    (result,) = evaluate_protocols(lambda image: image, ValidationSet(made, Fingerprint(4, (), "0" * 64)), [protocol])
    psnr_db, ssim, input_db = result.means()
    scores = [score(degraded, target, protocol) for degraded, target in zip(given, clean, strict=True)]
    assert psnr_db == input_db == pytest.approx(np.mean([one.psnr_db for one in scores[:3]]))
    assert ssim == pytest.approx(np.mean([scores[0].ssim, scores[1].ssim, 1.0])) and np.isfinite(psnr_db)
    assert result.gain_db == 0.0 and not result.broken
    assert [line.split(" are ")[0].split(" equal ")[0] for line in result.left_out] == ["1 of 4 images"] * 2


def test_the_teacher_that_was_given_stays_the_teacher() -> None:
    net = network()
    space = space_of(net, ["latent"], [Choice("conv", 1)])
    own = net.get_submodule("latent")
    evaluator_of(net, space, fillings_of(net, space), images(1)).measure((1,))
    assert net.get_submodule("latent") is own


def test_macs_and_parameters_match_hand_counts() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    cost = count_cost(conv, (2, 3, 8, 6))
    assert cost.macs == 2 * 5 * 8 * 6 * 27 and cost.params == 3 * 5 * 9 + 5
    assert cost.peak_bytes == 4 * (2 * 3 * 48 + 2 * 5 * 48)


def test_restormer_macs_are_those_counted_by_hand() -> None:
    """155 G at 256²: 141 G in convolutions (the paper's figure) and 13.89 G in attention products (SEEDS 1.2)."""
    block = create_network("restormer", dim=48, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1).slots[0]
    stack = create_filling(block, Choice("restormer", 1))
    pixels, channels, hidden = 64 * 64, 48, 127
    convolutions = channels * 3 * channels + 27 * channels + channels**2 + 3 * channels * hidden + 18 * hidden
    assert count_cost(stack, (1, 48, 64, 64)).macs == pixels * (convolutions + 2 * channels**2)


def test_cost_ranges_bound_every_genotype() -> None:
    net = network()
    space = space_of(net, ["latent", "refinement"], [Choice("conv", 1), Choice("vssd", 2)])
    table = build_cost_table(net, space, height=16, width=16)
    for name in ("params", "macs"):
        values = [table.costs(genotype)[name] for genotype in itertools.product(range(3), range(3))]
        assert table.range(name) == (min(values), max(values))


