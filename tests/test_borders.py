"""Slots on tokens: the wrapper changes between tokens and maps at a slot's border; filled neighbours exchange maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from ens.blocks import create_stack
from ens.evaluate.cost import build_cost_table
from ens.export.formats import write_checked
from ens.export.hybrid import build_hybrid, load_hybrid, save_hybrid
from ens.networks import wrap
from ens.networks.borders import find_size
from ens.networks.slots import build_space
from ens.networks.steps import Network
from ens.networks.wrap import frame_network, wrap_network
from ens.runtime.profiling import _list_added, plan_profile
from ens.space import parse_choice

CHANNELS = 8


@pytest.fixture(autouse=True)
def _forget_wrapped_modules() -> Iterator[None]:
    yield
    wrap._WRAPPED.clear()


class Mixer(nn.Module):
    """What is between tokens and tokens in every block here: needs the size, and tells height from width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.near = nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding=(1, 0), groups=CHANNELS)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.mix(self.norm(x)).transpose(1, 2).reshape(x.shape[0], CHANNELS, height, width)
        return x + self.near(y).flatten(2).transpose(1, 2)


class ByPair(Mixer):
    def forward(self, x: Tensor, x_size: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *(x_size.tolist() if isinstance(x_size, Tensor) else x_size))


class BySizes(Mixer):
    def forward(self, x: Tensor, training: bool, *, h: int, w: int) -> Tensor:  # type: ignore[override]
        assert not training
        return super().forward(x, h, w)


class ByMask(Mixer):
    """With a tensor that depends on the size alone, as windows that are shifted have one."""

    def forward(self, x: Tensor, parameters: dict[str, Any], hw: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x + parameters["mask"], *hw)


class OnRows(Mixer):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(1, 2), x.shape[1], x.shape[2]).reshape(x.shape)


CALLS: dict[str, tuple[type[Mixer], Callable[[nn.Module, Tensor, int, int], Tensor]]] = {
    "tuple": (ByPair, lambda block, x, h, w: block(x, (h, w))),
    "list by keyword": (ByPair, lambda block, x, h, w: block(x, x_size=[h, w])),
    "torch.Size": (ByPair, lambda block, x, h, w: block(x, torch.Size((h, w)))),
    "tensor": (ByPair, lambda block, x, h, w: block(x, torch.tensor([h, w]))),
    "two numbers": (BySizes, lambda block, x, h, w: block(x, False, h=h, w=w)),
    "beside a mask": (ByMask, lambda block, x, h, w: block(
        x, {"mask": torch.arange(h * w).reshape(1, h * w, 1) / (h * w)}, (h, w))),
    "rows": (OnRows, lambda block, x, h, w: block(x.reshape(x.shape[0], h, w, CHANNELS)).flatten(1, 2)),
}


class TokenNetwork(nn.Module):
    """Tokens from the patch embedding to the head, at half resolution."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, CHANNELS, 2, stride=2), nn.ConvTranspose2d(CHANNELS, 3, 2, stride=2)
        block, self.call = CALLS[call]
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = self.call(block, tokens, height, width)
        return image + self.head(tokens.transpose(1, 2).reshape(x.shape))


def wrap_tokens(call: str = "tuple", blocks: int = 3) -> tuple[nn.Module, Network]:
    torch.manual_seed(0)
    module = TokenNetwork(call).eval()
    return module, wrap_network(module, slots=[f"blocks.{index}" for index in range(blocks)], name=call,
                                size_multiple=2)


@pytest.mark.parametrize("call", CALLS)
def test_token_slots_are_maps_to_whoever_fills_them(call: str, tmp_path: Path) -> None:
    module, network = wrap_tokens(call)
    image = torch.rand(2, 3, 10, 14)
    if call != "beside a mask":  # the mask here is made for one image, as it is in a batch
        assert torch.equal(network(image), module(image))
    image = image[:1]
    assert torch.equal(network(image), module(image))
    assert {(spec.channels, spec.downscale) for spec in network.slots} == {(CHANNELS, 2)}
    captured = network.capture(image, ["blocks.0", "blocks.1"])
    assert torch.equal(captured["blocks.0"][1], captured["blocks.1"][0])
    assert captured["blocks.0"][0].shape == (1, CHANNELS, 5, 7)
    choice = parse_choice("conv×1")
    hybrid = build_hybrid(network, {"blocks.1": create_stack("conv", CHANNELS, 1)})
    assert hybrid(image).shape == image.shape and not torch.equal(hybrid(image), module(image))
    save_hybrid(tmp_path / "h.safetensors", hybrid, choices={"blocks.1": choice}, facts={})
    assert torch.equal(load_hybrid(tmp_path / "h.safetensors")(image), hybrid(image))


@pytest.mark.parametrize("call", CALLS)
def test_an_identity_in_a_token_slot_is_the_network_without_the_block(call: str) -> None:
    """Rows and columns, batch and channels keep their places."""
    module, network = wrap_tokens(call)
    hybrid = build_hybrid(network, {"blocks.2": create_stack("identity", CHANNELS, 1)})
    del module.blocks[2]
    image = torch.rand(1, 3, 10, 14)
    assert torch.equal(hybrid(image), module(image))


def test_weights_keep_the_keys_of_the_users_class() -> None:
    module, network = wrap_tokens()
    keys = network.released_keys()
    assert keys.keys() == module.state_dict().keys() and set(keys.values()) == network.state_dict().keys()
    for key, value in module.state_dict().items():
        assert torch.equal(network.state_dict()[keys[key]], value)


def test_costs_of_token_slots_are_those_of_their_blocks() -> None:
    module, network = wrap_tokens()
    space = build_space("tokens", network, choices=[parse_choice("identity×1")])
    table = build_cost_table(network, space, height=32, width=32)
    params = sum(p.numel() for p in module.parameters())
    block = sum(p.numel() for p in module.get_submodule("blocks.0").parameters())
    macs = 16**2 * (CHANNELS * CHANNELS + 3 * CHANNELS)
    whole, without = table.costs((0, 0, 0)), table.costs((1, 0, 0))
    assert whole["params"] == params and whole["params"] - without["params"] == block
    assert whole["macs"] - without["macs"] == macs


class Deciding(nn.Module):
    """Reads a value of what it computes, which there is none of where shapes alone are run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.body(image)
        return x if x.abs().max().item() > 0 else image


