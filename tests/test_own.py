"""Networks of users: their code is run by `--import` alone, and opens what it made again in another process."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ens import own_code
from ens.config import load_study
from ens.data.folders import load_pairs
from ens.data.pairs import Patches, load_validation_set
from ens.data.tasks import create_task
from ens.distill.library import create_library, open_library
from ens.export.hybrid import build_hybrid, open_network, save_hybrid
from ens.networks import create_network, own
from ens.networks.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from ens.networks.steps import create_filling
from ens.options import find_network
from ens.own_code import OwnCodeError, import_code
from ens.run_folder import RunFolder
from ens.runtime.session import open_session
from ens.space import parse_choice

CODE = """
from os import system
from pathlib import Path

import torch
from torch import nn

Path("i_ran").touch()


class Net(nn.Module):
    def __init__(self, dim, upscale=1):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 1, 3)]  # which the meta device cannot
        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU()) for _ in rates])
        self.head = nn.Sequential(nn.Conv2d(dim, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))

    def forward(self, image):
        x = self.stem(image)
        for block in self.body:
            x = block(x)
        return self.head(x)


def build(dim=8, upscale=1, depths=(1,)):
    return Net(dim, upscale=depths[0] * upscale)


def broken(dim=8):
    return Net(dim).missing


def nothing():
    return 3
