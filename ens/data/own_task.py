"""Degradations that users bring: functions of code that they pass with `--import`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from ens.data.images import FloatImage
from ens.data.task import Task
from ens.own_code import OwnCodeError, call_function, find_function


@dataclass(frozen=True)
class OwnTask(Task):
    """A degradation of a user's, a function that was passed with `--import`: `degrade(clean, rng, **options)`.

    It gets a float32 array (H, W, C) in [0, 1] and a `numpy.random.Generator`, from which everything random comes, and
    returns the degraded one, (H / upscale, W / upscale, C). A patch is degraded with `margin_px` clean pixels around
    it; `protocol`, one of PROTOCOLS, says what figures mean.
    """

    name: ClassVar[str] = "own"
    degradation: ClassVar[str] = "a function of the user's"
    seeding: ClassVar[str] = "seeded by content"
    function: str
    options: tuple[tuple[str, object], ...] = ()
    upscale: int = 1
    margin_px: int = 16
    protocol: str = "paired-rgb"

    @property
    def scale(self) -> int:
        return self.upscale

    @property
    def protocols(self) -> tuple[str, ...]:
        return (self.protocol,)

    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        height, width, channels = clean.shape
        wanted = (height // self.upscale, width // self.upscale, channels)
        given = clean.copy()  # what the function writes into is not the target
        degraded = call_function(self.function, given, rng, role="task", **dict(self.options))
        if not isinstance(degraded, np.ndarray) or degraded.shape != wanted or degraded.dtype.kind != "f":
            got = f"{degraded.dtype} {degraded.shape}" if isinstance(degraded, np.ndarray) else type(degraded).__name__
            raise OwnCodeError(f"task {self.function} returned {got} for an image {clean.shape}; it must return floats "
                               f"of shape {wanted}")
        if not np.isfinite(degraded).all():
            raise OwnCodeError(f"task {self.function} returned values that are not finite")
        return degraded.astype(np.float32)


def create_own_task(name: str, options: Mapping[str, object]) -> OwnTask:
    """A user's degradation; what both the task and the function know of goes to both.

    Raises OwnCodeError or ValueError for what was not imported and for options that do not fit.
    """
    parameters = inspect.signature(find_function(name, "task")).parameters
    frame = {field.name for field in fields(OwnTask)} - {"function", "options"}
    defaults = {key: parameter.default for key, parameter in parameters.items()
                if key in frame and parameter.default is not parameter.empty}
    own = {key: value for key, value in options.items() if key not in frame or key in parameters}
    try:
        inspect.signature(find_function(name, "task")).bind(None, None, **own)
    except TypeError as error:
        raise OwnCodeError(f"task {name} does not take these options ({error}); it takes "
                           f"{', '.join(parameters) or 'none'}") from None
    given: dict[str, Any] = {**defaults, **{key: value for key, value in options.items() if key in frame}}
    for key, low, high in (("upscale", 1, 8), ("margin_px", 0, 512)):
        if key in given and (type(given[key]) is not int or not low <= given[key] <= high):
            raise ValueError(f"task {name}: {key} is a whole number from {low} to {high}, got {given[key]!r}")
    return OwnTask(name, tuple(sorted(own.items())), **given)