def test_a_network_that_reads_values_is_counted_too() -> None:
    network = frame_network(Deciding(), slots=["body"])
    table = build_cost_table(network, build_space("own", network, choices=[parse_choice("identity×1")]), height=8,
                             width=8)
    assert table.costs((0,))["macs"] == 64 * 81 and table.costs((1,))["macs"] == 0


class Unlike(nn.Module):
    """Two pairs of slots of one width, which differ in what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Conv2d(3, 3, 5, padding=2) for _ in range(2))
        self.far = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=2, dilation=2) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        for block in (*self.wide, *self.far):
            image = block(image)
        return image


def test_own_slots_are_timed_once_where_they_differ_in_weights_alone() -> None:
    network = frame_network(Unlike(), slots=["wide.0", "wide.1", "far.0", "far.1"])
    plan = plan_profile(network, build_space("own", network, choices=[parse_choice("conv×1")]), height=16, width=16,
                        checks=0, seed=0)
    own = [plan.entries[name]["own×1"] for name in ("wide.0", "wide.1", "far.0", "far.1")]
    assert own[0] == own[1] != own[2] == own[3]
    _, tokens = wrap_tokens()
    plan = plan_profile(tokens, build_space("own", tokens, choices=[parse_choice("conv×1")]), height=16, width=16,
                        checks=0, seed=0)
    assert len({entry["own×1"] for entry in plan.entries.values()}) == 1


def test_own_slots_that_do_not_run_alone_are_timed_within_the_network() -> None:
    """Tensors beside the map are there in the whole network only."""
    _, network = wrap_tokens("beside a mask", blocks=2)
    with pytest.raises(ValueError, match="they do not run alone"):
        network.get_submodule(network.slot("blocks.0").module)(torch.rand(1, CHANNELS, 5, 7))
    plan = plan_profile(network, build_space("own", network, choices=[parse_choice("conv×1")]), height=16, width=16,
                        checks=0, seed=0)
    parts = {part.name: part for group in plan.groups for part in group}
    kept = parts[plan.entries["blocks.0"]["own×1"]].build()
    image = torch.rand(1, 3, 16, 16)
    expected = build_hybrid(network, {"blocks.1": create_stack("identity", CHANNELS, 1)})
    assert torch.equal(kept.restore(image), expected.restore(image))
    times = {"rest": [4.0, 5.0, 6.0], "within-blocks.0": [9.0, 4.5], "conv": [3.0]}
    assert _list_added("within-blocks.0", times) == [4.0, 0.0] and _list_added("conv", times) == [3.0]


def moves_between(path: Path, first: str, second: str) -> list[str]:
    """Reshapes and transposes on the way from the nodes with a weight of `first` to those with one of `second`."""
    graph = onnx.load(str(path)).graph
    below, above = set(), set()
    for node in graph.node:
        if any(name in below for name in node.input) or any(first in name for name in node.input):
            below.update(node.output)
    for node in reversed(graph.node):
        if any(name in above for name in node.output) or any(second in name for name in node.input):
            above.update(name for name in node.input if name)
    assert below & above
    return [node.op_type for node in graph.node if node.op_type in ("Transpose", "Reshape")
            and set(node.output) & below & above]


def test_filled_neighbours_exchange_maps_in_an_exported_file(tmp_path: Path) -> None:
    """Between a filled slot and the user's own block tokens are made of the map; between two filled ones nothing is."""
    _, network = wrap_tokens()
    filled = build_hybrid(network, {f"blocks.{i}": create_stack("conv", CHANNELS, 1) for i in (0, 1)})
    write_checked(filled, tmp_path / "x.onnx", photo=torch.rand(1, 3, 10, 14))
    assert not moves_between(tmp_path / "x.onnx", "blocks.0.body", "blocks.1.body")
    assert "Transpose" in moves_between(tmp_path / "x.onnx", "blocks.1.body", "blocks.2.body")


