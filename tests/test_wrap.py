from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ens import pipeline
from ens.blocks import create_stack
from ens.config import load_study
from ens.data.folders import load_pairs
from ens.data.images import Photo, read_photo, write_photo
from ens.data.pairs import Patches
from ens.data.tasks import create_task
from ens.distill.fit import train_network
from ens.distill.recipe import Phase, Recipe
from ens.export.culprits import list_culprits
from ens.export.formats import ExportError
from ens.export.hybrid import build_hybrid, open_network, save_hybrid
from ens.networks import create_network, wrap
from ens.networks.checkpoints import load_checkpoint, save_checkpoint
from ens.networks.wrap import wrap_network
from ens.run_folder import RunFolder
from ens.runtime.session import open_session, restore_files
from ens.space import parse_choice


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class OwnNetwork(nn.Module):
    """What a user has: control flow of its own, a skip, two scales, nothing of ens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.outer = Residual(8)
        self.inner = nn.Sequential(Residual(16), Residual(16))
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.outer(self.stem(image))
        return image + self.head(x + self.up(self.inner(self.down(x))))


@pytest.fixture(autouse=True)
def _forget_wrapped_modules() -> Iterator[None]:
    yield
    wrap._WRAPPED.clear()


def wrap_own(seed: int = 0) -> wrap.WrappedNetwork:
    torch.manual_seed(seed)
    return wrap_network(OwnNetwork(), slots=["inner", "outer"], name="own", size_multiple=2)


def test_wrapped_module_computes_the_same_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    module, image = OwnNetwork(), torch.rand(1, 3, 8, 10)
    network = wrap_network(module, slots=["outer", "inner"], name="own", size_multiple=2)
    assert torch.equal(network(image), module(image))
    network.fill("inner", create_stack("identity", 16, 1))
    assert isinstance(module.inner[0], Residual) and not torch.equal(network(image), module(image))
    assert network(torch.rand(1, 3, 7, 9)).shape == (1, 3, 7, 9)


class Normalised(nn.Module):
    """With parts that remember whether they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))

    def forward(self, image: Tensor) -> Tensor:
        return image + self.body(image)


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in network.named_modules()}


@pytest.mark.parametrize("training", [False, True])
def test_wrapping_keeps_the_mode_of_a_module_and_of_its_copies(training: bool) -> None:
    module = Normalised().train(training)
    wrapped = wrap_network(module, slots=["body"], name="own")
    for network in (wrapped, create_network("wrapped", wrapped_as="own")):
        assert set(modes(network).values()) == {training}
        before = {name: value.clone() for name, value in network.named_buffers()}
        for _ in range(3):
            network(torch.rand(1, 3, 8, 8))
        drifted = any(not torch.equal(value, before[name]) for name, value in network.named_buffers())
        assert drifted == training, "a module in eval mode computes the same with each call, statistics included"


def test_parts_with_a_mode_of_their_own_keep_it() -> None:
    module = Normalised().train()
    module.body[1].eval()  # a frozen BatchNorm
    expected = {f"wrapped.{name}".removesuffix("."): mode for name, mode in modes(module).items()} | {"": True}
    wrap_network(module, slots=["body"], name="own")
    assert modes(create_network("wrapped", wrapped_as="own")) == expected
    assert not module.body[1].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_wrapping_keeps_the_precision(dtype: torch.dtype) -> None:
    module = OwnNetwork().to(dtype)
    network = wrap_network(module, slots=["outer", "inner"], name="own", size_multiple=2)
    image = torch.rand(1, 3, 8, 8, dtype=dtype)
    assert {p.dtype for p in network.parameters()} == {dtype} and torch.equal(network(image), module(image))


def test_wrapping_keeps_the_device() -> None:
    """The meta device stands for any other: a tensor of the wrong one raises."""
    network = wrap_network(OwnNetwork().to("meta"), slots=["outer", "inner"], name="own", size_multiple=2)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert [spec.downscale for spec in network.slots] == [1, 2]


def test_slots_are_found_in_the_order_they_run_with_their_sizes() -> None:
    network = wrap_own()
    assert [(spec.name, spec.channels, spec.downscale) for spec in network.slots] == [("outer", 8, 1), ("inner", 16, 2)]
    captured = network.capture(torch.rand(1, 3, 8, 8), ["outer", "inner"])
    assert captured["inner"][0].shape == captured["inner"][1].shape == (1, 16, 4, 4)


def test_sequential_runs_child_by_child() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Residual(4), Residual(4)), Residual(4), nn.Conv2d(4, 3, 1))
    network, image = wrap_network(chain, slots=["2", "1.1"], name="chain"), torch.rand(1, 3, 5, 6)
    assert [(spec.name, network.slot_step(spec.name)) for spec in network.slots] == [("1.1", 1), ("2", 2)]
    assert torch.equal(network.run(network.run(network.start(image), 0, 2), 2)["x"], chain(image))


