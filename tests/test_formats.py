"""ONNX export: ONNX Runtime reproduces the network at every size, or there is no file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from ens.blocks import FAMILIES, create_stack
from ens.blocks.directions import DirectionalScan
from ens.blocks.vimm import MambaMixer
from ens.data.images import read_photo, to_float
from ens.export.card import write_card
from ens.export.formats import FORMATS, ExportError, ParityError, describe_network, measure_parity, write_checked
from ens.export.hybrid import build_hybrid
from ens.networks import create_network
from ens.networks.steps import Network, SlotSpec, Step, create_filling, pad_to_size
from ens.runtime.session import SessionError, open_session
from ens.runtime.tiling import restore_tiled
from ens.space import Choice

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cbsd68"
EDGE = ("restormer", "ssd", "vssd", "conv", "plk", "identity")
"""Families that keep the edge operator contract."""
SCANS = [family for family in FAMILIES if any(isinstance(module, DirectionalScan | MambaMixer)
                                              for module in create_stack(family, 16, 1).modules())]
SLOW = ("ssd", "dat", *SCANS)
"""Families whose export takes long."""


class OneSlot(Network):
    """Unshuffle, one stack of blocks, shuffle: the smallest network with a size multiple."""

    size_multiple = 2

    def __init__(self, family: str, *, channels: int = 16, upscale: int = 1) -> None:
        super().__init__()
        self.upscale = upscale
        self.steps = (Step("head"), Step("body"), Step("tail"))
        self.slots = (SlotSpec("body", "body", channels, 2, 1, family),)
        self.head = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, channels, 3, padding=1))
        self.body = create_stack(family, channels, 1)
        self.tail = nn.Sequential(nn.Conv2d(channels, 12 * upscale**2, 3, padding=1), nn.PixelShuffle(2 * upscale))


def photo() -> Tensor:
    """A real photo where there is one, noise of an odd size elsewhere."""
    if not PHOTOS.is_dir():
        return torch.rand(1, 3, 61, 83, generator=torch.Generator().manual_seed(1))
    pixels = read_photo(sorted(PHOTOS.glob("*.*"))[0]).pixels[:121, :163]
    return torch.from_numpy(to_float(pixels).transpose(2, 0, 1).copy())[None]


def run(path: Path, image: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow if family == "ssd" else ())
                                    for family in FAMILIES if family not in SCANS])
def test_every_family_runs_in_onnx_runtime_at_sizes_never_seen(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    network = OneSlot(family).eval()
    error = write_checked(network, tmp_path / "net.onnx", photo=photo())
    assert error <= 1e-4
    for size in ((2, 2), (34, 18), (70, 200)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected = network.restore(image)
        assert (run(tmp_path / "net.onnx", image) - expected).norm() <= 1e-4 * expected.norm()
    count = operators(tmp_path / "net.onnx")
    assert not {"Loop", "Scan", "If", "Erf"} & set(count)
    assert family not in EDGE or not {"LayerNormalization", "Einsum", "Where", "CumSum", "GatherND"} & set(count)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def check_lean(path: Path, *, blocks: int, unshuffles: int) -> None:
    """Channel means of norms are 1×1 convolutions (two a norm), GELU is exact, little is asked about shapes."""
    model, count = onnx.load(path), operators(path)
    means = {entry.name for entry in model.graph.initializer if _is_mean(onnx.numpy_helper.to_array(entry))}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in means]
    assert len(convolutions) == 4 * blocks
    assert count["ReduceMean"] == 2 * blocks
    assert count["Gelu"] == blocks and count["Transpose"] == blocks + unshuffles
    assert count["Expand"] == 0 and count["Shape"] <= 3 + 4 * (unshuffles + 1) and count["Cast"] <= 4
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    assert [entry.s for entry in gelu.attribute if entry.name == "approximate"] in ([], [b"none"])
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [bool(side.dim_param) for side in shape] == [False, False, True, True]


def _is_mean(array: np.ndarray) -> bool:
    return array.ndim == 4 and array.shape[0] == 1 and bool((array == np.float32(1 / array.size)).all())


def test_restormer_block_is_lean_and_the_file_describes_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert write_checked(OneSlot("restormer"), tmp_path / "net.onnx", photo=photo(), facts={"task": "denoise"}) <= 1e-5
    check_lean(tmp_path / "net.onnx", blocks=1, unshuffles=1)
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert metadata == {"format": "ens onnx 1", "size_multiple": "2", "upscale": "1", "channels": "3",
                        "task": "denoise"}


@pytest.mark.slow
def test_restormer_and_a_hybrid_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = create_network("restormer", dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 2, 4, 8),
                             layer_norm="BiasFree")
    assert write_checked(teacher, tmp_path / "net.onnx", photo=photo()) <= 1e-5
    check_lean(tmp_path / "net.onnx", blocks=8, unshuffles=3)
    families = ("vssd", "conv", "identity", "plk")
    hybrid = build_hybrid(teacher, {spec.name: create_filling(spec, Choice(family, 1))
                                    for spec, family in zip(teacher.slots, families, strict=False)})
    assert write_checked(hybrid, tmp_path / "net.onnx", photo=photo()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", SCANS)
def test_selective_scans_export_as_one_scan_and_the_card_says_slow(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    network = OneSlot(family).eval()
    write_checked(network, tmp_path / "net.onnx", photo=photo(), tolerance=1e-5)
    assert operators(tmp_path / "net.onnx")["Scan"] == 1
    card = write_card(tmp_path / "net.onnx", {}, metadata=describe_network(network))
    assert "slow" in yaml.safe_load(card.read_text(encoding="utf-8"))["note"]


class Fickle(nn.Module):
    """Exports something else than it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.001 if torch.compiler.is_exporting() else x


