"""TASKS: the tasks by name, and the one way to make one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from ens.data.degradations import (
    Range,
    add_gaussian_noise,
    add_protocol_noise,
    add_rain,
    blur,
    compress_jpeg,
    draw_motion_kernel,
    quantise,
    resize_bicubic,
)
from ens.data.folders import studio_luma
from ens.data.images import FloatImage
from ens.data.own_task import create_own_task
from ens.data.task import Task as Task
from ens.own_code import is_own

_JPEG_GRID_PX = 16  # a 4:2:0 unit: two 8×8 blocks each way


@dataclass(frozen=True)
class Denoise(Task):
    """White Gaussian noise: fixed `sigma_255`, or blind: uniform in a range such as (0, 50).

    A blind task is validated at `validation_sigma_255` (25 unless said); a fixed one at its own σ.
    """

    name: ClassVar[str] = "denoise"
    protocol_name: ClassVar[str] = "denoise-color-awgn"
    degradation: ClassVar[str] = "white Gaussian noise"
    seeding: ClassVar[str] = "seed 0 for each"
    sigma_255: float | Range = 25.0
    validation_sigma_255: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sigma_255, tuple):
            _check_range(self, "sigma_255", self.sigma_255, 0, 255)
        else:
            _check_number(self, "sigma_255", self.sigma_255, 0, 255)
        if self.validation_sigma_255 is not None:
            _check_number(self, "validation_sigma_255", self.validation_sigma_255, 0, 255)

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        sigma = rng.uniform(*self.sigma_255) if isinstance(self.sigma_255, tuple) else self.sigma_255
        return add_gaussian_noise(clean, sigma, rng)

    def degrade_for_validation(self, clean: FloatImage) -> FloatImage:
        fixed = 25.0 if isinstance(self.sigma_255, tuple) else self.sigma_255
        return add_protocol_noise(clean, fixed if self.validation_sigma_255 is None else self.validation_sigma_255)


@dataclass(frozen=True)
class Derain(Task):
    """Synthetic rain streaks, ranges as in `add_rain`; density is streaks per pixel, angle is from the vertical."""

    name: ClassVar[str] = "derain"
    protocol_name: ClassVar[str] = "derain-y"
    degradation: ClassVar[str] = "synthetic rain"
    seeding: ClassVar[str] = "seeded by content"
    angle_deg: Range = (-25.0, 25.0)
    length_px: Range = (12.0, 50.0)
    density: Range = (0.0005, 0.008)
    brightness: Range = (0.3, 0.7)

    def __post_init__(self) -> None:
        _check_range(self, "angle_deg", self.angle_deg, -90, 90)
        _check_range(self, "length_px", self.length_px, 1, 500)
        _check_range(self, "density", self.density, 0, 1)
        _check_range(self, "brightness", self.brightness, 0, 1)

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        return quantise(add_rain(clean, rng, angle_deg=self.angle_deg, length_px=self.length_px,
                                 density=self.density, brightness=self.brightness))


@dataclass(frozen=True)
class Deblur(Task):
    """Synthetic camera motion: path length drawn from `length_px`, straightness from `shake` (0 is a line)."""

    name: ClassVar[str] = "deblur"
    protocol_name: ClassVar[str] = "deblur-rgb"
    degradation: ClassVar[str] = "synthetic motion blur"
    seeding: ClassVar[str] = "seeded by content"
    length_px: Range = (5.0, 30.0)
    shake: float = 0.15

    def __post_init__(self) -> None:
        _check_range(self, "length_px", self.length_px, 0, 200)
        _check_number(self, "shake", self.shake, 0, 1)

    @property
    def margin_px(self) -> int:
        return int(self.length_px[1]) + 2

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        kernel = draw_motion_kernel(rng, length_px=rng.uniform(*self.length_px), shake=self.shake)
        return quantise(blur(clean, kernel))


@dataclass(frozen=True)
class SuperResolve(Task):
    """Upscaling by 2, 3 or 4 from MATLAB-like antialiased bicubic, saved with 8 bits."""

    name: ClassVar[str] = "sr"
    protocol_name: ClassVar[str] = "sr-y"
    degradation: ClassVar[str] = "low resolution by MATLAB-like bicubic"
    other_protocols: ClassVar[tuple[str, ...]] = ("sr-rgb",)
    upscale: int = 4

    def __post_init__(self) -> None:
        _check_scale(self, self.upscale)

    @property
    def scale(self) -> int:
        return self.upscale

    @property
    def margin_px(self) -> int:
        return 4 * self.upscale

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        height, width = clean.shape[0] // self.upscale, clean.shape[1] // self.upscale
        return quantise(resize_bicubic(clean, height=height, width=width))


@dataclass(frozen=True)
class SuperResolveJpeg(Task):
    """Compressed super-resolution: bicubic down by `upscale`, then JPEG of one quality (10, 20, 30, 40)."""

    name: ClassVar[str] = "csr"
    protocol_name: ClassVar[str] = "csr-y"
    degradation: ClassVar[str] = "low resolution by MATLAB-like bicubic, then JPEG"
    upscale: int = 4
    quality: int = 10

    def __post_init__(self) -> None:
        _check_scale(self, self.upscale)
        _check_quality(self, self.quality)

    @property
    def scale(self) -> int:
        return self.upscale

    @property
    def margin_px(self) -> int:
        return self.grid_px

    @property
    def grid_px(self) -> int:
        return _JPEG_GRID_PX * self.upscale

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        height, width = clean.shape[0] // self.upscale, clean.shape[1] // self.upscale
        return compress_jpeg(resize_bicubic(clean, height=height, width=width), self.quality)


@dataclass(frozen=True)
class Jpeg(Task):
    """JPEG artefacts on gray images of one quality, as DnCNN and SwinIR have them: gray is BT.601 studio luma, rounded.

    A colour image is reduced to that luma (MATLAB's rgb2ycbcr) before anything else, a gray one is taken as it is. With
    three channels the gray image is repeated: networks of one and of three channels get the same pixels.
    """

    name: ClassVar[str] = "jpeg"
    protocol_name: ClassVar[str] = "jpeg-y"
    degradation: ClassVar[str] = "JPEG"
    studio: ClassVar[bool] = True
    quality: int = 10

    def __post_init__(self) -> None:
        _check_quality(self, self.quality)

    @property
    def margin_px(self) -> int:
        return _JPEG_GRID_PX

    @property
    def grid_px(self) -> int:
        return _JPEG_GRID_PX

    def prepare(self, clean: FloatImage) -> FloatImage:
        if clean.shape[2] == 1 or (np.ptp(clean, axis=2) == 0).all():
            return clean
        return np.broadcast_to(studio_luma(clean), clean.shape)

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        return np.broadcast_to(compress_jpeg(clean[..., :1], self.quality), clean.shape)


@dataclass(frozen=True)
class Paired(Task):
    """Whatever lies between the images of `input/` and those of `target/`, `upscale` times larger.

    Nothing is degraded here; `protocol`, one of PROTOCOLS, says what figures mean.
    """

    name: ClassVar[str] = "paired"
    protocol_name: ClassVar[str] = "paired-rgb"
    degradation: ClassVar[str] = "nothing"
    needs_pairs: ClassVar[bool] = True
    upscale: int = 1
    protocol: str = protocol_name

    def __post_init__(self) -> None:
        if not isinstance(self.upscale, int) or not 1 <= self.upscale <= 8:
            raise ValueError(f"paired: upscale is a whole number from 1 to 8, got {self.upscale}")

    @property
    def scale(self) -> int:
        return self.upscale

    @property
    def protocols(self) -> tuple[str, ...]:
        return (self.protocol,)

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        raise ValueError("the task paired degrades nothing: it takes pairs, input/ and target/")


TASKS: dict[str, type[Task]] = {
    "denoise": Denoise,
    "derain": Derain,
    "deblur": Deblur,
    "sr": SuperResolve,
    "csr": SuperResolveJpeg,
    "jpeg": Jpeg,
    "paired": Paired,
}


def create_task(name: str, options: Mapping[str, object] | None = None) -> Task:
    """Task from its name and options: `create_task("denoise", {"sigma_255": 25})`.

    The name may carry its usual numbers: `sr_x4`, `csr_x4_q10`, `jpeg_q10`, `denoise_s25`, `paired_x2`. Ranges are two
    numbers. `my_degradation:degrade` is a function of a user's that was imported (`OwnTask`).
    Raises ValueError for an unknown name, an unknown option (naming the nearest) or a value out of range.
    """
    if is_own(name):
        return create_own_task(name, options or {})
    base, *suffixes = name.split("_")
    if base not in TASKS:
        hint = "".join(f" (did you mean {one}?)" for one in difflib.get_close_matches(base, TASKS, 1))
        raise ValueError(f"no task {name!r}{hint}; there are {', '.join(TASKS)} "
                         "(with numbers: sr_x4, csr_x4_q10, jpeg_q10, denoise_s25), and functions of your own, "
                         "my_degradation:degrade with --import my_degradation.py")
    known = {field.name for field in fields(TASKS[base])}
    merged: dict[str, object] = {**_suffix_options(name, suffixes, known), **(options or {})}
    for key in merged:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1, 0.0)
            raise ValueError(f"task {base} has no option {key!r}; the nearest is {near[0]!r} of {sorted(known)}")
    constructor: type = TASKS[base]
    return constructor(**{key: _as_value(base, key, value) for key, value in merged.items()})


_SUFFIXES = {"x": "upscale", "q": "quality", "s": "sigma_255"}


def _suffix_options(name: str, suffixes: list[str], known: set[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for suffix in suffixes:
        match = re.fullmatch(r"(?P<letter>[xqs])(?P<number>\d+)", suffix)
        if match is None or _SUFFIXES[match["letter"]] not in known:
            raise ValueError(f"task name {name!r} is not understood at {suffix!r}; write for instance sr_x4, "
                             "csr_x4_q10, jpeg_q10 or denoise_s25")
        options[_SUFFIXES[match["letter"]]] = int(match["number"])
    return options


def _as_value(task: str, key: str, value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, int | float) for part in value):
        return (float(value[0]), float(value[1]))
    if value is None or (key == "protocol" and isinstance(value, str)):
        return value
    raise ValueError(f"task {task}: {key} is a number or a range of two numbers, got {value!r}")


def _check_range(task: Task, key: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, tuple) or len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{task.name}: {key} is two numbers, low first, within {low} to {high}, got {value}")


def _check_number(task: Task, key: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{task.name}: {key} goes from {low} to {high}, got {value}")


def _check_scale(task: Task, upscale: object) -> None:
    if not isinstance(upscale, int) or upscale not in (2, 3, 4):
        raise ValueError(f"{task.name}: upscale is 2, 3 or 4, got {upscale}")


def _check_quality(task: Task, quality: object) -> None:
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"{task.name}: quality is a whole number from 1 to 100, got {quality}")