def test_files_of_a_wrapped_network_open_once_it_is_wrapped(tmp_path: Path) -> None:
    network, image = wrap_own(), torch.rand(1, 3, 8, 8)
    save_checkpoint(tmp_path / "own.safetensors", network)
    hybrid = build_hybrid(network, {"inner": create_stack("conv", 16, 1)})
    save_hybrid(tmp_path / "hybrid.safetensors", hybrid, choices={"inner": parse_choice("conv×1")}, facts={})
    wrap_own(seed=1)
    assert torch.equal(load_checkpoint(tmp_path / "own.safetensors")(image), network(image))
    assert torch.equal(open_network(tmp_path / "hybrid.safetensors")(image), hybrid(image))
    wrap._WRAPPED.clear()
    with pytest.raises(ValueError, match="call wrap_network"):
        load_checkpoint(tmp_path / "own.safetensors")


STUDY = """
task: {name: denoise, sigma_255: 25}
teacher: own.safetensors
choices: [conv×1, identity×1]
data: {train: "builtin:photos", validation: "builtin:photos", crop_px: 32, limit: 1}
distill: {steps: 3, batch_size: 2, patch_px: 16}
search: {engine: exhaustive, objectives: [psnr_drop_db, macs], budget: 9, batch_size: 9}
finetune: {steps: 2, phases: [[0, 16, 2]], taught_weight: 0.5}
"""


def test_the_whole_road_runs(tmp_path: Path) -> None:
    """Distil, search, front, fine-tune, export, and the exported file restores a photo of odd size."""
    task, network = create_task("denoise_s25"), wrap_own()
    nn.init.zeros_(network.get_parameter("wrapped.head.weight"))  # starts as good as its input, and learns from there
    nn.init.zeros_(network.get_parameter("wrapped.head.bias"))
    train_network(network, Patches(load_pairs("builtin:photos"), task), checkpoint=tmp_path / "train.pt",
                  recipe=Recipe((Phase(0, 24, 4),), 20, lr=5e-3))
    save_checkpoint(tmp_path / "own.safetensors", network)
    (tmp_path / "own.yaml").write_text(STUDY, encoding="utf-8")
    onnx = pipeline.run_all(RunFolder.start(load_study(tmp_path / "own.yaml"), tmp_path / "run"))
    for name in ("front.csv", "report.html", "library/manifest.json"):
        assert (tmp_path / "run" / name).exists()
    rng = np.random.default_rng(0)
    write_photo(tmp_path / "noisy.png", Photo(rng.integers(0, 256, (35, 41, 3), dtype=np.uint8)))
    assert not restore_files(open_session(onnx), tmp_path / "noisy.png", tmp_path / "clean.png")
    assert read_photo(tmp_path / "clean.png").pixels.shape == (35, 41, 3)


def test_wrong_slots_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="the module has stem, outer"):
        wrap_network(OwnNetwork(), slots=["middle"], name="own")
    with pytest.raises(ValueError, match="a slot keeps the shape"):
        wrap_network(OwnNetwork(), slots=["down"], name="own")
    with pytest.raises(ValueError, match="no map of the whole 64×96 image"):
        wrap_network(nn.Sequential(nn.MaxPool2d((2, 1)), Residual(3), nn.Upsample(scale_factor=(2, 1))), slots=["1"],
                     name="flat")
    shared = Residual(3)
    with pytest.raises(ValueError, match="called 2 times"):
        wrap_network(nn.Sequential(shared, shared), slots=["0"], name="own")
    with pytest.raises(ValueError, match="upscale 2"):
        wrap_network(OwnNetwork(), slots=["outer"], name="own", upscale=2)
    with pytest.raises(ValueError, match="no module is wrapped as 'other'"):
        create_network("wrapped", wrapped_as="other")


class Deciding(nn.Module):
    """Reads a value to decide by, which no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        return x + (y if float(y.mean()) > 0 else 2 * y)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.plain, self.deciding = Residual(8), Deciding()
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.head(self.deciding(self.plain(self.stem(image))))


def test_the_slot_that_cannot_be_exported_is_named() -> None:
    network = wrap_network(Mixed(), slots=["plain", "deciding"], name="mixed").eval()
    assert list_culprits(network, ["plain", "deciding"], ".onnx") == ["deciding"]
    filled = build_hybrid(network, {"deciding": create_stack("conv", 8, 1)})
    assert list_culprits(filled, ["plain", "deciding"], ".onnx") == []


@pytest.mark.slow
def test_only_genotypes_with_the_slot_that_cannot_be_exported_leave_the_front(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "own.safetensors", wrap_network(Mixed(), slots=["plain", "deciding"], name="mixed"))
    (tmp_path / "own.yaml").write_text(STUDY.replace("denoise, sigma_255: 25", "denoise, sigma_255: 50"),
                                       encoding="utf-8")
    run = RunFolder.start(load_study(tmp_path / "own.yaml"), tmp_path / "run")
    pipeline.search(run)
    with pytest.raises(ExportError, match=r"the cause is deciding \(own×1\); the 3 genotypes with it are marked"):
        pipeline.export(run, "1-0")
    assert set(run.archive.marked) == {(0, 0), (1, 0), (2, 0)}
    assert pipeline.export(run, "0-1")[0].exists()
