"""The road of a network that ens has never seen, from the command line alone: each verb in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from ens.data.folders import load_pairs
from ens.data.images import Photo, read_photo, write_photo

ROOT = Path(__file__).resolve().parents[1]
MAPS = """
from torch import nn

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.first, self.second = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x).relu())

class Net(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, dim, 2, stride=2), nn.ConvTranspose2d(dim, 3, 2, stride=2)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))

    def forward(self, image):
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return image + self.head(x)

def build(dim=8):
    return Net(dim)
"""
TOKENS = MAPS.replace("""        return x + self.second(self.first(x).relu())
""", """        raise NotImplementedError
""").replace("""        for block in self.blocks:
            x = block(x)
        return image + self.head(x)
""", """        x_size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, x_size)
        return image + self.head(tokens.transpose(1, 2).unflatten(2, x_size))
""").replace("class Net", """class TokenBlock(Block):
    def __init__(self, dim):
        super().__init__(dim)
        self.norm, self.mix = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x, x_size):
        y = self.mix(self.norm(x)).transpose(1, 2).unflatten(2, x_size)
        return x + self.second(self.first(y).relu()).flatten(2).transpose(1, 2)

class Net""").replace("(Block(dim)", "(TokenBlock(dim)")
SMALL = {"choices": "[conv×1,identity×1]", "distill.steps": 3, "search.budget": 9, "finetune.steps": 2,
         "finetune.phases": "[[0,16,2]]"}
"""So that the road takes seconds."""


def ens(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`ens ARGUMENTS` in a process and a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", "from ens.cli import main; main()", *arguments], cwd=folder,
                          env=environment, capture_output=True, text=True, encoding="utf-8", check=False)


def save_raw_weights(folder: Path) -> None:
    """Weights as the user's own training leaves them, of a network that changes its input a little."""
    names: dict[str, type[nn.Module]] = {}
    exec((folder / "my_network.py").read_text(encoding="utf-8"), names)
    torch.manual_seed(0)
    module = names["Net"](8)
    for parameter in module.get_submodule("head").parameters():
        nn.init.normal_(parameter, std=1e-3)
    torch.save({"state_dict": {f"module.{key}": value for key, value in module.state_dict().items()}, "epoch": 9},
               folder / "raw.pth")


def save_photos(folder: Path) -> None:
    """Two pieces of photos, 40 px high."""
    folder.mkdir()
    for pair in load_pairs("builtin:photos", limit=2):
        write_photo(folder / f"{pair.name}.png", Photo(pair.clean[100:140, 100:148].copy()))


@pytest.mark.slow
@pytest.mark.parametrize("code", [MAPS, TOKENS], ids=["maps", "tokens"])
def test_a_network_nobody_knows_goes_the_whole_road(tmp_path: Path, code: str) -> None:
    (tmp_path / "my_network.py").write_text(code, encoding="utf-8")
    save_raw_weights(tmp_path)
    imported = ("--import", "my_network.py")

    listed = ens("slots", "my_network.py:build", "--set", "dim=8", "--size", "32", folder=tmp_path)
    assert listed.returncode == 0, listed.stderr
    proposed = yaml.safe_load(listed.stdout.partition("In a study:")[2])
    assert proposed["network"] == {"name": "my_network:build", "dim": 8, "slots": ["blocks.0", "blocks.1"],
                                   "size_multiple": 2}

    save_photos(tmp_path / "photos")
    begun = ens("init", "--network", "my_network.py:build", "--set", "dim=8", "--data", "photos", "--task",
                "denoise_s25", "--teacher", "raw.pth", folder=tmp_path)
    assert begun.returncode == 0, begun.stderr
    command = begun.stdout.partition("Next: ")[2].split()
    assert command == ["ens", "run", "study.yaml", "--out", "run", *imported]
    assert yaml.safe_load((tmp_path / "study.yaml").read_text(encoding="utf-8"))["network"] == proposed["network"]

    scored = ens("evaluate", "--checkpoint", "raw.pth", "--network", "my_network.py:build", "--set", "dim=8", "--set",
                 "size_multiple=2", "--data", "photos", "--task", "denoise_s25", folder=tmp_path)
    assert scored.returncode == 0 and "protocol denoise-color-awgn" in scored.stdout, scored.stderr
    done = ens(*command[1:], *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")),
               folder=tmp_path)
    assert done.returncode == 0, done.stderr
    front = ens("pareto", "run", *imported, folder=tmp_path)
    assert front.returncode == 0 and "9 genotypes measured" in front.stdout, front.stderr
    exported = ens("export", "run", "--pick", "1-2", *imported, folder=tmp_path)
    assert exported.returncode == 0 and "Exported: run/export/1-2.onnx" in exported.stdout, exported.stderr
    noise = np.random.default_rng(0).integers(0, 256, (35, 41, 3), dtype=np.uint8)
    write_photo(tmp_path / "noisy.png", Photo(noise))
    restored = ens("restore", "run/export/1-2.onnx", "noisy.png", "clean.png", folder=tmp_path)
    assert restored.returncode == 0 and read_photo(tmp_path / "clean.png").pixels.shape == (35, 41, 3), restored.stderr

    forgotten = ens("export", "run", "--pick", "2-2", folder=tmp_path)
    assert forgotten.returncode == 1
    assert forgotten.stderr == ("error: network 'my_network:build' is code outside ens: add --import my_network (or "
                                "--import my_network.py, where it is a file)\n")


