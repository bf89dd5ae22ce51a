"""PSNR and SSIM with explicit colour and border rule, in float64 on the 0 to 255 scale."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ens.evaluate.protocols import Protocol

FloatArray = NDArray[np.float64]

_STUDIO_LUMA = np.array([65.481, 128.553, 24.966]) / 255
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
SSIM_WINDOW_PX = 11


class Score(NamedTuple):
    """`psnr_db` is inf for equal images and NaN for an output with NaN; `ssim` is at most 1."""

    psnr_db: float
    ssim: float


def score(output: Tensor, target: Tensor, protocol: Protocol) -> Score:
    """Score one image (C, H, W) in [0, 1] by a protocol: quantise, cut the border, convert colour, PSNR and SSIM.

    Raises ValueError where the shapes differ or nothing is left inside the border.
    """
    left, right = _as_scored_pair(output, target, protocol)
    return Score(psnr_db(left, right), ssim(left, right))


def score_psnr_db(output: Tensor, target: Tensor, protocol: Protocol) -> float:
    """The PSNR of `score` alone, several times cheaper."""
    return psnr_db(*_as_scored_pair(output, target, protocol))


def score_input(degraded: Tensor, target: Tensor, protocol: Protocol) -> Score:
    """Score of doing nothing: `score` of the degraded image as the network gets it, neither clipped nor rounded.

    This is the figure papers quote (20.18 dB for noise of σ 25); clipped to 8 bits the same images have 20.54.
    """
    return score(degraded, target, replace(protocol, quantised=False))


def _as_scored_pair(output: Tensor, target: Tensor, protocol: Protocol) -> tuple[FloatArray, FloatArray]:
    if output.shape != target.shape or output.ndim != 3:
        raise ValueError(f"output and target are two images (C, H, W) of one shape, got {tuple(output.shape)} "
                         f"and {tuple(target.shape)}")
    return _as_scored(output, protocol), _as_scored(target, protocol)


def _as_scored(image: Tensor, protocol: Protocol) -> FloatArray:
    pixels = 255 * image.detach().cpu().double().numpy().transpose(1, 2, 0)
    if protocol.quantised:
        pixels = np.rint(np.clip(pixels, 0, 255))
    border = protocol.border_px
    height, width = pixels.shape[:2]
    if min(height, width) <= 2 * border:
        raise ValueError(f"protocol {protocol.name} cuts {border} px a side; nothing is left of {width}×{height}")
    return convert_colour(pixels[border:height - border, border:width - border], protocol.colour)


def convert_colour(image: FloatArray, colour: str) -> FloatArray:
    """(H, W, C) on 0 to 255 -> (H, W, 1 or C) by a rule.

    `rgb` keeps the channels; `y` is BT.601 luma in 16 to 235 as a float; `y_rounded` the same rounded, as MATLAB's
    rgb2ycbcr of uint8 gives it; `gray` is the mean channel, for gray images that a network returns three times.
    One channel is taken as luma already. Raises ValueError for another rule.
    """
    if colour not in ("rgb", "y", "y_rounded", "gray"):
        raise ValueError(f"no colour rule {colour!r}; there are rgb, y, y_rounded, gray")
    if colour == "rgb" or image.shape[2] == 1:
        return image
    if colour == "gray":
        return np.asarray(image.mean(axis=2, keepdims=True))
    luma: FloatArray = 16 + (image @ _STUDIO_LUMA)[..., None]
    return np.rint(luma) if colour == "y_rounded" else luma


def psnr_db(output: FloatArray, target: FloatArray) -> float:
    """Peak 255 over all pixels and channels; inf for equal images."""
    error = float(np.mean((output - target) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(output: FloatArray, target: FloatArray) -> float:
    """Wang et al. 2004: 11×11 Gaussian of σ 1.5, where the window fits whole, mean over channels; (H, W, C).

    NaN for images smaller than the window.
    """
    if min(output.shape[:2]) < SSIM_WINDOW_PX:
        return float("nan")
    return float(np.mean([_ssim_plane(np.ascontiguousarray(output[..., channel]),
                                      np.ascontiguousarray(target[..., channel]))
                          for channel in range(output.shape[2])]))


def _ssim_plane(x: FloatArray, y: FloatArray) -> float:
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x, variance_y = _window_mean(x * x) - mean_x**2, _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    contrast = (2 * covariance + _SSIM_C2) / (variance_x + variance_y + _SSIM_C2)
    return float(np.mean(luminance * contrast))


def _window_mean(plane: FloatArray) -> FloatArray:
    kernel = cv2.getGaussianKernel(SSIM_WINDOW_PX, 1.5)
    radius = SSIM_WINDOW_PX // 2
    return np.asarray(cv2.sepFilter2D(plane, -1, kernel, kernel), np.float64)[radius:-radius, radius:-radius]
