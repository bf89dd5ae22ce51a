"""Mutated studies, manifests, archives, checkpoints, training states, ONNX files and images: each ends in a sentence.

Every case opens one damaged file in a forked process with a limit of memory and of time. It fails where the answer is
what `ens` would call unexpected, a crash, a hang of 20 s, or more than 4 GB. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ens.config import dump_study, load_study
from ens.data.images import Photo, read_photo, write_photo
from ens.distill.fit import train_network
from ens.distill.library import builtin_folder, open_library
from ens.distill.recipe import Phase, Recipe
from ens.export.formats import write_checked
from ens.networks import create_network
from ens.networks.checkpoints import load_checkpoint, save_checkpoint
from ens.pareto.archive import open_archive, read_archive
from ens.pareto.baseline import Baseline
from ens.runtime.process import describe_error
from ens.runtime.session import open_session
from ens.space import Choice, Measurement, SearchSpace, Slot

_SECONDS, _BYTES = 20, 4 * 10**9
_CRASHED, _UNEXPECTED = 3, 2


def _make_study(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "study.yaml"
    path.write_text(dump_study(load_study(Path("search_spaces/demo.yaml"))), encoding="utf-8")
    return path, load_study


def _make_manifest(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    library = folder / "library"
    shutil.copytree(builtin_folder("denoise_demo"), library)
    return library / "manifest.json", lambda path: open_library(path.parent)


def _make_archive(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "archive.db"
    slots = tuple(Slot(name, (Choice("restormer", 2, teacher=True), Choice("conv", 1))) for name in ("a", "b"))
    with open_archive(path, space=SearchSpace("fuzz", slots), objectives=("psnr_drop_db", "macs"),
                      manifest={"task": "x"}, baseline=Baseline((30.0, 31.0), (), {})) as archive:
        for genotype in ((0, 0), (0, 1), (1, 0), (1, 1)):
            values = {"psnr_drop_db": float(sum(genotype)), "macs": 1e9 / (1 + sum(genotype))}
            archive.record(Measurement(genotype, values, (30.0, 31.0)))
    return path, lambda path: read_archive(path).measurements()


def _make_checkpoint(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "teacher.safetensors"
    save_checkpoint(path, create_network("restormer", dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1))
    return path, load_checkpoint


def _make_pickle(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "teacher.pth"
    network = create_network("restormer", dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)
    torch.save({"params": network.state_dict()}, path)
    return path, load_checkpoint


class _Noise:
    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches to train on that mean nothing."""
        clean = torch.rand(batch_size, 1, patch_px, patch_px)
        return 2 * clean, clean


def _make_state(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "train.pt"

    def train(path: Path, *, stop: bool = False) -> None:
        train_network(torch.nn.Conv2d(1, 1, 1), _Noise(), recipe=Recipe((Phase(0, 4, 2),), 3), checkpoint=path,
                      bf16=False, should_stop=lambda: stop)

    train(path, stop=True)
    return path, train


def _make_onnx(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path, image = folder / "net.onnx", torch.rand(1, 3, 16, 16)
    write_checked(create_network("plksr", dim=8, n_blocks=1, upscaling_factor=2), path, photo=torch.rand(1, 3, 32, 40))
    return path, lambda path: open_session(path, threads=1).run(image)


def _make_image(folder: Path, suffix: str) -> tuple[Path, Callable[[Path], object]]:
    path = folder / f"photo{suffix}"
    depth = np.uint16 if suffix in (".png", ".tif") else np.uint8
    write_photo(path, Photo(np.random.default_rng(0).integers(0, 255, (40, 56, 3)).astype(depth)))
    return path, read_photo


MAKERS: dict[str, Callable[[Path], tuple[Path, Callable[[Path], object]]]] = {
    "study": _make_study, "manifest": _make_manifest, "archive": _make_archive, "safetensors": _make_checkpoint,
    "pickle": _make_pickle, "training state": _make_state, "onnx": _make_onnx,
    **{suffix: functools.partial(_make_image, suffix=suffix) for suffix in (".png", ".jpg", ".tif", ".webp")},
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, a piece cut, doubled, zeroed, or a number in the text made absurd."""
    kind, changed = rng.randrange(6), bytearray(data)
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 4, 64, 4096)))
    if kind == 0:
        for _ in range(rng.choice((1, 8, 200))):
            changed[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        changed[start:start] = data[start:stop]
    elif kind == 3:
        changed[start:stop] = bytes(stop - start)
    elif kind == 4:
        del changed[start:stop]
    else:
        digits = [index for index in range(len(data)) if chr(data[index]).isdigit()] or [start]
        place = rng.choice(digits)
        changed[place:place + 1] = rng.choice((b"-1", b"1e999", b"999999999999", b"null", b"[]", b"nan", b"0"))
    return bytes(changed)


def run_case(path: Path, read: Callable[[Path], object]) -> tuple[int, str]:
    """Exit code and report of reading the file in a forked process: 0 or 1 is well; negative is a signal."""
    report = path.parent / "report.txt"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, used + _BYTES))
        signal.alarm(_SECONDS)
        try:
            read(path)
            code = 0
        except Exception as error:
            text, code = describe_error(error, "ens")
            if not text or "unexpected" in text or "memory ran out" in text:
                code = _UNEXPECTED
                report.write_text(traceback.format_exc(), encoding="utf-8")
        except BaseException:
            code = _CRASHED
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), report.read_text(encoding="utf-8") if report.exists() else ""


def fuzz(count: int, *, seed: int, seconds: float, folder: Path) -> list[str]:
    """Run up to `count` cases in about `seconds`; returns what failed, and keeps those files in `folder`."""
    torch.set_num_threads(1)
    made = {}
    for name, make in MAKERS.items():
        (folder / name).mkdir(parents=True)
        made[name] = make(folder / name)
        made[name][1](made[name][0])  # the sound file opens, and what reading it imports is there before the forks
    sound = {name: path.read_bytes() for name, (path, _) in made.items()}
    counts, failed, end = Counter[str](), [], time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > end:
            break
        rng, name = random.Random(f"{seed}-{number}"), list(made)[number % len(made)]
        path, read = made[name]
        path.write_bytes(mutate(sound[name], rng))
        code, report = run_case(path, read)
        counts[f"{name}: {'opens' if code == 0 else 'refused' if code == 1 else 'FAILED'}"] += 1
        if code not in (0, 1):
            shutil.copy(path, folder / f"failed-{number}{path.suffix}")
            failed.append(f"case {number}, {name}: exit code {code}\n{report}")
    for key in sorted(counts):
        print(f"{key} {counts[key]}")
    return failed


def main() -> None:
    """Run the campaign; exit code 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1200)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ens-fuzz-"))
    failed = fuzz(given.count, seed=given.seed, seconds=given.seconds, folder=folder)
    print("\n".join(failed))
    print(f"{len(failed)} cases failed" + (f"; their files are in {folder}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
