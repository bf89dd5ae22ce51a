"""A first study for a network, images and a goal: what is known is filled in, and every key says what it means."""

from __future__ import annotations

import inspect
import json
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from ens.config import StudyConfig
from ens.data.folders import find_pairs
from ens.data.sizes import read_size
from ens.networks.steps import Network, pad_to_multiple
from ens.space import BUILTIN

CHOICES = ("conv×1", "half×1", "rep×1", "vssd×1(state=16)", "identity×1")
"""A block of each kind that paid somewhere (README, results/): what pays here is for the search to find out."""
_PATCH_PX, _CROP_PX, _STEP_S, _EVALUATION_S = 64, 128, 4.0, 20.0
"""Sides as they are where images and network allow it, and seconds that a teacher's pass over a batch, and over all
validation crops, should stay below."""


@dataclass(frozen=True)
class Draft:
    """Values of a study by key, and what is said about some of them (by dotted key) beside their meaning."""

    values: dict[str, Any]
    notes: dict[str, str]


def draft_study(network: Network, *, task: Mapping[str, Any], scale: int, data: str, validation: str, report: str,
                bounds: Mapping[str, float], folder: Path) -> Draft:
    """Sections of a study file in `folder`: images, patches that fit into them, batches that a short pilot can bear.

    `bounds` are the goal, value by objective; without one multiply-adds are weighed. Raises as `find_pairs` does.
    """
    sides = [min(read_size(pair.clean)) // scale for pair in find_pairs(data, scale=scale)]
    chosen = [min(read_size(pair.clean)) // scale for pair in find_pairs(validation or data, scale=scale)]
    grid = 8 * network.size_multiple if network.size_multiple < 8 else network.size_multiple
    patch_px, crop_px = (max(8, min(most, *found) // grid * grid) for most, found in (
        (_PATCH_PX, sides), (_CROP_PX, chosen)))
    spent = _time_pass(network, patch_px)
    batch = max(1, min(8, int(_STEP_S / spent)))
    crops = max(4, min(32, int(_EVALUATION_S / (spent * (crop_px / patch_px) ** 2))))
    phases = [[0, patch_px, batch]]
    objectives = ["psnr_drop_db", *list(bounds)[:2]] if bounds else ["psnr_drop_db", "macs"]
    pilot = f"A pass of the teacher over one patch of {patch_px} px took {spent:.2g} s here"
    values = {
        "task": dict(task), "choices": list(CHOICES),
        "data": {"train": _relate(data, folder), "validation": _relate(validation or data, folder),
                 "report": _relate(report, folder), "crop_px": crop_px * scale, "limit": min(crops, len(chosen)),
                 "crops_per_image": max(1, crops // len(chosen))},
        "train": {"phases": phases}, "distill": {"patch_px": patch_px, "batch_size": batch},
        "finetune": {"phases": phases},
        "search": {"objectives": objectives, "max": dict(bounds), "batch_size": 8}}
    notes = {"data.crop_px": f"The smallest image has a side of {min(chosen) * scale} px.",
             "distill.batch_size": f"{pilot}.", "finetune.phases": f"{pilot}.",
             **({} if validation else {"data.validation": "The same images train and choose: give others if you can."})}
    return Draft(values, notes)


def _time_pass(network: Network, side_px: int) -> float:
    """Seconds that the network takes for one patch: the faster of two passes."""
    image = pad_to_multiple(torch.rand(1, network.in_channels, side_px, side_px), network.size_multiple)
    spent = []
    with torch.inference_mode():
        for _ in range(2):
            begun = time.perf_counter()
            network.restore(image)
            spent.append(time.perf_counter() - begun)
    return min(spent)


def _relate(location: str, folder: Path) -> str:
    """A location as a study file in `folder` names it."""
    if not location or location.startswith(BUILTIN):
        return location
    return Path(os.path.relpath(Path(location).resolve(), folder.resolve())).as_posix()


def relate_teacher(teacher: Path, folder: Path) -> str:
    """A checkpoint as a study file in `folder` names it."""
    return _relate(str(teacher), folder)


def comment_study(values: Mapping[str, Any], notes: Mapping[str, str], title: Sequence[str]) -> str:
    """A study file: every key there is with its value, under what it means, its default, and what `notes` say."""
    lines = [*(f"# {line}" for line in title), *_comment(StudyConfig, values, notes, ())]
    return "\n".join(lines) + "\n"


def _comment(section: type[BaseModel], values: Mapping[str, Any], notes: Mapping[str, str],
             place: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(place)
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from ("", *_wrap((inspect.getdoc(type(default)) or "").partition("\n\n")[0], indent), f"{key}:")
            yield from _comment(type(default), values.get(key, {}), notes, (*place, key))
            continue
        said = [field.description or "", "" if field.is_required() else f"Default: {_dump(default)}.",
                notes.get(".".join((*place, key)), "")]
        if not place:
            yield ""
        yield from _wrap(" ".join(filter(None, said)), indent)
        yield f"{indent}{key}: {_dump(values.get(key, default))}"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                         break_long_words=False, break_on_hyphens=False)


def _dump(value: object) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(json.loads(json.dumps(value)), default_flow_style=True, allow_unicode=True, width=10**6,
                          sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").strip()
