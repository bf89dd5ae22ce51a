"""DAT: released weights and figures, the order of its blocks, any size of image."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ens import pipeline
from ens.blocks import create_stack
from ens.blocks.dat import ChannelAttention, DATBlock, SpatialAttention, StoredNorm
from ens.data.tasks import create_task
from ens.export.formats import write_checked
from ens.networks import create_network
from ens.networks.checkpoints import load_checkpoint, save_checkpoint
from ens.networks.dat import DAT

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
RELEASED = SHARED / "checkpoints" / "DAT_light.zip"
needs_released = pytest.mark.skipif(not RELEASED.is_file(), reason="../shared/checkpoints/DAT_light.zip is absent")
LIGHT: dict[str, Any] = {"embed_dim": 60, "depth": (18,), "num_heads": (6,), "expansion_factor": 2.0,
                         "resi_connection": "3conv", "upsampler": "pixelshuffledirect"}


def make_tiny(**options: Any) -> DAT:
    torch.manual_seed(0)
    network = create_network("dat", **{"embed_dim": 16, "depth": (3, 2), "num_heads": (2, 4), "split_size": (2, 4),
                                       "upscale": 2, **options})
    assert isinstance(network, DAT)
    return network.eval()


def unpack(folder: Path, scale: int) -> Path:
    with zipfile.ZipFile(RELEASED) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(f"x{scale}.pth"))
        return Path(archive.extract(name, folder))


@pytest.mark.parametrize(("options", "parameters"), [
    ({}, 14_802_051), ({"expansion_factor": 2.0}, 11_212_131),
    ({"expansion_factor": 2.0, "split_size": (8, 16)}, 11_212_131), (LIGHT, 572_766)], ids=["DAT", "2", "S", "light"])
def test_parameter_counts_are_the_published_ones(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        network = DAT(**options)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="../shared/golden is absent")
def test_golden_output_of_a_file_as_it_was_saved_buffers_included(tmp_path: Path) -> None:
    with safe_open(SHARED / "golden" / "dat.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    assert {"attn_mask_0", "relative_position_index", "rpe_biases"} <= {key.split(".")[-1] for key in state}
    torch.save({"params": state}, tmp_path / "released.pth")
    with torch.no_grad():
        y = load_checkpoint(tmp_path / "released.pth")(tensors["input.x"])
    assert (y - tensors["output.y"]).norm() < 1e-4 * tensors["output.y"].norm()


@needs_released
@pytest.mark.parametrize("scale", [2, 4])
def test_released_files_open_with_the_sizes_they_were_trained_with(tmp_path: Path, scale: int) -> None:
    network = load_checkpoint(unpack(tmp_path, scale))
    assert network.recipe is not None and network.recipe[0] == "dat"
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in LIGHT.items()}
    assert network.recipe[1] == {**expected, "split_size": [8, 32], "upscale": scale}


@pytest.mark.slow
@needs_released
@pytest.mark.skipif(not (SHARED / "data" / "set5").is_dir(), reason="../shared/data/set5 is absent")
def test_released_weights_reach_the_published_figure_on_set5(tmp_path: Path) -> None:
    (result,) = pipeline.evaluate(unpack(tmp_path, 4), str(SHARED / "data" / "set5"), create_task("sr_x4"),
                                  protocol="sr-y")
    psnr_db, ssim, _ = result.means()
    assert abs(psnr_db - 32.57) < 0.005 and abs(ssim - 0.8991) < 2e-4


@pytest.mark.parametrize("options", [
    {"resi_connection": "3conv", "upsampler": "pixelshuffledirect", "upscale": 3}, {"upscale": 3}, {"upscale": 8},
    {"depth": (1,), "num_heads": (2,), "split_size": (4, 4), "expansion_factor": 1.5}])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_sizes_are_inferred_from_every_kind_of_file(tmp_path: Path, options: dict[str, Any], suffix: str) -> None:
    network, image = make_tiny(**options), torch.rand(1, 3, 9, 6)
    save_checkpoint(tmp_path / f"own{suffix}", network)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / f"own{suffix}")(image), network(image))


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "pixelshuffledirect"])
def test_the_run_can_be_cut_anywhere_and_slots_can_be_filled(upsampler: str) -> None:
    network, image = make_tiny(upsampler=upsampler), torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        whole = network.restore(image)
        assert whole.shape == (1, 3, 18, 14)
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
        captured = network.capture(image, ["group1", "group1.2", "group2.0"])
        assert torch.equal(captured["group1"][1], captured["group1.2"][1])
        assert {x.shape for pair in captured.values() for x in pair} == {(1, 16, 9, 7)}
        network.fill("group1.1", create_stack("conv", 16, 1))
        network.fill("group2", create_stack("dat", 16, 1, heads=4))
        assert network(image).shape == whole.shape


def kinds(blocks: Any) -> list[str]:
    attentions = [block.attn for block in blocks]
    return ["channel" if isinstance(attention, ChannelAttention) else
            "shifted" if any(attention.attns[0].offset) else "window" for attention in attentions]


def test_blocks_alternate_and_groups_shift_in_turn() -> None:
    network = make_tiny(depth=(7, 6), num_heads=(2, 2))
    first = ["window", "channel", "shifted", "channel", "window", "channel", "shifted"]
    second = ["shifted", "channel", "window", "channel", "shifted", "channel"]
    assert [kinds(network.get_submodule(spec.module)) for spec in network.slots] == [first, second]
    assert kinds(create_stack("dat", 8, 3, options=dict(network.slots[1].options))) == second[:3]


def reached(shift: bool, pixel: tuple[int, int]) -> torch.Tensor:
    """By half of the channels, which pixels of the attention's output a change of this pixel's values moves."""
    torch.manual_seed(0)
    attention = SpatialAttention(4, heads=2, window=(2, 4), shift=shift)
    qkv = torch.randn(1, 8, 8, 12)
    changed = qkv.clone()
    changed[(0, *pixel)] += 1
    with torch.no_grad():
        moved = (attention._attend(qkv) != attention._attend(changed))[0]
    return torch.stack([moved[..., :2].any(-1), moved[..., 2:].any(-1)])


def rectangle(rows: slice, columns: slice) -> torch.Tensor:
    area = torch.zeros(8, 8, dtype=torch.bool)
    area[rows, columns] = True
    return area


def test_halves_of_the_channels_see_windows_across_each_other() -> None:
    flat, tall = reached(False, (3, 5))
    assert torch.equal(flat, rectangle(slice(2, 4), slice(4, 8))) and torch.equal(tall, rectangle(slice(0, 4),
                                                                                                 slice(4, 6)))
    flat, tall = reached(True, (3, 5))  # by 1 and 2 pixels, and by 2 and 1
    assert torch.equal(flat, rectangle(slice(3, 5), slice(2, 6))) and torch.equal(tall, rectangle(slice(2, 6),
                                                                                                 slice(5, 7)))
    flat, tall = reached(True, (0, 0))  # no window across the border
    assert torch.equal(flat, rectangle(slice(0, 1), slice(0, 2))) and torch.equal(tall, rectangle(slice(0, 2),
                                                                                                 slice(0, 1)))


def test_a_pass_changes_no_statistics_and_each_image_is_its_own() -> None:
    block, x = DATBlock(16, heads=2, split_height=2, split_width=4).train(), torch.randn(3, 16, 5, 6)
    norms = [module for module in block.modules() if isinstance(module, StoredNorm)]
    for norm in norms:
        torch.nn.init.normal_(norm.running_mean)
    before = {name: value.clone() for name, value in block.named_buffers()}
    with torch.no_grad():
        together = block(x)
        assert torch.allclose(together[1:2], block(x[1:2]), atol=1e-5)
    assert len(norms) == 3 and all(torch.equal(value, before[name]) for name, value in block.named_buffers())


@pytest.mark.parametrize(("options", "message"), [
    ({"depth": (1, 2)}, "one entry a group"), ({"split_size": (4,)}, "height and width"),
    ({"split_size": (3, 4)}, "multiple of the other"), ({"resi_connection": "2conv"}, "allowed: 1conv, 3conv"),
    ({"upsampler": "nearest"}, "allowed: pixelshuffle"), ({"upscale": 5}, "upscale is 1, 2, 3, 4 or 8"),
    ({"embed_dim": 18, "num_heads": (4,)}, "two halves of 2 heads"), ({"expansion_factor": 1.07}, "two halves")])
def test_wrong_sizes_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tiny(**{"depth": (1,), "num_heads": (2,), **options})


@pytest.mark.slow
def test_teacher_and_hybrid_run_in_onnx_runtime_with_the_tables_of_positions_held_once(tmp_path: Path) -> None:
    """`write_checked` compares at several sizes, odd ones too, on flat images and on a half-black one."""
    network = make_tiny(depth=(6,), num_heads=(2,), split_size=(4, 8))
    photo = torch.rand(1, 3, 37, 51)
    assert write_checked(network, tmp_path / "teacher.onnx", photo=photo) < 1e-5
    network.fill("group1.2", create_stack("half", 16, 1))
    network.fill("group1.4", create_stack("dat", 16, 1, heads=2))
    assert write_checked(network, tmp_path / "hybrid.onnx", photo=photo) < 1e-5
    weights = io.BytesIO()
    torch.save(network.state_dict(), weights)
    assert (tmp_path / "hybrid.onnx").stat().st_size < weights.tell() + 200_000
