"""What a picture is here: upright pixels, alpha and metadata; and how a file is named in messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8 | np.uint16]
FloatImage = NDArray[np.float32]


def show_name(path: str | Path) -> str:
    """A name to print: what a terminal would obey (escape sequences, line breaks, odd bytes) is spelt out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(path))


class ImageError(ValueError):
    """A file that cannot be read or written as an image; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{show_name(path)}: {reason}")
        self.path = Path(path)
        self.reason = reason


@dataclass(frozen=True)
class Metadata:
    """What a file says beside its pixels, b"" where it says nothing, and in words what of it was not kept.

    `exif` is a TIFF structure, `xmp` a packet; neither has an orientation: pixels are upright. `lost` has entries like
    "frames 2 to 5".
    """

    icc_profile: bytes = b""
    exif: bytes = b""
    xmp: bytes = b""
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Photo:
    """`pixels` (H, W, 1 or 3) uint8 or uint16, RGB; `alpha` (H, W) of the same type where the file has one."""

    pixels: Pixels
    alpha: Pixels | None = None
    metadata: Metadata = Metadata()