class Undecided(nn.Module):
    """Decides on a value, which a graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class Broken(nn.Module):
    """Gives NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x)


@pytest.mark.parametrize(("module", "expected"), [
    (Fickle(), "differs from PyTorch"), (Broken(), "differs from PyTorch"), (Undecided(), "cannot be exported"),
], ids=["fickle", "broken", "undecided"])
def test_no_file_where_the_export_is_not_the_network(tmp_path: Path, module: nn.Module, expected: str) -> None:
    network = OneSlot("identity")
    network.fill("body", module)
    (tmp_path / "net.onnx").write_bytes(b"the file of before")
    with pytest.raises(ExportError, match=expected) as raised:
        write_checked(network, tmp_path / "net.onnx", photo=photo())
    assert isinstance(raised.value, ParityError) == ("differs" in expected)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"net.onnx": b"the file of before"}


def test_parity_notices_weights_of_another_network(tmp_path: Path) -> None:
    network = OneSlot("identity")
    write_checked(network, tmp_path / "net.onnx", photo=photo())
    opened = FORMATS[".onnx"].open(tmp_path / "net.onnx", None).run
    assert measure_parity(network, opened, photo=photo()) < 1e-6
    assert measure_parity(OneSlot("identity"), opened, photo=photo()) > 1e-2


