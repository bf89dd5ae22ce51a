"""A bundle runs where ens is not installed, and restores what ens restores."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ens.data.images import Photo, read_photo, write_photo
from ens.data.pairs import ValidationImage
from ens.export.bundle import write_bundle
from ens.export.formats import write_checked
from ens.networks import create_network
from ens.networks.steps import Network
from ens.runtime.session import open_session, restore_files

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def make_bundle(folder: Path, network: Network) -> Path:
    write_checked(network, folder / "net.onnx", photo=torch.rand(1, 3, 64, 64))
    (folder / "net.yaml").write_text("model: net.onnx\n", encoding="utf-8")
    image = torch.rand(3, 75, 101)
    return write_bundle(folder / "bundle", folder / "net.onnx", folder / "net.yaml",
                        [ValidationImage("a", image, image), ValidationImage("b", image.flip(1), image)])


def check_runs_as_ens(bundle: Path, python: Path | str, tmp_path: Path) -> None:
    """`python` restores the sample whole, in tiles and tiny as `ens restore` does, pixel for pixel."""
    write_photo(tmp_path / "tiny.png", Photo(np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)))
    write_photo(tmp_path / "gray.png", Photo(np.random.default_rng(0).integers(0, 256, (40, 33, 1), np.uint8)))
    session = replace(open_session(bundle / "net.onnx", threads=1), share=None)  # which takes a change of the graph
    sample = bundle / "samples" / "1.png"
    for source, tile, overlap in ((sample, 512, 32), (sample, 40, 13), (tmp_path / "tiny.png", 48, 16),
                                  (tmp_path / "gray.png", 512, 32)):
        subprocess.run([python, "-I", bundle / "restore.py", source, tmp_path / "theirs.png", "--tile", str(tile),
                        "--overlap", str(overlap), "--threads", "1"], check=True, cwd=tmp_path)
        assert not restore_files(session, source, tmp_path / "ours.png", tile_px=tile, overlap_px=overlap)
        theirs, ours = read_photo(tmp_path / "theirs.png").pixels, read_photo(tmp_path / "ours.png").pixels
        if source.name == "gray.png":  # comes back in three colours, whose mean is the gray of ens
            assert theirs.shape[:2] == ours.shape[:2]
        else:
            assert np.array_equal(theirs, ours)


def test_a_bundle_restores_as_ens_does_and_its_checksums_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = make_bundle(tmp_path, create_network("plksr", dim=8, n_blocks=1, kernel_size=5, upscaling_factor=2))
    check_runs_as_ens(bundle, sys.executable, tmp_path)
    lines = (bundle / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {*sums, "SHA256SUMS"} == {"net.onnx", "net.yaml", "restore.py", "requirements.txt", "SHA256SUMS",
                                              "samples/1.png", "samples/2.png"}
    assert all(hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    assert "ens" not in {line.split()[1].split(".")[0] for line in (bundle / "restore.py").read_text(
        encoding="utf-8").splitlines() if line.startswith(("import ", "from "))}


@pytest.mark.slow
def test_a_bundle_runs_in_an_environment_that_holds_its_three_dependencies_only(tmp_path: Path) -> None:
    """Installs from the package index in processes of its own; skipped where that cannot be reached."""
    torch.manual_seed(0)
    bundle = make_bundle(tmp_path, create_network("restormer", dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1,
                                                  heads=(1, 1, 1, 1)))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", "-r", bundle / "requirements.txt", "-c", CONSTRAINTS],
                          capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        assert "No matching distribution" in done.stderr or "Connection" in done.stderr, done.stderr
        pytest.skip("the package index is out of reach")
    listed = subprocess.run([python, "-c", "import importlib.util as u; print([bool(u.find_spec(n)) for n in "
                             "('ens', 'torch', 'cv2', 'onnx', 'onnxruntime', 'numpy', 'PIL')])"],
                            capture_output=True, text=True, encoding="utf-8", check=True, cwd=tmp_path)
    assert listed.stdout.strip() == str([False] * 4 + [True] * 3)
    check_runs_as_ens(bundle, python, tmp_path)
