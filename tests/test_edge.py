"""The edge contract: what the lint says of every family, and that no search finds what is outside."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from ens.blocks import FAMILIES
from ens.config import find_study, load_study
from ens.distill.library import EdgeVerdict, open_library
from ens.export.card import EXPORTS
from ens.export.edge import TOLERANCE, EdgeError, Verdicts, keep_edge, lint_kind, lint_space, name_kind
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import Network, SlotSpec
from ens.run_folder import RunFolder
from ens.search import ENGINES, create_engine
from ens.space import Choice, SearchSpace, Slot, parse_choice, parse_genotype

OUTSIDE = ("mambair", "vimm", "rlmb", "serpent", "uformer", "dat")
"""Families that are not one piece on edge runtimes: selective scans are loops, norms over tokens stay outside."""
FAILING = {("dat", "pte")}
"""Families with a format whose runtime refuses their file, which the lint says too."""


def spec_of(family: str = "restormer") -> SlotSpec:
    return SlotSpec("body", "body", 16, 1, 1, family, heads=2)


def small_teacher(**options: object) -> Network:
    sizes = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 1, 1, 1)}
    return create_network("restormer", **{**sizes, **options})  # type: ignore[arg-type]


def verdicts_of(*outside: str) -> Verdicts:
    return {f"{family}×1": {"executorch": EdgeVerdict(version="1", reason="11 delegates" if family in outside else "")}
            for family in ("restormer", "mambair", "conv")}


def space_of(network: Network, *labels: str) -> SearchSpace:
    return build_space("small", network, slots={"latent": [parse_choice(label) for label in labels],
                                                "refinement": [parse_choice("conv×1")]})


def without_options(verdicts: Verdicts, network: Network) -> Verdicts:
    """The verdicts under the labels that this network's own blocks have."""
    own = name_kind(network.slot("latent"), Choice("restormer", 1)).label
    return {own if label == "restormer×1" else label: found for label, found in verdicts.items()}


def test_choices_outside_are_left_out_by_name_and_a_teacher_outside_closes_its_slot() -> None:
    network, lines = small_teacher(), list[str]()
    space = space_of(network, "mambair×1", "conv×2")
    kept = keep_edge(space, network, without_options(verdicts_of("mambair"), network), lines.append)
    assert [[choice.label for choice in slot.choices] for slot in kept.slots] == [
        ["restormer×1", "conv×2"], ["restormer×1", "conv×1"]]
    assert not any(slot.closed for slot in kept.slots)
    assert lines == ["edge: leaves out, in latent: mambair×1, executorch: 11 delegates"]
    closed = keep_edge(space, network, without_options(verdicts_of("mambair", "restormer"), network), lines.append)
    assert [slot.closed for slot in closed.slots] == [True, True] and closed.num_genotypes == 1
    assert list(closed.enumerate()) == [(1, 1)] and closed.sample(np.random.default_rng(0)) == (1, 1)
    assert "in every slot: restormer×1" in lines[-2] + lines[-1]
    with pytest.raises(ValueError, match="slot latent is closed to the teacher's own restormer×1"):
        parse_genotype("0-1", closed)


def test_a_slot_of_which_nothing_is_left_is_refused_with_every_reason() -> None:
    network = small_teacher()
    verdicts = without_options(verdicts_of("mambair", "restormer"), network)
    with pytest.raises(EdgeError, match=r"slot latent nothing is inside .*restormer×1: .*11 delegates; mambair×1"):
        keep_edge(space_of(network, "mambair×1"), network, verdicts, lambda line: None)


def test_verdicts_that_are_known_are_not_made_again() -> None:
    network, lines = small_teacher(), list[str]()
    known = without_options(verdicts_of(), network)
    assert lint_space(space_of(network, "mambair×1"), network, known, lines.append) == known and not lines


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_asks_for_the_teacher_where_a_slot_is_closed(engine: str) -> None:
    choices = (Choice("mambair", 2, teacher=True), Choice("conv", 1), Choice("vssd", 1))
    space = SearchSpace("closed", (Slot("a", choices, closed=True), Slot("b", choices), Slot("c", choices, True)))
    search, found = create_engine(engine, space, seed=0), list[tuple[int, ...]]()
    while asked := search.ask(2):
        search.tell(asked, np.array([[sum(genotype), -genotype[1]] for genotype in asked], float))
        found += asked
    assert sorted(found) == sorted(space.enumerate()) and len(found) == space.num_genotypes == 2 * 3 * 2
    assert all(genotype[0] and genotype[2] for genotype in found)


