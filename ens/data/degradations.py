"""Degradations: clean image in, degraded out, generator passed in. Images are float32 (H, W, C) RGB in [0, 1]."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from ens.data.images import FloatImage, to_float, to_pixels

Range = tuple[float, float]


def add_gaussian_noise(clean: FloatImage, sigma_255: float, rng: np.random.Generator) -> FloatImage:
    """White Gaussian noise of standard deviation σ/255, not clipped: clipping would bias dark and bright areas."""
    return clean + rng.standard_normal(clean.shape, dtype=np.float32) * np.float32(sigma_255 / 255)


def add_protocol_noise(clean: FloatImage, sigma_255: float) -> FloatImage:
    """Noise of protocol `denoise-color-awgn`: NumPy's legacy generator seeded 0, float64 normal on the H×W×3 image.

    The same seed for every image is what published figures use; neither clipped nor rounded.
    """
    noise = np.random.RandomState(0).normal(0, sigma_255 / 255.0, clean.shape)
    return (clean.astype(np.float64) + noise).astype(np.float32)


def add_rain(clean: FloatImage, rng: np.random.Generator, *, angle_deg: Range = (-25, 25),
             length_px: Range = (12, 50), density: Range = (0.0005, 0.008),
             brightness: Range = (0.3, 0.7)) -> FloatImage:
    """Rain streaks, one direction and strength an image, drawn from the ranges; result in [0, 1].

    `angle_deg` is measured from the vertical, `density` is streaks per pixel. Streaks are light added to the scene as
    a screen (1 − (1 − clean)(1 − rain)), which keeps highlights below 1 where plain addition clips.
    """
    angle, length = rng.uniform(*angle_deg), rng.uniform(*length_px)
    rain = render_streaks(clean.shape[0], clean.shape[1], rng, angle_deg=angle, length_px=length,
                          density=rng.uniform(*density)) * np.float32(rng.uniform(*brightness))
    return clean + (1 - clean) * rain[..., None]


def render_streaks(height: int, width: int, rng: np.random.Generator, *, angle_deg: float, length_px: float,
                   density: float) -> FloatImage:
    """Map (height, width) in [0, 1] of streaks at three distances: far ones are shorter, thinner and fainter."""
    margin = int(np.ceil(length_px))
    shape = (height + 2 * margin, width + 2 * margin)
    dark = np.ones(shape, np.float32)
    for nearness in (0.4, 0.7, 1.0):
        drops = (rng.random(shape, dtype=np.float32) < density / 3).astype(np.float32)
        drops *= rng.uniform(0.4, 1.0, shape).astype(np.float32)
        kernel = streak_kernel(length_px * nearness * rng.uniform(0.9, 1.0), angle_deg + rng.uniform(-2, 2),
                               thickness_px=0.4 + 0.5 * nearness)
        streaks = cv2.filter2D(drops, -1, kernel, borderType=cv2.BORDER_CONSTANT)
        dark *= 1 - np.clip(streaks, 0, 1) * np.float32(0.4 + 0.6 * nearness)
    return np.asarray(1 - dark[margin:margin + height, margin:margin + width], np.float32)


def streak_kernel(length_px: float, angle_deg: float, *, thickness_px: float) -> FloatImage:
    """Soft line with tapered ends, peak 1, at `angle_deg` from the vertical; odd square, sub-pixel direction."""
    radius = int(np.ceil(length_px / 2 + 2 * thickness_px))
    rows, columns = np.mgrid[-radius:radius + 1, -radius:radius + 1]
    angle = np.deg2rad(angle_deg)
    along = rows * np.cos(angle) + columns * np.sin(angle)
    across = columns * np.cos(angle) - rows * np.sin(angle)
    taper = np.clip(1 - (2 * np.abs(along) / length_px) ** 4, 0, 1)
    return np.asarray(taper * np.exp(-0.5 * (across / (thickness_px * 0.6)) ** 2), np.float32)


def draw_motion_kernel(rng: np.random.Generator, *, length_px: float, shake: float = 0.15) -> FloatImage:
    """Blur kernel (odd square, sums to 1, centred) of a camera path about `length_px` long.

    The path is a damped random walk of the velocity (inertia, hand tremor, now and then a jerk) in the spirit of
    Boracchi and Foi 2012, splatted with bilinear weights so that it is sub-pixel. `shake` 0 is a straight line.
    """
    steps = 8 * max(4, int(np.ceil(length_px)))
    heading, turn = rng.uniform(0, 2 * np.pi), 0.0
    speed = np.empty(steps)
    headings = np.empty(steps)
    for step in range(steps):
        turn = 0.97 * turn + shake * rng.normal() * 0.25
        if rng.random() < shake * 0.05:
            turn += rng.normal() * 2.0
        heading += turn * 0.5
        headings[step] = heading
        speed[step] = 1 + 0.5 * np.sin(2 * np.pi * step / steps + headings[0])
    path = np.cumsum(speed[:, None] * np.stack([np.sin(headings), np.cos(headings)], axis=1), axis=0)
    path *= length_px / speed.sum()
    return _splat(path - path.mean(axis=0))


def _splat(path: NDArray[np.float64]) -> FloatImage:
    radius = int(np.ceil(np.abs(path).max())) + 1
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    corner = np.floor(path).astype(int)
    fraction = path - corner
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - fraction[:, 0]) * np.abs(1 - right - fraction[:, 1])
            np.add.at(kernel, (corner[:, 0] + down + radius, corner[:, 1] + right + radius), weight)
    return np.asarray(kernel / kernel.sum(), np.float32)


def blur(clean: FloatImage, kernel: FloatImage) -> FloatImage:
    """Convolve every channel with a kernel that sums to 1; the border is mirrored. Range kept."""
    flipped = np.ascontiguousarray(kernel[::-1, ::-1])
    blurred = cv2.filter2D(clean, -1, flipped, borderType=cv2.BORDER_REFLECT_101)
    return np.clip(blurred.reshape(clean.shape), 0, 1)


def resize_bicubic(image: FloatImage, *, height: int, width: int) -> FloatImage:
    """MATLAB's `imresize(…, 'bicubic')`: a = −0.5, antialiased when shrinking, symmetric border; not clipped."""
    rows, columns = _resize_matrix(image.shape[0], height), _resize_matrix(image.shape[1], width)
    resized = rows @ image.reshape(image.shape[0], -1).astype(np.float64)
    # matmul broadcasts over the rows: (width, W) @ (height, W, C).
    return np.asarray(columns @ resized.reshape(height, *image.shape[1:]), np.float32)


