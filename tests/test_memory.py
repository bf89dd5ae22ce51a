"""Memory of a restoration, under limits that the kernel enforces: decoded pixels and one row of tiles, no more."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ens.data.images import Photo, read_photo, write_photo
from ens.export.formats import write_checked
from ens.networks import create_network

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
HEIGHT_PX, WIDTH_PX, TILE_PX = 4000, 6000, 512

TILED = """
import re, resource, sys
import torch
from ens.data.images import read_photo, write_photo
from ens.runtime.process import keep_freed_memory
from ens.runtime.session import Session, restore_files

def now(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status", encoding="utf-8").read())[1])

small, large, out, tile, budget = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
session = Session(lambda image: image * 1, 8, 1, 3, {})
assert not restore_files(session, small, out, tile_px=tile)  # threads and libraries have their memory
start = now("VmSize")
resource.setrlimit(resource.RLIMIT_AS, (start + budget, start + budget))
keep_freed_memory()
failures = restore_files(session, large, out, tile_px=tile, on_event=print)
print("peak", now("VmHWM"), "address space", now("VmPeak") - start, "failures", [str(failure) for failure in failures])
"""


def photo(height: int, width: int, dtype: type[np.uint8] | type[np.uint16]) -> Photo:
    """Smooth in one direction, noise in the low bits: it neither compresses to nothing nor takes long to."""
    top = np.iinfo(dtype).max
    rows = np.linspace(0, top - 16, height * 3, dtype=dtype).reshape(height, 1, 3)
    return Photo(rows + np.random.default_rng(0).integers(0, 16, (height, width, 3), dtype))


def run(code: str, *arguments: object, limit_bytes: int | None = None) -> str:
    """Standard output and error of Python in a process of its own, which must end well."""
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          encoding="utf-8", preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiles_of_24_megapixels_need_three_times_the_samples_and_one_row(
        tmp_path: Path, dtype: type[np.uint8] | type[np.uint16]) -> None:
    """3 bytes a sample at 8 bits and 6 at 16, decoder's copies included; a row of tiles takes four floats a sample.
    """
    write_photo(tmp_path / "small.png", photo(TILE_PX, 2 * TILE_PX, dtype))
    write_photo(tmp_path / "large.png", photo(HEIGHT_PX, WIDTH_PX, dtype))
    budget = 3 * HEIGHT_PX * WIDTH_PX * 3 * np.dtype(dtype).itemsize + 4 * TILE_PX * WIDTH_PX * 3 * 4
    (tmp_path / "out").mkdir()
    said = run(TILED, tmp_path / "small.png", tmp_path / "large.png", tmp_path / "out", TILE_PX, budget)
    print(f"{np.dtype(dtype).name}, limit {budget / 1e6:.0f} MB: {said}")
    assert "failures []" in said and "out of memory" not in said
    restored, source = (read_photo(tmp_path / name).pixels for name in ("out/large.png", "large.png"))
    assert np.array_equal(restored, source)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "tile"), [(".onnx", None), (".safetensors", 512)])
def test_a_folder_with_24_megapixels_of_16_bits_is_restored_under_three_gigabytes(
        tmp_path: Path, suffix: str, tile: int | None) -> None:
    """`ulimit -v 3000000`, network 8 channels wide; in one piece first, which is too much, or in tiles at once."""
    from ens.networks.checkpoints import save_checkpoint

    torch.manual_seed(0)
    network = create_network("plksr", dim=8, n_blocks=1, kernel_size=5, upscaling_factor=1).eval()
    if suffix == ".onnx":
        write_checked(network, tmp_path / "net.onnx", photo=torch.rand(1, 3, 64, 64))
    else:
        save_checkpoint(tmp_path / "net.safetensors", network)
    sizes = {"a.png": (100, 150), "b.png": (HEIGHT_PX, WIDTH_PX), "c.png": (120, 90)}
    (tmp_path / "in").mkdir()
    for name, size in sizes.items():
        write_photo(tmp_path / "in" / name, photo(*size, np.uint16))
    command = ["restore", tmp_path / f"net{suffix}", tmp_path / "in", tmp_path / "out",
               *(["--tile", tile] if tile else [])]
    said = run("import atexit, re; from ens.cli import main; atexit.register(lambda: print(*re.findall("
               r"r'Vm(?:Peak|HWM):.*', open('/proc/self/status', encoding='utf-8').read()))); main()", *command,
               limit_bytes=3_000_000 * 1024)
    print(suffix, tile, said)
    assert ("going on with tiles" in said) == (tile is None)
    for name, size in sizes.items():
        restored = read_photo(tmp_path / "out" / name).pixels
        assert restored.shape == (*size, 3) and restored.dtype == np.uint16
    peak_mb, limit_mb = int(re.findall(r"VmPeak:\s+(\d+)", said)[0]) / 1000, 3000
    assert peak_mb <= limit_mb