@pytest.mark.parametrize("family", [pytest.param(family, marks=() if family == "rep" else pytest.mark.slow)
                                    for family in FAMILIES])
def test_the_lint_names_every_family_that_is_outside(family: str) -> None:
    verdicts = lint_kind(spec_of(), Choice(family, 1))
    assert set(verdicts) == {"executorch", "onnx"}
    assert bool(verdicts["executorch"].reason) == (family in OUTSIDE)
    assert bool(verdicts["onnx"].reason) == (family in set(OUTSIDE) - {"uformer", "dat"})
    assert verdicts["executorch"].reason.startswith("does not export or run") == ((family, "pte") in FAILING)
    for verdict in verdicts.values():
        ran = not verdict.reason.startswith("does not")
        assert verdict.version and (0 <= verdict.relative_error <= TOLERANCE if ran else verdict.relative_error == -1)
    if family not in OUTSIDE:
        assert verdicts["executorch"].delegates == (family != "identity") and not verdicts["executorch"].outside


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), sorted({
    *itertools.product(FAMILIES, {*EXPORTS} - {"onnx", "pte"}), *itertools.product(OUTSIDE, ["pte"])} - FAILING))
def test_every_family_runs_in_every_format(tmp_path: Path, family: str, name: str) -> None:
    """Also those outside the contract: outside is slow, not wrong. The lint runs the others, all as ONNX files, and of
    those outside the first size.
    """
    spec = importlib.util.spec_from_file_location("edge", Path(__file__).parents[1] / "scripts" / "edge.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = script.SIZES_PX[1:2] if name == "pte" else script.SIZES_PX
    assert script.measure_error(family, name, tmp_path, sizes) <= TOLERANCE


def test_what_ships_says_what_is_inside_and_the_demo_is_whole_there(tmp_path: Path) -> None:
    lines, study = list[str](), load_study(find_study("demo"), {"search": {"require": "edge"}})
    library = open_library("builtin:denoise_demo")
    network = library.create_skeleton()
    kinds = {parse_choice(entry.choice) for entry in library.surrogates.values()}
    lacking = {name_kind(network.slots[0], kind).label for kind in kinds} - set(library.manifest.edge)
    assert not lacking, "python scripts/edge.py builtin:denoise_demo stores what is lacking"
    run = RunFolder.start(study, tmp_path / "run", say=lines.append)
    families = {choice.family for slot in run.space.slots for choice in slot.choices}
    assert families and not families & set(OUTSIDE) and not any("linting" in line for line in lines)
    assert {f"{spec.name}/{choice.label}" for spec, choice in run.jobs} <= set(library.surrogates)


def test_a_manifest_without_verdicts_is_read_and_keeps_those_it_gets(tmp_path: Path) -> None:
    from ens.distill.library import create_library

    library = create_library(tmp_path, small_teacher(), task="t", recipe={})
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    manifest.pop("edge")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    library = open_library(tmp_path)
    assert library.manifest.edge == {}
    library.store_verdicts(verdicts_of("mambair"))
    library.store_verdicts({"conv×1": {}, "plk×1": {}})
    assert open_library(tmp_path).manifest.edge == verdicts_of("mambair")


@pytest.mark.slow
def test_what_ships_is_what_the_lint_says() -> None:
    """Of kinds with options; the others are linted above."""
    library = open_library("builtin:denoise_demo")
    network = library.create_skeleton()
    stored_kinds = {label: stored for label, stored in library.manifest.edge.items() if "(" in label}
    assert len(stored_kinds) >= 3
    for label, stored in stored_kinds.items():
        fresh = lint_kind(network.slots[0], parse_choice(label))
        assert {name: verdict.reason for name, verdict in fresh.items()} == {
            name: verdict.reason for name, verdict in stored.items()}
