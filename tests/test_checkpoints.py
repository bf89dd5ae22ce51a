"""Released and own checkpoints: recognised, strict, and every wrong file named for what it is."""

from __future__ import annotations

import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ens.networks import create_network
from ens.networks.checkpoints import (
    CHECKPOINT_FORMAT,
    CheckpointError,
    describe_recipe,
    hash_weights,
    load_checkpoint,
    save_checkpoint,
)
from ens.networks.restormer import infer_expansion
from ens.networks.steps import Network

SMALL: dict[str, Any] = {"dim": 8, "num_blocks": (1, 2, 1, 1), "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)}
VARIANTS: list[dict[str, Any]] = [
    {"layer_norm": "BiasFree"}, {"layer_norm": "WithBias"}, {"bias": True}, {"in_channels": 1, "out_channels": 1},
    {"in_channels": 6, "dual_pixel": True}, {"ffn_expansion_factor": 2.0}, {"num_refinement_blocks": 3, "dim": 12,
                                                                            "heads": (1, 1, 2, 4)},
]


def small(**options: Any) -> Network:
    torch.manual_seed(0)
    network = create_network("restormer", **{**SMALL, **options})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "weights_only=False" not in text and "unsafe" not in text
    return text


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_sizes_are_inferred_from_the_keys_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    network = small(**options)
    torch.save(network.state_dict(), tmp_path / "released.pth")
    loaded = load_checkpoint(tmp_path / "released.pth")
    assert hash_weights(loaded) == hash_weights(network)
    assert [spec.heads for spec in loaded.slots] == [spec.heads for spec in network.slots]
    image = torch.rand(1, network.in_channels, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(image), network(image))


def test_released_sizes_give_the_released_expansion_factor() -> None:
    assert infer_expansion({channels: int(channels * 2.66) for channels in (48, 96, 192, 384)}) == 2.66
    for factor in (1.0, 1.5, 2.0, 2.66, 3.7):
        hidden = {channels: int(channels * factor) for channels in (16, 32, 64, 128)}
        assert {channels: int(channels * infer_expansion(hidden)) for channels in hidden} == hidden
    with pytest.raises(ValueError, match="expansion"):
        infer_expansion({10: 20, 20: 10})


@pytest.mark.parametrize("wrapper", ["params", "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "netG.", "module.net.", "_orig_mod.", "module._orig_mod.",
                                    "model._orig_mod.", "network."])
def test_wrappers_and_prefixes_are_stripped(tmp_path: Path, wrapper: str, prefix: str) -> None:
    network = small()
    state = OrderedDict((prefix + key, value) for key, value in network.state_dict().items())
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "wrapped.ckpt")
    assert hash_weights(load_checkpoint(tmp_path / "wrapped.ckpt")) == hash_weights(network)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    averaged = small()
    raw = {key: value + 1 for key, value in averaged.state_dict().items()}
    torch.save({"params": raw, "params_ema": averaged.state_dict()}, tmp_path / "both.pth")
    assert hash_weights(load_checkpoint(tmp_path / "both.pth")) == hash_weights(averaged)


@pytest.mark.parametrize("name", ["own.safetensors", "own.pth"])
def test_own_checkpoint_round_trips_bit_for_bit(tmp_path: Path, name: str) -> None:
    network = small(layer_norm="BiasFree")
    save_checkpoint(tmp_path / name, network)
    loaded = load_checkpoint(tmp_path / name)
    assert hash_weights(loaded) == hash_weights(network)
    assert not loaded.training
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_safetensors_of_half_precision_is_widened(tmp_path: Path) -> None:
    network = small()
    half = {key: value.half() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    loaded = load_checkpoint(tmp_path / "half.safetensors").state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, half[key].float()) for key, value in loaded.items())


def test_hash_depends_on_names_types_shapes_and_values_but_not_order() -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2)}
    changed: list[dict[str, Tensor]] = [
        {"a": state["a"].view(2, 3), "b": state["b"]}, {"a": state["a"].double(), "b": state["b"]},
        {"c": state["a"], "b": state["b"]}, {"a": state["a"] + 1e-6, "b": state["b"]}]
    assert hash_weights(dict(reversed(state.items()))) == hash_weights(state)
    assert len({hash_weights(state), *(hash_weights(other) for other in changed)}) == 5
    assert hash_weights({"n": torch.tensor(3), "h": torch.ones(3, dtype=torch.bfloat16)})


