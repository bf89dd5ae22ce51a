"""What every task is: a degradation with its parameters, and the names of the evaluation protocols that go with it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ens.data.images import FloatImage

VALIDATION_SEED = 2026


@dataclass(frozen=True)
class Task(ABC):
    """What every task offers. Images are float32 (H, W, C) in [0, 1]; noise alone may leave that range.

    A patch degraded inside a window of `margin_px` clean pixels around it, the window starting at a multiple of
    `grid_px`, equals the same patch of the degraded whole image when the degradation is not random.
    """

    name: ClassVar[str]
    protocol_name: ClassVar[str]
    degradation: ClassVar[str]
    """What makes degraded images, in a few words."""
    other_protocols: ClassVar[tuple[str, ...]] = ()
    studio: ClassVar[bool] = False
    """Whether one channel means studio luma, as the protocol has it, instead of full-range gray."""
    seeding: ClassVar[str] = ""
    """What seeds the degradation of validation images, for their fingerprint; "" where nothing is drawn."""
    needs_pairs: ClassVar[bool] = False
    """Whether degraded images are never made here: folders hold them."""

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of the protocols that people quote, the task's own first."""
        return (self.protocol_name, *self.other_protocols)

    @property
    def scale(self) -> int:
        """Output height over input height."""
        return 1

    @property
    def margin_px(self) -> int:
        return 0

    @property
    def grid_px(self) -> int:
        return self.scale

    def prepare(self, clean: FloatImage) -> FloatImage:
        """The target: `clean` cropped to a multiple of the scale (and reduced to luma where the protocol is gray)."""
        height, width = clean.shape[0] // self.scale * self.scale, clean.shape[1] // self.scale * self.scale
        return clean[:height, :width]

    @abstractmethod
    def degrade(self, clean: FloatImage, rng: np.random.Generator) -> FloatImage:
        """Degrade a prepared image for training; everything random comes from `rng`."""

    def degrade_for_validation(self, clean: FloatImage) -> FloatImage:
        """Degrade a prepared image as the protocol says, or seeded by its pixels where it says nothing.

        Neither the name nor the place of a file in its folder changes anything.
        """
        content = hashlib.sha256(np.ascontiguousarray(clean).tobytes()).digest()
        return self.degrade(clean, np.random.default_rng((VALIDATION_SEED, int.from_bytes(content[:16], "big"))))
