"""int8 files: within the bound they were given or not there at all; what must stay float stays float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ens.blocks import create_stack
from ens.data.images import fingerprint_images
from ens.data.pairs import ValidationImage, ValidationSet
from ens.data.tasks import create_task
from ens.evaluate.protocols import Protocol, task_protocols
from ens.export.formats import write_checked
from ens.export.int8 import Int8Error, list_groups, write_int8
from ens.networks.steps import Network, SlotSpec, Step
from ens.runtime.session import open_session

PROTOCOL: Protocol = task_protocols(create_task("denoise_s25"))[0]


class TwoSlots(Network):
    """Unshuffle, a restormer and a state-space block, shuffle; the image is added at the end."""

    size_multiple = 2

    def __init__(self) -> None:
        super().__init__()
        self.steps = (Step("head", save="kept"), Step("first"), Step("second", add=""), Step("tail"),
                      Step("", add="image"))
        self.slots = (SlotSpec("first", "first", 16, 2, 1, "restormer"), SlotSpec("second", "second", 16, 2, 1, "vssd"))
        self.head = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 16, 3, padding=1))
        self.first, self.second = create_stack("restormer", 16, 1), create_stack("vssd", 16, 1)
        self.tail = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))


def make_images(count: int) -> ValidationSet:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 40, 48, generator=generator) for _ in range(count)]
    pixels = [np.zeros((4, 4, 3), np.uint8)]
    return ValidationSet(tuple(ValidationImage(str(index), image, image * 0.9) for index, image in enumerate(images)),
                         fingerprint_images(pixels, [np.zeros(3)], paired=True, seeding=""))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    write_checked(TwoSlots(), path, photo=torch.rand(1, 3, 64, 64), facts={"task": "t"})
    return path


def calibration() -> list[Tensor]:
    return [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(index)) for index in range(3)]


SLOTS = {"first": "first", "second": "second"}


def quantised(path: Path) -> set[str]:
    """Convolutions and products that read what was made of 8 bits."""
    model = onnx.load(path)
    coarse = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.name for node in model.graph.node
            if node.op_type in ("Conv", "MatMul") and coarse.issuperset(node.input[:2])}


def test_an_int8_file_opens_as_any_other_and_says_what_it_costs(exported: Path, tmp_path: Path) -> None:
    images, said = make_images(2), list[str]()
    report = write_int8(exported, tmp_path / "net.int8.onnx", slots=SLOTS, calibration=calibration(), images=images,
                        protocol=PROTOCOL, max_cost_db=60, on_event=said.append)
    groups = list_groups(onnx.load(exported), SLOTS)
    assert set(groups) == {"first", "second"} and report.float_slots == ()
    assert quantised(tmp_path / "net.int8.onnx") == {node for nodes in groups.values() for node in nodes}
    session = open_session(tmp_path / "net.int8.onnx")
    assert session.facts["task"] == "t" and session.facts["int8_psnr_cost_db"] == f"{report.cost_db:.3f}"
    assert session.facts["format"] == "ens onnx int8 1" and session.facts["int8_float_slots"] == "none"
    before, after = (open_session(path).restore(torch.rand(1, 3, 33, 51)) for path in
                     (exported, tmp_path / "net.int8.onnx"))
    assert before.shape == after.shape and not torch.equal(before, after)


def test_norms_activations_and_both_ends_stay_float(exported: Path) -> None:
    model = onnx.load(exported)
    weights = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    chosen = {name for nodes in list_groups(model, SLOTS).values() for name in nodes}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {convolutions[0].name, convolutions[-1].name}.isdisjoint(chosen)
    for node in model.graph.node:
        if node.name in chosen:
            assert node.op_type in ("Conv", "MatMul") and np.ptp(weights[node.input[1]]) > 0
    assert any(node.op_type == "MatMul" for node in model.graph.node)  # attention and state-space core: float


def test_the_slots_that_cost_most_stay_float_until_the_bound_holds(exported: Path, tmp_path: Path) -> None:
    images = make_images(2)
    free = write_int8(exported, tmp_path / "a.onnx", slots=SLOTS, calibration=calibration(), images=images,
                      protocol=PROTOCOL, max_cost_db=60)
    # Random weights lose or gain at random: a bound just below what all slots cost together asks for one in float.
    with_one = write_int8(exported, tmp_path / "b.onnx", slots=SLOTS, calibration=calibration(), images=images,
                          protocol=PROTOCOL, max_cost_db=free.cost_db - 1e-9)
    assert len(with_one.float_slots) == 1 and with_one.cost_db < free.cost_db
    assert set(with_one.slot_costs_db) == {"first", "second"}
    assert with_one.float_slots[0] == max(with_one.slot_costs_db, key=lambda name: with_one.slot_costs_db[name])
    assert quantised(tmp_path / "b.onnx") < quantised(tmp_path / "a.onnx")


def test_a_bound_that_cannot_hold_leaves_no_file(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(Int8Error, match="dB even where only"):
        write_int8(exported, tmp_path / "c.onnx", slots=SLOTS, calibration=calibration(), images=make_images(1),
                   protocol=PROTOCOL, max_cost_db=-60)
    assert not list(tmp_path.iterdir())


def test_a_shared_bias_may_have_a_name_that_is_the_beginning_of_another(exported: Path, tmp_path: Path) -> None:
    """ONNX Runtime copies a bias of two convolutions under its name and a number."""
    model = onnx.load(exported)
    shape = {entry.name: list(entry.dims) for entry in model.graph.initializer}
    used = [node for node in model.graph.node if node.op_type == "Conv" and shape.get(node.input[1], [0])[0] == 16]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(16, np.float32), "shared"))
    for node in used:
        node.input[:] = [*node.input[:2], "shared"]
    taken = next(node for node in model.graph.node if node.op_type == "Sqrt")
    for node in model.graph.node:
        node.input[:] = ["shared0" if name == taken.output[0] else name for name in node.input]
    taken.output[0] = "shared0"
    assert len(used) > 1
    onnx.save(model, tmp_path / "shared.onnx")
    write_int8(tmp_path / "shared.onnx", tmp_path / "int8.onnx", slots=SLOTS, calibration=calibration(),
               images=make_images(1), protocol=PROTOCOL, max_cost_db=60)
    assert open_session(tmp_path / "int8.onnx").restore(torch.rand(1, 3, 20, 20)).isfinite().all()