"""
OPTIONS = {"dim": 4, "slots": ["body.0", "body.2"]}


@pytest.fixture(autouse=True)
def _no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder with the user's file in it to work in, and nothing imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(own_code, "_imported", {})
    before = set(sys.modules)
    Path("my_network.py").write_text(CODE, encoding="utf-8")
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def forget() -> None:
    """What a new process knows."""
    own_code._imported.clear()
    sys.modules.pop("my_network", None)


def test_naming_code_runs_nothing_and_says_which_import_it_needs() -> None:
    Path("study.yaml").write_text(
        "task: {name: denoise_s25}\nnetwork: {name: 'my_network:build', slots: [body.0]}\nchoices: [conv×1]\n"
        "data: {train: 'builtin:photos'}\n", encoding="utf-8")
    with pytest.raises(OwnCodeError, match=r"add --import my_network \(or --import my_network.py"):
        RunFolder.start(load_study("study.yaml"), Path("run"))
    with pytest.raises(OwnCodeError, match=r"add --import my_package\.nets$"):
        create_network("my_package.nets:build")
    assert not Path("i_ran").exists() and "my_network" not in sys.modules


@pytest.mark.parametrize("given", ["my_network.py", "my_network", "./my_network.py"])
def test_what_was_imported_builds_a_network_with_slots(given: str) -> None:
    import_code(given)
    with torch.device("meta"):  # where a study's sizes are read
        network = create_network("my_network:build", **OPTIONS, upscale=2)
    assert [spec.name for spec in network.slots] == ["body.0", "body.2"] and network.upscale == 2
    assert network(torch.rand(1, 3, 9, 7)).shape == (1, 3, 18, 14)


def test_a_module_of_a_package_and_an_entry_point_are_imported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_package").mkdir()
    Path("my_package/nets.py").write_text(CODE, encoding="utf-8")
    import_code("my_package.nets")
    assert create_network("my_package.nets:Net", **OPTIONS).slots
    offer = importlib.metadata.EntryPoint("offered", "my_package.nets:build", own_code.ENTRY_POINTS)
    monkeypatch.setattr(own_code, "entry_points", lambda group: [offer] if group == "ens.networks" else [])
    with pytest.raises(ValueError, match=r"installed packages offer offered \(with --import"):
        create_network("offered", **OPTIONS)
    import_code("offered")
    assert create_network("offered", **OPTIONS).recipe == ("offered", OPTIONS)


def save_own(path: str) -> nn.Module:
    """An own checkpoint and a hybrid beside it; returns the hybrid."""
    network = create_network("my_network:build", **OPTIONS)
    save_checkpoint(f"{path}.safetensors", network)
    choice = parse_choice("conv×1")
    hybrid = build_hybrid(network, {"body.2": create_filling(network.slot("body.2"), choice)})
    save_hybrid(f"{path}-hybrid.safetensors", hybrid, choices={"body.2": choice}, facts={})
    create_library(Path("library"), network, task="denoise", recipe={})
    return hybrid


@pytest.mark.parametrize("open_again", [
    lambda: open_network("own.safetensors"), lambda: open_network("own-hybrid.safetensors"),
    lambda: open_library(Path("library")).load_teacher()])
def test_files_open_in_another_process_with_the_same_import(open_again: Callable[[], nn.Module]) -> None:
    import_code("my_network.py")
    save_own("own")
    forget()
    with pytest.raises(OwnCodeError, match=r"^network .* is code outside ens: add --import my_network "):
        open_again()
    import_code("my_network.py")
    open_again()


def test_a_hybrid_file_computes_the_same_in_another_process() -> None:
    import_code("my_network.py")
    hybrid, image = save_own("own"), torch.rand(1, 3, 9, 7)
    forget()
    import_code("my_network.py")
    assert torch.equal(open_network("own-hybrid.safetensors")(image), hybrid(image))


@pytest.mark.parametrize("prefix", ["", "module.", "netG."])
@pytest.mark.parametrize("wrapper", ["", "params", "state_dict"])
def test_raw_weights_open_with_the_users_class(prefix: str, wrapper: str) -> None:
    import_code("my_network.py")
    module, image = own.build_module("my_network:build", {"dim": 4}).eval(), torch.rand(1, 3, 9, 7)
    state = {f"{prefix}{key}": value for key, value in module.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, "raw.pth")
    network = load_checkpoint("raw.pth", lambda: create_network("my_network:build", **OPTIONS))
    assert torch.equal(network(image), module(image))


def test_weights_that_do_not_fit_are_named_by_the_keys_of_the_users_class() -> None:
    import_code("my_network.py")
    state = own.build_module("my_network:build", {"dim": 4}).state_dict()
    torch.save({"head.1.weight" if key == "head.0.weight" else key: value for key, value in state.items()}, "raw.pth")
    with pytest.raises(CheckpointError, match=r"missing keys: head.0.weight; unexpected keys: head.1.weight$"):
        load_checkpoint("raw.pth", lambda: create_network("my_network:build", **OPTIONS))
    with pytest.raises(CheckpointError, match=r"with --import my_network\.py"):
        load_checkpoint("raw.pth")


@pytest.mark.parametrize(("name", "options", "words"), [
    ("my_network:build", {"dim": 4}, "names no `slots`; `ens slots my_network:build`"),
    ("my_network:build", {"width": 4, "slots": ["body.0"]}, "unexpected keyword argument 'width'.*takes dim, upscale"),
    ("my_network:build", {"slots": ["head"]}, "slot 'head' changes the shape, .1, 8, 64, 96. to"),
    ("my_network:broken", {"slots": ["head"]}, r"AttributeError: .*'missing' \(my_network.py, line 31\)"),
    ("my_network:nothing", {"slots": ["head"]}, "returned a int, not an nn.Module"),
    ("my_network:system", {"command": "touch hacked"}, "defines no function 'system'.*it has Net, build, broken"),
    ("my_network:absent", {}, "defines no function 'absent'")])
def test_mistakes_are_one_sentence(name: str, options: dict[str, object], words: str) -> None:
    import_code("my_network.py")
    with pytest.raises(OwnCodeError, match=words):
        create_network(name, **options)
    assert not Path("hacked").exists()


@pytest.mark.parametrize(("code", "words"), [
    ("import absent_package", r"ModuleNotFoundError: No module named 'absent_package' \(my_faulty.py, line 1\)"),
    ("x = (", "SyntaxError"), ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ("\n1 / 0", r"ZeroDivisionError: division by zero \(my_faulty.py, line 2\)")])
def test_code_that_fails_says_where(code: str, words: str) -> None:
    Path("my_faulty.py").write_text(code, encoding="utf-8")
    with pytest.raises(OwnCodeError, match=f"--import my_faulty.py failed: {words}"):
        import_code("my_faulty.py")
    with pytest.raises(OwnCodeError, match="no such file"):
        import_code("my_absent.py")


def test_a_file_may_not_take_the_name_of_a_module_in_use() -> None:
    Path("torch.py").write_text("", encoding="utf-8")
    with pytest.raises(OwnCodeError, match="a module called torch is in use already"):
        import_code("torch.py")
    assert sys.modules["torch"] is torch


def test_raw_weights_are_scored_and_restored_with_from_the_command_line() -> None:
    import_code("my_network.py")
    module = own.build_module("my_network:build", {"dim": 4})
    torch.save(module.state_dict(), "raw.pth")
    forget()
    create = find_network("my_network.py:build", ["dim=4"])
    session = open_session("raw.pth", create=create)
    image = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.equal(session.restore(image), module.eval()(image))
    larger = find_network("my_network.py:build", ["dim=4"], 2)
    assert larger is not None and larger().upscale == 2, "the task's, unless --set says another"
    with pytest.raises(ValueError, match="--set is for the options of --network"):
        find_network("", ["dim=4"])


DEGRADATION = """
import numpy as np