class Twice(nn.Module):
    """Its second block gets what the first one made."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Bilinear(3, 3, 3)

    def forward(self, image: Tensor) -> Tensor:
        rows = image.permute(0, 2, 3, 1)
        return self.two(rows, self.one(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.far = nn.LayerNorm(3), nn.LayerNorm(3)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.norm(image.flatten(2).transpose(1, 2))
        windows = image.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[0].permute(1, 2, 3, 0)
        self.far(windows)
        return tokens.transpose(1, 2).reshape(image.shape)


@pytest.mark.parametrize(("module", "slot", "words"), [
    (Twice(), "two", "gets features of the image beside its map"),
    (Windowed(), "norm", r"takes tokens \(1, 6144, 3\) without the size of their map"),
    (Windowed(), "far", r"works on \(96, 8, 8, 3\), which is no map of the whole 64×96 image"),
    (TokenNetwork("tuple"), "stem", "changes the shape")])
def test_what_can_be_no_slot_says_why(module: nn.Module, slot: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"slot '{slot}' {words}"):
        frame_network(module, slots=[slot], size_multiple=2)


def test_a_slot_in_a_slot_of_tokens_is_refused() -> None:
    nested = TokenNetwork("tuple")
    nested.blocks[0].norm.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=r"slot 'blocks.0.near' lies in slot 'blocks.0'"):
        frame_network(nested, slots=["blocks.0", "blocks.0.near"], size_multiple=2)


class Sparing(nn.Module):
    """Looks at what its blocks are, which no block in their place would satisfy."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ByPair()])

    def forward(self, image: Tensor) -> Tensor:
        x = image.repeat(1, 3, 1, 1)[:, :CHANNELS]
        for block in self.blocks:
            if isinstance(block, Mixer):
                x = block(x.flatten(2).transpose(1, 2), x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return x[:, :3]


def test_a_module_that_looks_at_its_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="looks at what its blocks are"):
        frame_network(Sparing(), slots=["blocks.0"])


@pytest.mark.parametrize(("args", "kwargs", "count", "places"), [
    (((4, 6),), {}, 24, (0,)), ((None, [4, 6]), {}, 24, (1,)), ((), {"hw": (4, 6)}, 24, ("hw",)),
    ((4, 6), {}, 24, (0, 1)), ((True, 24), {}, 24, None), (((4, 6),), {}, 25, None), (((4.0, 6.0),), {}, 24, None),
    ((), {"h": 4, "w": 6}, 24, ("h", "w")), ((), {}, 24, None)])
def test_the_size_is_found_by_what_it_says(args: tuple[Any, ...], kwargs: dict[str, Any], count: int,
                                           places: tuple[int | str, ...] | None) -> None:
    found = find_size((args, kwargs), count)
    assert (found and found[0]) == places


class Telling(nn.Module):
    """Needs an extra by keyword, and returns the image among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor, *, strength: float) -> dict[str, Any]:
        return {"noise": 3, "image": image + strength * self.body(image)}


def test_extras_and_an_output_among_others() -> None:
    module, image = Telling().eval(), torch.rand(1, 3, 8, 8)
    network = wrap_network(module, slots=["body"], name="own", output="image", extras={"strength": 0.5})
    assert torch.equal(network(image), module(image, strength=0.5)["image"])
    with pytest.raises(ValueError, match="a dict with noise, image; say as `output` which element"):
        frame_network(module, slots=["body"], extras={"strength": 0.5})
    with pytest.raises(ValueError, match="a dict with noise, image, which has no 1"):
        frame_network(module, slots=["body"], extras={"strength": 0.5}, output=1)
    with pytest.raises(ValueError, match=r"fails on an image of 64×96: TypeError: .*'strength'"):
        frame_network(module, slots=["body"], output="image")
