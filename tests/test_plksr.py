from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ens import pipeline
from ens.blocks import create_stack
from ens.blocks.plk import PLKBlock
from ens.config import load_study
from ens.data.images import Photo, read_photo, write_photo
from ens.networks import create_network
from ens.networks.plksr import PLKSR, infer_options
from ens.run_folder import RunFolder
from ens.runtime.session import open_session, restore_files

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
TINY: dict[str, Any] = {"n_blocks": 12, "kernel_size": 13, "use_ea": False}
COUNTS = [({}, 2, 7_365_324), ({}, 3, 7_373_979), ({}, 4, 7_386_096),
          (TINY, 2, 2_349_772), (TINY, 3, 2_358_427), (TINY, 4, 2_370_544)]


@pytest.mark.parametrize(("options", "scale", "params"), COUNTS)
def test_parameter_counts_are_the_published_ones(options: dict[str, Any], scale: int, params: int) -> None:
    with torch.device("meta"):
        network = PLKSR(upscaling_factor=scale, **options)
    assert sum(p.numel() for p in network.parameters()) == params
    assert len(network.state_dict()) == (100 if options else 284)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent: golden vectors not compared")
@pytest.mark.parametrize("name", ["plksr", "plksr_tiny"])
def test_golden_output_with_released_keys(name: str) -> None:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = file.metadata()
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    network = create_network("plksr", **infer_options(state))
    assert network.recipe is not None and network.recipe[1]["kernel_size"] == int(given["kernel_size"])
    network.load_state_dict(state)
    y = network(tensors["input.x"])
    assert (y - tensors["output.y"]).norm() < 1e-4 * tensors["output.y"].norm()


def make_tiny(**options: Any) -> PLKSR:
    torch.manual_seed(0)
    network = create_network("plksr", dim=16, n_blocks=3, kernel_size=5, **options)
    assert isinstance(network, PLKSR)
    return network


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_zero_detail_leaves_the_nearest_neighbour_image(scale: int) -> None:
    network = make_tiny(upscaling_factor=scale)
    torch.nn.init.zeros_(network.feats[-1].weight)
    torch.nn.init.zeros_(network.feats[-1].bias)
    image = torch.rand(1, 3, 7, 5)
    assert torch.equal(network(image), image.repeat_interleave(scale, 2).repeat_interleave(scale, 3))


def test_the_run_can_be_cut_anywhere_and_slots_can_be_filled() -> None:
    network, image = make_tiny().eval(), torch.rand(1, 3, 6, 9)
    with torch.no_grad():
        whole = network.restore(image)
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
        features = network.capture(image, ["block1", "block3"])
        assert features["block3"][0].shape == features["block3"][1].shape == (1, 16, 6, 9)
        network.fill("block2", create_stack("identity", 16, 1))
        assert network(image).shape == whole.shape and not torch.equal(network(image), whole)
    assert [network.slot_step(spec.name) for spec in network.slots] == [1, 2, 3]


@pytest.mark.parametrize("ccm_type", ["DCCM", "CCM", "ICCM"])
def test_inference_of_options_finds_the_channel_mixer(ccm_type: str) -> None:
    options = infer_options(make_tiny(ccm_type=ccm_type, upscaling_factor=3).state_dict())
    assert (options["ccm_type"], options["upscaling_factor"], options["n_blocks"]) == (ccm_type, 3, 3)


def branch_beside(block: PLKBlock, x: Tensor) -> Tensor:
    """The block with its identity branch run as a branch."""
    mixed = block.channe_mixer(x)
    first = block.lk.conv(mixed[:, :block.lk.large]) + mixed[:, :block.lk.large]
    return x + block.refine(block.attn(torch.cat([first, mixed[:, block.lk.large:]], 1)))


def test_folded_identity_branch_equals_the_branch() -> None:
    block, x = PLKBlock(16, kernel_size=7, with_idt=True), torch.rand(2, 16, 9, 11)
    assert torch.allclose(block(x), branch_beside(block, x), atol=1e-5)
    assert set(block.state_dict()) == set(PLKBlock(16, kernel_size=7).state_dict())


@pytest.mark.slow
def test_exported_graph_holds_one_convolution_a_layer() -> None:
    program = torch.export.export(PLKBlock(16, kernel_size=7, with_idt=True).eval(), (torch.rand(1, 16, 9, 11),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv2d" in name for name in names) == 5
    assert not any("copy" in name for name in names)


def test_large_kernel_stays_on_few_channels_in_wide_levels() -> None:
    assert PLKBlock(384).lk.large == 16
    assert PLKBlock(384, max_large_channels=384).lk.large == 96


def test_wrong_options_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="DCCM, CCM, ICCM"):
        PLKBlock(16, ccm_type="MLP")
    with pytest.raises(ValueError, match="odd"):
        PLKBlock(16, kernel_size=4)


STUDY = """
task: {name: sr, upscale: 4}
network: {name: plksr, dim: 16, n_blocks: 3, kernel_size: 5, upscaling_factor: 4}
slots: {block1: [conv×1, identity×1], block2: [vssd×1(state=4)], block3: [{family: plk, kernel_size: 3}]}
data: {train: "builtin:photos", validation: "builtin:photos", crop_px: 64, limit: 1}
train: {steps: 2, phases: [[0, 16, 2]]}
distill: {steps: 2, batch_size: 2, patch_px: 16}
search: {engine: exhaustive, objectives: [psnr_drop_db, macs], budget: 12, batch_size: 12}
finetune: {steps: 2, phases: [[0, 16, 2]], taught_weight: 0.5}
"""


@pytest.mark.slow
def test_the_whole_road_ends_with_a_file_that_enlarges_a_photo_of_odd_size(tmp_path: Path) -> None:
    (tmp_path / "plksr.yaml").write_text(STUDY, encoding="utf-8")
    onnx = pipeline.run_all(RunFolder.start(load_study(tmp_path / "plksr.yaml"), tmp_path / "run"), pick="1-1-0")
    rng = np.random.default_rng(0)
    write_photo(tmp_path / "small.png", Photo(rng.integers(0, 256, (35, 41, 3), dtype=np.uint8)))
    for name, tile_px in (("whole.png", None), ("tiled.png", 24)):
        assert not restore_files(open_session(onnx), tmp_path / "small.png", tmp_path / name, tile_px=tile_px,
                                 overlap_px=8)
        assert read_photo(tmp_path / name).pixels.shape == (140, 164, 3)
