"""A plain file: the hybrid's own code, without ens, equal to it, and something to train on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ens.blocks import FAMILIES
from ens.export.formats import ExportError
from ens.export.hybrid import build_hybrid
from ens.export.plain import write_plain, write_source
from ens.networks import NETWORKS, create_network
from ens.networks.steps import Network, create_filling
from ens.space import Choice

SCANS = {"mambair", "serpent", "rlmb", "vimm"}
"""Families that need the compiled kernel of ens."""

ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "ens" or name.startswith("ens."):
            raise ImportError("ens is not here")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch, hybrid
network = hybrid.load_network()
given = torch.load(sys.argv[2])
with torch.no_grad():
    errors = [float((network(image) - expected).norm() / expected.norm()) for image, expected in given]
assert max(errors) <= 1e-6, errors
network.train()
optimizer = torch.optim.SGD(network.parameters(), 1e-3)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = (network(given[0][0]) ** 2).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    optimizer.step()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
assert not [name for name in sys.modules if name.split(".")[0] == "ens"]
print("alone")
"""


def make_hybrid(choices: dict[str, Choice]) -> Network:
    torch.manual_seed(0)
    teacher = create_network("restormer", dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 2, 4, 8))
    return build_hybrid(teacher, {name: create_filling(teacher.slot(name), choice) for name, choice in choices.items()})


def test_a_plain_file_equals_the_hybrid_at_any_size_and_trains_where_ens_cannot_be_imported(tmp_path: Path) -> None:
    choices = {"latent": Choice("vssd", 1, (("state", 8),)), "encoder_level1": Choice("conv", 2),
               "decoder_level1": Choice("ssd", 1), "refinement": Choice("identity", 1),
               "decoder_level2": Choice("uformer", 2)}
    hybrid = make_hybrid(choices)
    assert write_plain(hybrid, tmp_path / "hybrid.py", choices=choices, photo=torch.rand(1, 3, 40, 40)) <= 1e-6
    images = [torch.rand(1, 3, *size) for size in ((32, 32), (33, 51), (7, 90))]
    with torch.no_grad():
        torch.save([(image, hybrid(image)) for image in images], tmp_path / "given.pt")
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path, tmp_path / "given.pt"], capture_output=True,
                          text=True, encoding="utf-8")
    assert done.stdout.strip() == "alone", done.stderr
    assert sorted(path.name for path in tmp_path.glob("hybrid.*")) == ["hybrid.py", "hybrid.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stands_alone_or_is_refused_by_name(tmp_path: Path, family: str) -> None:
    choices = {"encoder_level1": Choice(family, 1)}
    hybrid = make_hybrid(choices)
    if family in SCANS:
        with pytest.raises(ExportError, match="compiled code of ens"):
            write_plain(hybrid, tmp_path / "net.py", choices=choices, photo=torch.rand(1, 3, 40, 40))
        assert not list(tmp_path.iterdir())
        return
    write_plain(hybrid, tmp_path / "net.py", choices=choices, photo=torch.rand(1, 3, 40, 40))
    source = (tmp_path / "net.py").read_text(encoding="utf-8")
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert not [name for name in imported if name and name.split(".")[0] == "ens"]
    assert FAMILIES[family].__name__ in source and max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize("name", ["plksr", "uformer"])
def test_other_networks_have_a_source_too(name: str) -> None:
    small = {"plksr": {"dim": 8, "n_blocks": 1, "kernel_size": 5}, "uformer": {"embed_dim": 8}}
    compile(write_source(create_network(name, **small[name]), {}), name, "exec")
    assert name in NETWORKS