def test_weights_that_are_not_finite_are_never_stored(tmp_path: Path) -> None:
    network = small()
    next(network.parameters()).data[0] = float("nan")
    for name in ("bad.safetensors", "bad.pth"):
        with pytest.raises(ValueError, match="NaN"):
            save_checkpoint(tmp_path / name, network)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("page.pth", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    ("page.safetensors", b"<html><head></head></html>", "web page"),
    ("pointer.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("empty.pth", b"", "empty"),
    ("noise.pth", bytes(range(7, 200)), "no checkpoint at all"),
    ("noise.safetensors", bytes(range(7, 200)), "not a safetensors file"),
    ("weights.h5", b"1234", "suffix"),
])
def test_wrong_files_are_named_for_what_they_are(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in message(tmp_path / name)


def test_missing_file_and_folder_are_said(tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "none.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "not a file" in message(tmp_path / "folder.pth")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_files_are_said_to_be_truncated(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    save_checkpoint(path, small())
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)])
    assert "truncated" in message(path)


def test_truncated_legacy_pickle_is_said_to_be_truncated(tmp_path: Path) -> None:
    path = tmp_path / "legacy.pth"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)
    assert hash_weights(load_checkpoint(path)) == hash_weights(small())
    path.write_bytes(path.read_bytes()[:2000])
    assert "truncated" in message(path)


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("script/data.pkl", "script/constants.pkl", "script/code/__torch__.py"):
            archive.writestr(name, b"x")
    assert "TorchScript" in message(tmp_path / "script.pt")


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.target),))

    def __init__(self, target: Path) -> None:
        self.target = target


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    torch.save({"params": small().state_dict(), "hook": _Runs(tmp_path / "ran")}, tmp_path / "evil.pth")
    assert "run code" in message(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    assert "Python objects" in message(tmp_path / "module.pth")


def test_another_network_lists_missing_and_unexpected_keys(tmp_path: Path) -> None:
    state = {f"middle_blks.{i}.conv1.weight": torch.ones(1) for i in range(12)}
    torch.save({"params": state}, tmp_path / "nafnet.pth")
    text = message(tmp_path / "nafnet.pth")
    assert "NAFNet" in text and "restormer" in text
    assert "missing keys: patch_embed.proj.weight" in text
    assert "unexpected keys: middle_blks.0.conv1.weight" in text and "and 2 more" in text
    assert "middle_blks.11" not in text


def test_a_restormer_with_foreign_and_lost_keys_lists_them(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    del state["output.weight"], state["up2_1.body.0.weight"]
    torch.save({**state, "output.weight": torch.ones(3, 7, 3, 3), "extra.weight": torch.ones(1)}, tmp_path / "odd.pth")
    text = message(tmp_path / "odd.pth")
    assert "missing keys: up2_1.body.0.weight" in text
    assert "unexpected keys: extra.weight" in text
    assert "output.weight (3, 7, 3, 3) instead of (3, 16, 3, 3)" in text


def test_sizes_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    state = {**small().state_dict(), "latent.0.ffn.project_out.weight": torch.ones(64, 5, 1, 1)}
    torch.save(state, tmp_path / "odd.pth")
    assert "do not fit together" in message(tmp_path / "odd.pth")


def test_files_without_weights_list_what_they_hold(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "log.pth")
    assert "epoch, loss" in message(tmp_path / "log.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list" in message(tmp_path / "list.pth")


@pytest.mark.parametrize("wrapper", ["params_ema", "ema", "model_ema", "state_dict_ema"])
def test_averaged_weights_are_taken_under_every_usual_name_and_said(
        tmp_path: Path, wrapper: str, caplog: pytest.LogCaptureFixture) -> None:
    averaged = small()
    raw = {key: value + 1 for key, value in averaged.state_dict().items()}
    torch.save({"state_dict": raw, wrapper: {f"module.{key}": value for key, value in averaged.state_dict().items()}},
               tmp_path / "both.ckpt")
    assert hash_weights(load_checkpoint(tmp_path / "both.ckpt")) == hash_weights(averaged)
    assert f"the weights under {wrapper}.module are taken; left out: state_dict" in caplog.text


def test_the_file_of_an_averaged_model_opens(tmp_path: Path) -> None:
    network = small()
    averaged = torch.optim.swa_utils.AveragedModel(network, use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pth")
    assert "n_averaged" in averaged.state_dict()
    assert hash_weights(load_checkpoint(tmp_path / "averaged.pth")) == hash_weights(network)


@pytest.mark.parametrize("empty", [{}, {"step": torch.tensor(3)}, None])
def test_an_empty_average_does_not_hide_good_weights(tmp_path: Path, empty: object) -> None:
    network = small()
    torch.save({"params_ema": empty, "params": network.state_dict()}, tmp_path / "empty.pth")
    assert hash_weights(load_checkpoint(tmp_path / "empty.pth")) == hash_weights(network)


def lightning(network: Network, **more: Tensor) -> dict[str, Any]:
    """What a LightningModule with the network as `model` leaves: optimiser, callbacks, hyper-parameters beside it."""
    optimiser = torch.optim.Adam(network.parameters())
    sum(parameter.sum() for parameter in network.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    return {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.4.0", "state_dict": {**state, **more},
            "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint": {"best": torch.tensor(31.2)}},
            "optimizer_states": [optimiser.state_dict()], "lr_schedulers": [], "hyper_parameters": {"dim": 8}}


def test_a_lightning_file_opens_and_the_weights_of_its_loss_are_left_out_and_said(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = small()
    file = lightning(network, **{"loss.vgg.0.weight": torch.ones(4, 3, 3, 3), "loss.vgg.0.bias": torch.ones(4)})
    torch.save(file, tmp_path / "last.ckpt")
    assert hash_weights(load_checkpoint(tmp_path / "last.ckpt")) == hash_weights(network)
    assert "state_dict.model are taken; left out: 2 keys such as loss.vgg.0.weight" in caplog.text
    caplog.clear()
    torch.save(lightning(network), tmp_path / "plain.ckpt")
    load_checkpoint(tmp_path / "plain.ckpt")
    assert not caplog.text, "where there is nothing to choose nothing is said"


def test_an_average_beside_the_raw_weights_of_one_dictionary_is_preferred(tmp_path: Path) -> None:
    averaged = small()
    raw = {f"model.{key}": value + 1 for key, value in averaged.state_dict().items()}
    torch.save({"state_dict": {**raw, **{f"ema_model.module.{key}": value
                                         for key, value in averaged.state_dict().items()}}}, tmp_path / "both.ckpt")
    assert hash_weights(load_checkpoint(tmp_path / "both.ckpt")) == hash_weights(averaged)


def test_a_network_inside_another_one_is_not_taken_for_it(tmp_path: Path) -> None:
    torch.save({f"stage1.{key}": value for key, value in small().state_dict().items()}, tmp_path / "two.pth")
    assert "holds another network" in message(tmp_path / "two.pth")


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".pt"])
def test_safetensors_under_another_name_open(tmp_path: Path, suffix: str) -> None:
    network = small(layer_norm="BiasFree")
    save_checkpoint(tmp_path / "own.safetensors", network)
    (tmp_path / "own.safetensors").rename(tmp_path / f"own{suffix}")
    assert hash_weights(load_checkpoint(tmp_path / f"own{suffix}")) == hash_weights(network)
    safetensors.torch.save_file(network.state_dict(), tmp_path / f"bare{suffix}")
    assert hash_weights(load_checkpoint(tmp_path / f"bare{suffix}")) == hash_weights(network)


def test_safetensors_open_whatever_the_length_of_their_header(tmp_path: Path) -> None:
    """It comes first in the file, and one length in 32 begins with the byte that pickles begin with."""
    begins, network, path = set(), small(), tmp_path / "any.safetensors"
    for length in range(0, 264, 8):
        safetensors.torch.save_file(network.state_dict(), path, {"note": "x" * length})
        begins.add(path.read_bytes()[0])
        assert hash_weights(load_checkpoint(path)) == hash_weights(network)
    assert 0x80 in begins


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_named_safetensors_opens(tmp_path: Path, new: bool) -> None:
    network = small()
    torch.save({"params": network.state_dict()}, tmp_path / "p.safetensors", _use_new_zipfile_serialization=new)
    assert hash_weights(load_checkpoint(tmp_path / "p.safetensors")) == hash_weights(network)


@pytest.mark.parametrize("block", ["latent.1", "latent.2", "encoder_level2.1", "decoder_level2.0", "refinement.0"])
def test_a_file_that_lacks_a_block_is_an_error_that_names_it(tmp_path: Path, block: str) -> None:
    """In a released file torch notes every module of the network that was saved: the last block of a stage, too."""
    state = small(num_blocks=(1, 2, 1, 3), num_refinement_blocks=2).state_dict()
    for key in [key for key in state if key.startswith(f"{block}.")]:
        del state[key]
    torch.save({"params": state}, tmp_path / "holes.pth")
    assert block.removesuffix(".1") in message(tmp_path / "holes.pth")


@pytest.mark.parametrize("stage", ["encoder_level2", "decoder_level2"])
def test_a_stage_that_is_no_mirror_of_its_partner_is_an_error(tmp_path: Path, stage: str) -> None:
    state = {key: value for key, value in small().state_dict().items() if not key.startswith(f"{stage}.1.")}
    torch.save(state, tmp_path / "lopsided.pth")
    assert "encoder_level2 has" in message(tmp_path / "lopsided.pth")


def test_whole_numbers_are_not_taken_for_weights(tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.int64, torch.complex64):
        torch.save({key: value.to(dtype) for key, value in small().state_dict().items()}, tmp_path / "odd.pth")
        assert "other types: patch_embed.proj.weight" in message(tmp_path / "odd.pth")


def test_an_own_checkpoint_with_flipped_bits_is_damaged(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "own.safetensors", small())
    data = bytearray((tmp_path / "own.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "own.safetensors").write_bytes(data)
    assert "the hash differs" in message(tmp_path / "own.safetensors")


@pytest.mark.parametrize(("entry", "value", "expected"), [
    ("options", '{"dim": 1000000000}', "dim is a whole number from 1 to 4096, got 1000000000"),
    ("options", '{"num_blocks": [1000000000, 1, 1, 1]}', "num_blocks is a list"),
    ("options", '{"dim": -8}', "dim is a whole number"), ("options", '{"dim": true}', "dim is a whole number"),
    ("options", '{"ffn_expansion_factor": 1e300}', "above 0, 16 at most"),
    ("options", '{"dim": 4096, "heads": [1, 1, 1, 1]}', "parameters; allowed: 500,000,000"),
    ("options", "[1]", "entry options"), ("options", "{", "entry options"),
    ("network", "restorer", "is unknown"), ("weights_sha256", "", "entry weights_sha256")])
def test_metadata_beyond_all_sense_are_named_before_anything_is_built(
        tmp_path: Path, entry: str, value: str, expected: str) -> None:
    network = small()
    metadata = {**describe_recipe(network, CHECKPOINT_FORMAT, None), entry: value}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "odd.safetensors", metadata)
    assert expected in message(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    assert "is not a file" in message(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zeros{suffix}").symlink_to("/dev/zero")
    assert "is not a file" in message(tmp_path / f"zeros{suffix}")


@pytest.mark.parametrize("name", ["own.safetensors", "own.pth", "legacy.pth"])
def test_random_damage_ends_in_the_one_error_of_checkpoints(tmp_path: Path, name: str) -> None:
    """40 files a format, seeded: bytes of the header or of the directory of the archive changed, or the end cut."""
    path, rng, caught = tmp_path / name, random.Random(1), 0
    if name == "legacy.pth":
        torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save_checkpoint(path, small())
    sound = path.read_bytes()
    for _ in range(40):
        data, head = bytearray(sound), min(len(sound), 12_000)
        start = rng.choice([0, len(sound) - head])
        for _ in range(rng.choice([1, 2, 8])):
            data[start + rng.randrange(head)] = rng.randrange(256)
        path.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.1 else data)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            caught += str(path) in str(error)
    assert caught >= 8
