"""Whether patches fit into the images of a folder, by their headers: known before anything is decoded or computed."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from ens.data.folders import DataError, find_pairs
from ens.data.images import ImageError
from ens.data.layouts import format_offenders


def check_patches_fit(folder: str | Path, side_px: int, *, scale: int = 1) -> None:
    """Check input patches of a side against a folder of training images.

    Raises as `find_pairs` does, ImageError for a file without an image's header, DataError naming the images that are
    too small.
    """
    pairs = find_pairs(folder, scale=scale)
    sizes = {pair.name: read_size(pair.clean) for pair in pairs}
    for degraded in (pair.degraded for pair in pairs if pair.degraded is not None):
        read_size(degraded)
    small = [f"{name} is {width}×{height}" for name, (height, width) in sizes.items()
             if min(height, width) // scale < side_px]
    if small:
        raise DataError(f"patches of {side_px * scale} px do not fit into {len(small)} images of {folder}"
                        f"{format_offenders(small)}")


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in px as stored, by the header alone; raises ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "is not an image, or is damaged"
        raise ImageError(path, str(reason)) from None