UNET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.first, self.second = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x).relu())

class UNet(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, dim, 3, padding=1), nn.Conv2d(dim, 3, 3, padding=1)
        self.encoder, self.latent, self.decoder = Block(dim), Block(2 * dim), Block(dim)
        self.down, self.up = nn.Conv2d(dim, 2 * dim, 2, stride=2), nn.ConvTranspose2d(2 * dim, dim, 2, stride=2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image):
        skip = self.encoder(self.stem(image))
        return image + self.head(self.decoder(skip + self.up(self.latent(self.down(skip)))))
"""
TRAIN = """
import cv2, torch
from pathlib import Path
from unet import UNet

images = [[torch.from_numpy(cv2.imread(f"pairs/{place}/{path.name}").transpose(2, 0, 1).copy()) / 255
           for place in ("input", "target")] for path in sorted(Path("pairs/input").iterdir())]
torch.manual_seed(0)
network = UNet()
optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
for step in range(600):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
    pairs = []
    for _ in range(8):
        given, wanted = images[torch.randint(len(images), ())]
        top, left = (int(torch.randint(side - 48 + 1, ())) for side in given.shape[1:])
        pairs.append([image[:, top:top + 48, left:left + 48] for image in (given, wanted)])
    given, wanted = (torch.stack(part) for part in zip(*pairs))
    optimizer.zero_grad()
    (network(given) - wanted).square().mean().backward()
    optimizer.step()
torch.save({"model": network.state_dict()}, "unet.pth")
"""


@pytest.mark.slow
def test_pairs_of_a_degradation_nobody_knows_are_restored_by_a_hybrid(tmp_path: Path) -> None:
    """JPEG over blur, a plain U-Net trained by a script of the user's: three commands to a file that helps."""
    rng = np.random.default_rng(0)
    for split, photos in (("pairs", "builtin:train-photos"), ("others", "builtin:validation-photos")):
        for place in ("input", "target"):
            (tmp_path / split / place).mkdir(parents=True)
        for index, pair in enumerate(load_pairs(photos) * 2):
            top, left = (int(rng.integers(side - 192)) for side in pair.clean.shape[:2])
            clean = pair.clean[top:top + 192, left:left + 192].copy()
            write_photo(tmp_path / split / "target" / f"{index}.png", Photo(clean))
            blurred = cv2.GaussianBlur(clean, (0, 0), 1.6)
            coded = cv2.imencode(".jpg", blurred[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1]
            write_photo(tmp_path / split / "input" / f"{index}.png", Photo(cv2.imdecode(coded, 1)[..., ::-1].copy()))
    (tmp_path / "unet.py").write_text(UNET, encoding="utf-8")
    subprocess.run([sys.executable, "-c", TRAIN], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)

    begun = ens("init", "--network", "unet.py:UNet", "--teacher", "unet.pth", "--data", "pairs", "--validation",
                "others", "--task", "paired", folder=tmp_path)
    assert begun.returncode == 0, begun.stderr
    small = {"choices": "[conv×1,rep×1]", "distill.steps": 60, "search.budget": 9, "finetune.steps": 60,
             "distill.patch_px": 32, "finetune.phases": "[[0,32,8]]"}
    done = ens("run", "study.yaml", "--out", "run", "--import", "unet.py",
               *(word for key, value in small.items() for word in ("--set", f"{key}={value}")), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    model = next((tmp_path / "run" / "export").glob("*.onnx"))
    scored = ens("evaluate", "--checkpoint", str(model), "--data", "others", "--task", "paired", folder=tmp_path)
    gain = re.search(r"gain ([+-][\d.]+) dB", scored.stdout)
    assert gain is not None and "protocol paired-rgb" in scored.stdout, scored.stderr
    assert float(gain[1]) >= 0 or "below the degraded input" in done.stderr