class _Cancelling(nn.Module):
    """Loses about 1e-3 in float32 and nothing to speak of in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3e4) - 3e4


def test_what_pytorch_itself_rounds_away_is_no_fault_of_a_file() -> None:
    network, exact = OneSlot("identity").eval(), OneSlot("identity").eval()
    exact.load_state_dict(network.state_dict())
    network.fill("body", _Cancelling())
    with torch.no_grad():
        loss = (network.restore(photo()[..., :120, :162]) - exact.restore(photo()[..., :120, :162])).norm()
        assert loss > 2e-4 * exact.restore(photo()[..., :120, :162]).norm()  # more than a file may differ
        assert measure_parity(network, exact.restore, photo=photo()) < 1e-4
        assert measure_parity(network, lambda image: 1.02 * exact.restore(image), photo=photo()) > 1e-2


def test_wrong_photo_and_clashing_facts_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, H, W\), got \(1, 1, 8, 8\)"):
        write_checked(OneSlot("identity"), tmp_path / "net.onnx", photo=torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="channels"):
        write_checked(OneSlot("identity"), tmp_path / "net.onnx", photo=photo(), facts={"channels": "4"})


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("height", "width"), [(13, 22), (1, 5)])  # the pad of one pixel is not smaller than the second
def test_the_code_of_the_card_restores_a_photo_without_ens(tmp_path: Path, height: int, width: int) -> None:
    torch.manual_seed(0)
    upscale = 2
    network = OneSlot("identity", upscale=upscale).eval()
    write_checked(network, tmp_path / "net.onnx", photo=photo())
    facts = {"genotype": "0-1", "protocol": "denoise-color-awgn", "choice": Choice("mambair", 2).label}
    path = write_card(tmp_path / "net.onnx", facts, metadata=describe_network(network))
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert card.items() >= facts.items()
    assert "ens" not in card["run"].replace("tensor", "") and "note" not in card
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    with inside(tmp_path):
        exec(card["run"], {})
    with torch.no_grad():
        expected = network(torch.from_numpy(to_float(pixels).transpose(2, 0, 1))[None])[0].permute(1, 2, 0)
    got = to_float(read_photo(tmp_path / "out.png").pixels)
    assert got.shape == (height * upscale, width * upscale, 3)
    assert np.abs(got - expected.clamp(0, 1).numpy()).max() <= 0.502 / 255, "borders included: padded as ens pads"


BLACK = Path(__file__).resolve().parents[1].parent / "shared" / "cases" / "black64.png"


def flat_images() -> dict[str, Tensor]:
    """Black (the file of a bug report where there is one), white, constant, half-black: what kills an epsilon."""
    black = torch.from_numpy(to_float(read_photo(BLACK).pixels).transpose(2, 0, 1).copy())[None].expand(-1, 3, -1, -1) \
        if BLACK.exists() else torch.zeros(1, 3, 64, 64)
    half = torch.full((1, 3, 64, 64), 0.6)
    half[..., :32] = 0
    flat = {"white": torch.ones(1, 3, 64, 64), "constant": torch.full((1, 3, 64, 64), 0.3)}
    return {"black": black, **flat, "half": half}


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow if family in SLOW else ())
                                    for family in FAMILIES])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])  # those with free sides
def test_flat_images_come_out_finite_and_equal_whole_and_in_tiles(tmp_path: Path, family: str, suffix: str) -> None:
    torch.manual_seed(0)
    network = OneSlot(family).eval()
    path = tmp_path / f"net{suffix}"
    write_checked(network, path, photo=photo())
    opened = FORMATS[suffix].open(path, None).run
    for name, image in flat_images().items():
        with torch.no_grad():
            whole = network.restore(image)
            tiled = restore_tiled(network.restore, image, tile_px=24, overlap_px=8, size_multiple=2)
        for got, expected in ((opened(image), whole),
                              (restore_tiled(opened, image, tile_px=24, overlap_px=8, size_multiple=2), tiled)):
            assert torch.isfinite(got).all(), name
            assert (got - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-3), name


def test_epsilons_survive_the_export(tmp_path: Path) -> None:
    """The exporter's own optimiser took `mean + 1e-24` for `mean`; a black image was divided by nothing."""
    write_checked(OneSlot("restormer").eval(), tmp_path / "net.onnx", photo=photo())
    graph = onnx.load(tmp_path / "net.onnx").graph
    tensors = [*graph.initializer, *(node.attribute[0].t for node in graph.node if node.op_type == "Constant")]
    constants = {float(onnx.numpy_helper.to_array(tensor).reshape(-1)[0]) for tensor in tensors
                 if tensor.data_type == onnx.TensorProto.FLOAT}
    assert any(0 < value < 1e-20 for value in constants) and any(9e-6 < value < 1.1e-5 for value in constants)


class RuntimeFailure(Exception):
    """As ONNX Runtime's: of no public class."""


def conceal(error: Exception) -> Exception:
    try:
        raise RuntimeFailure("node 7 failed") from error
    except RuntimeFailure as outer:
        return outer


@pytest.mark.parametrize("step", ["write", "open"])
@pytest.mark.parametrize(("error", "kind"), [
    (MemoryError("no memory"), MemoryError), (OSError(28, "No space left on device"), OSError),
    (conceal(MemoryError("no memory")), MemoryError), (conceal(OSError(28, "No space left on device")), OSError),
    (RuntimeFailure("Failed to allocate memory for requested buffer of size 8"), MemoryError),
    (RuntimeFailure("node 7 failed"), ExportError)])
