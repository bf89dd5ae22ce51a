from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ens import pipeline
from ens.blocks import create_stack
from ens.blocks.vimm import ViMMBlock
from ens.data.tasks import create_task
from ens.networks import create_network
from ens.networks.checkpoints import load_checkpoint
from ens.networks.dvmsr import DVMSR, infer_options

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
CHECKPOINT = SHARED / "checkpoints" / "DVMSR.pth"
needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_file(), reason="../shared/checkpoints/DVMSR.pth is absent")


def load_released(key: str) -> DVMSR:
    state = torch.load(CHECKPOINT, weights_only=True)[key]
    network = create_network("dvmsr", **infer_options(state))
    network.load_state_dict(state)
    assert isinstance(network, DVMSR)
    return network.eval()


def test_parameter_count_is_the_published_one() -> None:
    network = DVMSR()
    assert sum(p.numel() for p in network.parameters()) == 424_428
    assert len(network.state_dict()) == 106


@needs_checkpoint
@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="../shared/golden is absent")
def test_golden_output_with_the_released_weights() -> None:
    with safe_open(SHARED / "golden" / "dvmsr.safetensors", "pt") as file:
        x, truth = file.get_tensor("input.x"), file.get_tensor("output.y")
    with torch.no_grad():
        assert (load_released("params_ema")(x) - truth).norm() < 1e-4 * truth.norm()


@needs_checkpoint
@pytest.mark.parametrize(("key", "corner"), [("params_ema", (0.072193, 0.902699, 0.673333)),
                                             ("params", (0.072323, 0.902375, 0.675006))])
def test_both_released_sets_give_the_recorded_pixels(key: str, corner: tuple[float, ...]) -> None:
    ramp = torch.arange(3 * 8 * 12).view(1, 3, 8, 12)
    with torch.no_grad():
        y = load_released(key)(((37 * ramp + 11) % 256) / 255)
    assert torch.allclose(y[0, :, 0, 0], torch.tensor(corner), atol=2e-5)


def make_tiny() -> DVMSR:
    torch.manual_seed(0)
    network = create_network("dvmsr", embed_dim=12, depths=(2, 1), upscale=2)
    assert isinstance(network, DVMSR)
    return network.eval()


def test_the_run_can_be_cut_anywhere_and_slots_can_be_filled() -> None:
    network, image = make_tiny(), torch.rand(1, 3, 7, 5)
    with torch.no_grad():
        whole = network.restore(image)
        assert whole.shape == (1, 3, 14, 10)
        for cut in range(len(network.steps) + 1):
            assert torch.equal(network.run(network.run(network.start(image), 0, cut), cut)["x"], whole)
        captured = network.capture(image, ["group1", "group1.1", "group2"])
        assert torch.equal(captured["group1"][1], captured["group1.1"][1])
        network.fill("group1.1", create_stack("conv", 12, 1))
        network.fill("group2", create_stack("identity", 12, 1))
        assert network(image).shape == whole.shape


def influence(block: ViMMBlock, pixel: tuple[int, int]) -> Tensor:
    """Which output pixels a change of one input pixel reaches, row-major."""
    x = torch.rand(1, 8, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 0, *pixel] += 1
    with torch.no_grad():
        return (block(x) - block(changed)).abs().sum(1).flatten() > 0


@pytest.mark.parametrize("residual", [True, False])
def test_block_is_one_causal_raster_scan(residual: bool) -> None:
    torch.manual_seed(0)
    reached = influence(ViMMBlock(8, state=4, residual=residual).double(), (1, 2))
    assert not reached[:7].any() and reached[7:].all()


def test_residual_adds_the_input() -> None:
    plain, x = ViMMBlock(8, residual=False), torch.rand(1, 8, 3, 4)
    summed = ViMMBlock(8, residual=True)
    summed.load_state_dict(plain.state_dict())
    assert torch.allclose(summed(x), plain(x) + x)


@needs_checkpoint
def test_released_file_opens_with_its_ema_weights() -> None:
    network, ramp = load_checkpoint(CHECKPOINT), torch.arange(3 * 8 * 12).view(1, 3, 8, 12)
    with torch.no_grad():
        assert torch.equal(network(ramp / 288), load_released("params_ema")(ramp / 288))


@pytest.mark.slow
@needs_checkpoint
@pytest.mark.skipif(not (SHARED / "data" / "set5").is_dir(), reason="../shared/data/set5 is absent")
def test_released_weights_reach_their_figure_on_set5() -> None:
    result, challenge = pipeline.evaluate(CHECKPOINT, str(SHARED / "data" / "set5"), create_task("sr_x4"))
    psnr_db, ssim, _ = result.means()
    assert result.protocol == "sr-y" and 32.1 < psnr_db < 32.3 and abs(ssim - 0.8955) < 1e-3
    # RGB is about 1.7 dB below luma (PRACTICE.md, section 1).
    assert challenge.protocol == "sr-rgb" and 1.4 < psnr_db - challenge.means()[0] < 2.2
