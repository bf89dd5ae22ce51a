"""Feature-wise distillation and the library it leaves on disk."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from ens.distill.blockwise import create_surrogate, distill_library
from ens.distill.library import Library, LibraryError, create_library, open_library
from ens.distill.resume import DamagedState, ResumeMismatch
from ens.networks import create_network
from ens.networks.checkpoints import hash_weights
from ens.networks.steps import Network, create_filling
from ens.space import Choice


class Noise:
    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
        clean = torch.rand(batch_size, 3, patch_px, patch_px, generator=torch.Generator().manual_seed(index))
        return clean, clean


def teacher() -> Network:
    torch.manual_seed(0)
    return create_network("restormer", dim=8, num_blocks=[2, 1, 1, 1], num_refinement_blocks=1, heads=[1, 1, 1, 1],
                          layer_norm="BiasFree").eval()


JOBS = (("encoder_level1", Choice("restormer", 1)), ("encoder_level1", Choice("conv", 1)),
        ("latent", Choice("vssd", 1)), ("latent", Choice("identity", 1)))


def distill(network: Network, library: Library, *, steps: int = 6, stop_after: int | None = None, lr: float = 2e-3,
            jobs: tuple[tuple[str, Choice], ...] = JOBS, group_size: int = 64) -> bool:
    calls: list[int] = []
    return distill_library(
        network, library, Noise(), [(network.slot(name), choice) for name, choice in jobs], steps=steps, batch_size=2,
        patch_px=16, lr=lr, bf16=False, group_size=group_size,
        on_progress=lambda done, total, error: calls.append(done),
        should_stop=lambda: stop_after is not None and len(calls) >= stop_after)


def test_distillation_lowers_the_error_of_every_trainable_surrogate(tmp_path: Path) -> None:
    network = teacher()
    short = create_library(tmp_path / "short", network, task="t", recipe={})
    long = create_library(tmp_path / "long", network, task="t", recipe={})
    assert distill(network, short, steps=1) and distill(network, long, steps=60)
    for key, entry in long.surrogates.items():
        if "identity" in key:
            assert entry.alignment_error == pytest.approx(1.0, abs=1e-3)
        else:
            assert entry.alignment_error < 0.9 * short.surrogates[key].alignment_error, key


def test_a_surrogate_of_the_teachers_family_and_depth_is_perfect_from_the_start(tmp_path: Path) -> None:
    network = teacher()
    library = create_library(tmp_path / "lib", network, task="t", recipe={})
    assert distill(network, library, steps=1, lr=1e-12, jobs=(("encoder_level1", Choice("restormer", 2)),))
    assert library.surrogates["encoder_level1/restormer×2"].alignment_error < 1e-4


@pytest.mark.parametrize("group_size", [64, 3])
def test_an_interrupted_distillation_ends_with_the_same_library(tmp_path: Path, group_size: int) -> None:
    network = teacher()
    whole = create_library(tmp_path / "whole", network, task="t", recipe={})
    halves = create_library(tmp_path / "halves", network, task="t", recipe={})
    assert distill(network, whole, group_size=group_size)
    assert not distill(network, halves, group_size=group_size, stop_after=4)
    assert distill(network, open_library(tmp_path / "halves"), group_size=group_size)
    again = open_library(tmp_path / "halves")
    assert again.surrogates == whole.surrogates
    assert not (tmp_path / "halves" / "training.pt").exists()


def test_what_a_killed_driver_of_a_cluster_left_beside_the_library_is_taken(tmp_path: Path) -> None:
    network, steps = teacher(), {"steps": 1}
    library = create_library(tmp_path / "library", network, task="t", recipe=steps)
    part = create_library(tmp_path / "library.latent", network, task="t", recipe=steps)
    other = create_library(tmp_path / "library.encoder_level1", network, task="t", recipe={"steps": 2})
    assert distill(network, part, steps=1, jobs=JOBS[2:]) and distill(network, other, steps=2, jobs=JOBS[:2])
    found = dict(part.surrogates)
    assert open_library(tmp_path / "library").take_parts().surrogates == found
    assert open_library(library.root).surrogates == found and [path.name for path in tmp_path.iterdir()] == ["library"]


def test_an_unfinished_distillation_is_not_continued_with_another_recipe(tmp_path: Path) -> None:
    network = teacher()
    library = create_library(tmp_path / "lib", network, task="t", recipe={})
    distill(network, library, stop_after=2)
    with pytest.raises(ResumeMismatch, match="another configuration"):
        distill(network, library, lr=1e-4)


@pytest.mark.parametrize("group_size", [64, 3])
@pytest.mark.parametrize("stored", range(1, 5))
def test_a_kill_while_a_group_is_stored_ends_with_the_same_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   group_size: int, stored: int) -> None:
    """Also right after the last of a group was stored, before its state was removed."""
    network = teacher()
    whole, killed = (create_library(tmp_path / name, network, task="t", recipe={}) for name in ("whole", "killed"))
    assert distill(network, whole, group_size=group_size)
    store, counted = Library.store, itertools.count(1)

    def dies(self: Library, *arguments: Any, **options: Any) -> None:
        store(self, *arguments, **options)
        if next(counted) == stored:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Library, "store", dies)
        distill(network, killed, group_size=group_size)
    assert (tmp_path / "killed" / "training.pt").exists()
    again = open_library(tmp_path / "killed")
    assert distill(network, again, group_size=group_size)
    assert again.surrogates == whole.surrogates and not (tmp_path / "killed" / "training.pt").exists()


def test_a_damaged_state_is_named_and_told_to_begin_again(tmp_path: Path) -> None:
    network = teacher()
    library = create_library(tmp_path / "lib", network, task="t", recipe={})
    distill(network, library, stop_after=2)
    path = library.root / "training.pt"
    state = torch.load(path, weights_only=True)
    key = next(iter(state["pupils"]))
    for changed in ({"done": None}, {"pupils": [1]}, {"pupils": {**state["pupils"], key: {"params": {}}}},
                    {"pupils": {**state["pupils"], key: {"params": {}, "skipped": 0, "optimizer": {}}}}):
        torch.save({**state, **changed}, path)
        with pytest.raises(DamagedState, match=r"training\.pt.* is damaged .*--restart begins this training again"):
            distill(network, library)


def test_a_diverging_choice_is_marked_failed_and_the_others_go_on(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    network = teacher()
    library = create_library(tmp_path / "lib", network, task="t", recipe={})

    def broken(spec, choice):  # type: ignore[no-untyped-def]
        blocks = create_filling(spec, choice)
        if choice.family == "vssd":
            with torch.no_grad():
                next(blocks.parameters()).fill_(float("nan"))
        return blocks

    monkeypatch.setattr("ens.distill.blockwise.create_filling", broken)
    assert distill(network, library, steps=12)
    entry = library.surrogates["latent/vssd×1"]
    assert "learning rate" in entry.failed and not entry.sha256
    assert not (tmp_path / "lib" / "latent" / "vssd-1.safetensors").exists()
    with pytest.raises(LibraryError, match="failed"):
        library.load_surrogate(network.slot("latent"), Choice("vssd", 1))
    assert all(not entry.failed and entry.sha256 for key, entry in library.surrogates.items() if "vssd" not in key)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_library_round_trips_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    network = teacher()
    original = hash_weights(network)
    library = create_library(tmp_path / "lib", network, task="t", recipe={"steps": 1}, dtype=dtype)
    assert library.imitates(network) and library.manifest.teacher.source_sha256 == original
    spec, choice = network.slot("latent"), Choice("vssd", 1, (("state", 8),))
    blocks = create_filling(spec, choice)
    library.store(spec, choice, blocks, alignment_error=0.5, steps=1)
    again = open_library(tmp_path / "lib")
    for ours, theirs in ((again.load_surrogate(spec, choice), blocks), (again.load_teacher(), network)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
            assert torch.equal(value, value.to(getattr(torch, dtype)).float())


def test_whole_numbers_among_the_weights_stay_whole_in_a_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_network("dat", embed_dim=8, depth=[2], num_heads=[2], split_size=[4, 8])
    counted = "layers.0.blocks.0.attn.dwconv.1.num_batches_tracked"
    network.get_buffer(counted).fill_(500_001)  # neither float16 nor bfloat16 has it
    create_library(tmp_path / "lib", network, task="t", recipe={}, dtype="float16")
    again = open_library(tmp_path / "lib").load_teacher().get_buffer(counted)
    assert (again.dtype, int(again)) == (torch.int64, 500_001)


def test_surrogates_start_from_numbers_of_their_own() -> None:
    network = teacher()
    started = [parameters_to_vector(create_surrogate(network, network.slot(slot), choice, seed=seed).parameters())
               for seed in (0, 1) for slot in ("encoder_level1", "decoder_level1")
               for choice in (Choice("conv", 1), Choice("conv", 2))]
    # The first numbers drawn differ whatever the length: no slot, choice or seed repeats another's.
    assert len({tuple(values[:50].tolist()) for values in started}) == len(started)
    again = create_surrogate(network, network.slot("encoder_level1"), Choice("conv", 1), seed=0)
    assert torch.equal(parameters_to_vector(again.parameters()), started[0])


def test_the_teacher_that_was_given_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, moved = teacher(), []
    library = create_library(tmp_path / "lib", network, task="t", recipe={})
    before, move = hash_weights(network), Network.to
    monkeypatch.setattr(Network, "to", lambda self, *where: moved.append(self) or move(self, *where))
    assert distill(network, library, steps=1)
    assert moved and all(other is not network for other in moved)
    assert hash_weights(network) == before and not network.training


def test_a_library_of_the_first_version_with_multiply_adds_still_opens(tmp_path: Path) -> None:
    network = teacher()
    library = create_library(tmp_path / "lib", network, task="t", recipe={})
    assert distill(network, library, steps=1)
    path = tmp_path / "lib" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert all("macs" not in entry for entry in manifest["surrogates"].values())
    for entry in manifest["surrogates"].values():
        entry["macs"] = 7
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert open_library(tmp_path / "lib").surrogates == library.surrogates


def test_weights_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    network = teacher()
    library = create_library(tmp_path / "lib", network, task="t", recipe={})
    manifest = json.loads((tmp_path / "lib" / "manifest.json").read_text(encoding="utf-8"))
    manifest["teacher"]["sha256"] = "0" * 64
    (tmp_path / "lib" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(LibraryError, match="not the teacher"):
        open_library(tmp_path / "lib").load_teacher()
    (tmp_path / "lib" / "teacher.safetensors").write_bytes(b"torn")
    with pytest.raises(LibraryError, match=r"truncated.*distil it again"):
        library.load_teacher()


def test_what_is_no_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="no manifest"):
        open_library(tmp_path)
    with pytest.raises(LibraryError, match="does not ship"):
        open_library("builtin:nothing")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(LibraryError, match="no manifest"):
        open_library(tmp_path)


def broken_manifests(sound: str) -> Iterator[tuple[str, str]]:
    """(what was done, the text): cut at many places, every entry removed or replaced by something of another type."""
    for end in range(0, len(sound) - 1, 97):
        yield f"cut at {end}", sound[:end]
    yield from (("nested", "[" * 100_000), ("list", "[]"), ("number", "3"), ("null", "null"))

    def change(tree: dict[str, Any], place: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for key in list(tree):
            before = tree.pop(key)
            if key not in ("failed", "edge") and place[-1:] not in (("recipe",), ("options",), ("surrogates",)):
                yield f"without {(*place, key)}", json.dumps(manifest)
                for value in (None, [], {}, "x", -3, True, float("nan")):
                    if type(value) is not type(before) and key not in ("task", "surrogates"):
                        tree[key] = value
                        yield f"{(*place, key)} = {value}", json.dumps(manifest)
            tree[key] = before
            if isinstance(before, dict):
                yield from change(before, (*place, key))

    manifest = json.loads(sound)
    yield from change(manifest, ())


def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path: Path) -> None:
    network = teacher()
    library = create_library(tmp_path, network, task="t", recipe={"steps": 1})
    spec, choice = network.slot("latent"), Choice("vssd", 1)
    library.store(spec, choice, create_filling(spec, choice), alignment_error=0.5, steps=1)
    path, opened = tmp_path / "manifest.json", []
    for what, text in broken_manifests(path.read_text(encoding="utf-8")):
        path.write_text(text, encoding="utf-8")
        try:
            open_library(tmp_path)
            opened.append(what)
        except LibraryError as error:
            assert str(path) in str(error) and "distil it again" in str(error) and "\n" not in str(error), what
    assert not opened


@pytest.mark.parametrize(("entry", "value", "expected"), [
    ("network", "nafnet", r"the teacher of its manifest cannot be built.*'nafnet' is unknown"),
    ("options", {"dim": 10**9}, "dim is a whole number"), ("options", {"width": 3}, "no option 'width'")])
def test_a_manifest_whose_teacher_cannot_be_built_is_named(
        tmp_path: Path, entry: str, value: object, expected: str) -> None:
    library = create_library(tmp_path, teacher(), task="t", recipe={})
    manifest = library.manifest.model_dump()
    manifest["teacher"][entry] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for build in (open_library(tmp_path).create_skeleton, open_library(tmp_path).load_teacher):
        with pytest.raises(LibraryError, match=expected):
            build()


def test_a_pipe_in_the_place_of_weights_is_refused_at_once(tmp_path: Path) -> None:
    library = create_library(tmp_path, teacher(), task="t", recipe={})
    (tmp_path / "teacher.safetensors").unlink()
    os.mkfifo(tmp_path / "teacher.safetensors")
    with pytest.raises(LibraryError, match="is not a file"):
        library.load_teacher()
