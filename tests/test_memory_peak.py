"""Peak activation memory: by hand, and as in the file that an export writes, followed by other means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from ens.blocks.rep import fold_blocks
from ens.evaluate.memory import build_peak_tally
from ens.export.formats import FORMATS, describe_network
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import Network, create_filling
from ens.networks.wrap import wrap_network
from ens.space import SearchSpace, parse_choice

SIDE = 64
VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def follow_file(path: Path) -> int:
    """Most bytes alive together in an ONNX file for an image of 64×64: sizes are those that ONNX Runtime really gives,
    operators run in the order of the file, and a value lives until it is read last.
    """
    model = onnx.load(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = SIDE
    names = [name for node in model.graph.node for name in node.output]
    del model.graph.value_info[:], model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = np.zeros((1, 3, SIDE, SIDE), np.float32)
    sizes = {name: value.nbytes for name, value in zip(names, session.run(names, {"image": image}), strict=True)}
    sizes["image"] = image.nbytes
    root, born, last = {"image": "image"}, {"image": 0}, {"image": 0}
    for time, node in enumerate(model.graph.node, 1):
        for name in filter(root.__contains__, node.input):
            last[root[name]] = time
        for name in node.output:
            root[name] = root.get(node.input[0], name) if node.op_type in VIEWS else name
            born.setdefault(root[name], time)
            last[root[name]] = time
    last[root["restored"]] = len(model.graph.node)
    return max(sum(sizes[name] for name in born if born[name] <= time <= last[name])
               for time in range(len(model.graph.node) + 1))


def small_restormer() -> Network:
    torch.manual_seed(0)
    return create_network("restormer", dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1,
                          heads=(1, 2, 2, 2)).eval()


def fill(network: Network, space: SearchSpace, genotype: tuple[int, ...]) -> Network:
    for name, choice in space.replaced(genotype).items():
        network.fill(name, create_filling(network.slot(name), choice).eval())
    return network


MIXED = ((1, 2, 3, 1, 2, 3, 1, 2),)
EACH = ((0,) * 8, (1,) * 8, (2,) * 8, (3,) * 8)


@pytest.mark.parametrize(("choices", "tolerance", "genotypes"), [
    (("conv×1", "half×1", "rep×2"), 0.01, MIXED),
    pytest.param(("plk×1", "half×1", "restormer×2"), 0.01, EACH[:2], marks=pytest.mark.slow),
    pytest.param(("rep×1(width=2.0)", "ssd×1", "uformer×1"), 0.1, MIXED, marks=pytest.mark.slow),
    pytest.param(("vssd×1(state=16)", "rep×2", "conv×2"), 0.1, EACH[1:], marks=pytest.mark.slow)])
def test_the_peak_is_that_of_the_exported_file(tmp_path: Path, choices: tuple[str, ...], tolerance: float,
                                               genotypes: tuple[tuple[int, ...], ...]) -> None:
    """vssd and ssd within a tenth: their files spread scales over all channels, for the sake of their layout."""
    space = build_space("s", small_restormer(), choices=[parse_choice(text) for text in choices])
    tally = build_peak_tally(small_restormer(), space, height=SIDE, width=SIDE)
    for genotype in genotypes:
        network = fold_blocks(fill(small_restormer(), space, genotype))
        FORMATS[".onnx"].write(network, path := tmp_path / "net.onnx", describe_network(network, None), None, print)
        peak = tally.join(tally.rest, *(row[index] for row, index in zip(tally.entries, genotype, strict=True)))
        assert peak == pytest.approx(follow_file(path), rel=tolerance), genotype


def test_a_skip_counts_while_it_waits_and_no_longer() -> None:
    """A convolution from 3 to 8 channels, a slot whose input is added behind it, a slot behind that, and back to 3."""
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.leave = nn.Conv2d(8, 3, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.enter(image)
            return self.leave(self.two(x + self.one(x)))

    network = wrap_network(Skipping(), slots=["one", "two"], name="skipping", probe_px=8)
    space = build_space("s", network, choices=[parse_choice("rep×1(activation=relu,width=4.0)")])
    tally = build_peak_tally(network, space, height=8, width=8)
    map_bytes = 4 * 8 * 8
    # Between: the sum with its two operands. In a slot: operand and result; x waits beside the first one either way.
    # The replacement: its own input to the end, and 32 channels before and after the activation.
    assert tally.rest == 24 * map_bytes
    assert tally.entries == ((16 * map_bytes, (8 + 64) * map_bytes), (16 * map_bytes, (8 + 64) * map_bytes))