def test_memory_and_disk_that_run_out_blame_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str,
                                                       error: Exception, kind: type[Exception]) -> None:
    def fail(*arguments: object) -> None:
        raise error
    monkeypatch.setitem(FORMATS, ".onnx", dataclasses.replace(FORMATS[".onnx"], **{step: fail}))
    with pytest.raises(kind) as raised:
        write_checked(OneSlot("identity"), tmp_path / "net.onnx", photo=photo())
    assert not isinstance(raised.value, ParityError) and not list(tmp_path.iterdir())


def test_another_suffix_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the suffix .* one of \.onnx, .*not '\.tflite'"):
        write_checked(OneSlot("identity"), tmp_path / "net.tflite", photo=photo())


def test_pt2_and_onnx_of_a_fixed_size_and_the_other_runtime_of_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = OneSlot("vssd").eval()
    write_checked(network, tmp_path / "net.onnx", photo=photo(), size=(24, 32), runtimes=("ort", "openvino"))
    write_checked(network, tmp_path / "net.pt2", photo=photo(), size=(24, 32))
    image = torch.rand(1, 3, 61, 83)
    expected = restore_tiled(open_session(tmp_path / "net.onnx").run, image, tile_px=24, size_multiple=2)
    for name, runtime in (("net.onnx", ""), ("net.onnx", "openvino"), ("net.pt2", "")):
        session = open_session(tmp_path / name, runtime=runtime)
        assert session.largest_px == 24 and session.facts["format"].startswith("ens ")
        assert (session.restore(image) - expected).norm() <= 1e-4 * expected.norm()
        small = session.restore(image[..., :24, :20])
        with torch.no_grad():
            assert torch.allclose(small, network.restore(pad_to_size(image[..., :24, :20], (24, 32)))[..., :20],
                                  atol=1e-4)
        with pytest.raises(ValueError, match="up to 24 px; tiles of 26 px"):
            session.fit(26, 0)
    with pytest.raises(ExportError, match="multiples of 2, not 25x32"):
        write_checked(network, tmp_path / "odd.onnx", photo=photo(), size=(25, 32))


def test_a_pt2_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    """What torch.export.load would unpickle, call or evaluate."""
    write_checked(OneSlot("identity").eval(), tmp_path / "net.pt2", photo=photo(), size=(16, 16))
    changes = [(b'"use_pickle": false', b'"use_pickle": true'), (b"torch.ops.aten.conv2d.default", b"torch.hub.load"),
               (b'"sizes": [{"as_int": 1}', b'"sizes": [{"as_expr": {"expr_str": "exit()"}}')]
    for number, (old, new) in enumerate(changes):
        with zipfile.ZipFile(tmp_path / "net.pt2") as good, zipfile.ZipFile(tmp_path / f"{number}.pt2", "w") as bad:
            for name in good.namelist():
                bad.writestr(name, good.read(name).replace(old, new))
        with pytest.raises(SessionError, match=r"pickle|torch\.hub\.load|no formula"):
            open_session(tmp_path / f"{number}.pt2")


@pytest.mark.parametrize("family", ["conv", pytest.param("restormer", marks=pytest.mark.slow)])
def test_an_edge_family_runs_in_executorch_whole_and_in_tiles(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    network = OneSlot(family).eval()
    assert write_checked(network, tmp_path / "net.pte", photo=photo(), size=(16, 16)) <= 1e-4
    session, image = open_session(tmp_path / "net.pte"), torch.rand(1, 3, 38, 46)
    assert session.facts["format"] == "ens pte 1" and session.largest_px == 16
    with torch.no_grad():
        expected = restore_tiled(network.restore, image, tile_px=16, size_multiple=2)
    assert (session.restore(image) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.slow
def test_executorch_is_loaded_without_a_word() -> None:
    """It brings packages along that report every library of theirs that they cannot load."""
    done = subprocess.run([sys.executable, "-c", "import ens.export.executorch"], capture_output=True, text=True,
                          encoding="utf-8", cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