def fade(clean, rng, strength=0.5, upscale=2):
    clean[:] = strength * clean  # what it is given is its own
    return clean[::upscale, ::upscale] + rng.normal(0, 0.01, clean[::upscale, ::upscale].shape)


def same_size(clean, rng):
    return clean[1:]


def fail(clean, rng):
    return clean.missing


def endless(clean, rng):
    return clean / 0
"""


@pytest.fixture
def fade(tmp_path: Path) -> str:
    Path("my_weather.py").write_text(DEGRADATION, encoding="utf-8")
    import_code("my_weather.py")
    return "my_weather:fade"


def test_a_degradation_of_a_user_makes_patches_and_validation_images(fade: str) -> None:
    task = create_task(fade, {"strength": 0.25})
    assert task.scale == 2, "the function's own default, which it shares with the task"
    degraded, clean = Patches(load_pairs("builtin:report-photos", scale=2), task, seed=1).batch(0, 2, 16)
    assert degraded.shape == (2, 3, 16, 16) and clean.shape == (2, 3, 32, 32)
    assert torch.allclose(degraded, 0.25 * clean[..., ::2, ::2], atol=0.06)
    first, again = (load_validation_set("builtin:report-photos", task, crop_px=64, limit=1) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    other = load_validation_set("builtin:report-photos", create_task(fade, {"strength": 0.26}), crop_px=64, limit=1)
    assert str(other.fingerprint) != str(first.fingerprint), "the archive's manifest holds it"
    assert "my_weather:fade" in str(task) and "0.25" in str(task)


@pytest.mark.parametrize(("name", "options", "said"), [
    ("my_weather:fade", {"strenght": 1}, "does not take these options.*strenght.*it takes clean, rng, strength"),
    ("my_weather:fade", {"upscale": 9}, "upscale is a whole number from 1 to 8"),
    ("my_weather:np", {}, "defines no function 'np'"),
    ("my_rain:fade", {}, "task 'my_rain:fade' is code outside ens: add --import my_rain"),
])
def test_degradations_that_cannot_be_are_refused_when_the_study_is_read(fade: str, name: str, options: dict[str, int],
                                                                       said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_task(name, options)


@pytest.mark.parametrize(("name", "said"), [("same_size", r"returned float32 \(7, 8, 3\).*must return floats of shape"),
                                            ("fail", r"failed: AttributeError.*my_weather.py, line 15"),
                                            ("endless", "not finite")])
def test_what_a_degradation_does_wrong_is_said(fade: str, name: str, said: str) -> None:
    with pytest.raises(OwnCodeError, match=said), np.errstate(all="ignore"):
        create_task(f"my_weather:{name}").degrade(np.zeros((8, 8, 3), np.float32), np.random.default_rng(0))