@lru_cache(maxsize=64)
def _resize_matrix(size_in: int, size_out: int) -> NDArray[np.float64]:
    scale = size_out / size_in
    stretch = min(scale, 1.0)
    support = 4 / stretch
    centre = (np.arange(size_out) + 0.5) / scale - 0.5
    taps = np.floor(centre - support / 2)[:, None] + np.arange(int(np.ceil(support)) + 2)[None]
    weights = stretch * _cubic(stretch * (centre[:, None] - taps))
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = np.mod(taps.astype(int), 2 * size_in)
    mirrored = np.where(mirrored < size_in, mirrored, 2 * size_in - 1 - mirrored)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out)[:, None], mirrored), weights)
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys 1981, equation 4, a = −0.5."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0.0))


def compress_jpeg(image: FloatImage, quality: int) -> FloatImage:
    """JPEG round trip as the papers make it (OpenCV, 4:2:0); one channel is compressed as gray. `quality` 1 to 100."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality goes from 1 to 100, got {quality}")
    pixels = np.ascontiguousarray(to_pixels(image)[..., ::-1])
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    flag = cv2.IMREAD_GRAYSCALE if pixels.shape[2] == 1 else cv2.IMREAD_COLOR
    decoded = np.asarray(cv2.imdecode(data, flag), np.uint8).reshape(pixels.shape)
    return to_float(np.ascontiguousarray(decoded[..., ::-1]))


def quantise(image: FloatImage) -> FloatImage:
    """Clip and round to 8 bits, as an image saved to disk and read back."""
    return to_float(to_pixels(image))
