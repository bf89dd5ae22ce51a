"""PSNR, SSIM, colour and border rules against scikit-image and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from ens.evaluate.metrics import convert_colour, psnr_db, score, score_input, ssim
from ens.evaluate.protocols import PROTOCOLS, find_protocol


def pair(height: int = 40, width: int = 33, channels: int = 3) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    target = rng.random((channels, height // 4 + 1, width // 4 + 1)).repeat(4, 1).repeat(4, 2)[:, :height, :width]
    return torch.from_numpy(target + rng.normal(0, 0.08, target.shape)).float(), torch.from_numpy(target).float()


def as_uint8(image: Tensor) -> np.ndarray:
    return np.rint(image.clamp(0, 1).double().numpy().transpose(1, 2, 0) * 255).astype(np.uint8)


def skimage_ssim(output: np.ndarray, target: np.ndarray) -> float:
    _, full = structural_similarity(output, target, data_range=255, gaussian_weights=True, sigma=1.5,
                                    use_sample_covariance=False, channel_axis=2, full=True)
    return float(full[5:-5, 5:-5].mean())


def test_rgb_protocol_equals_scikit_image_on_uint8() -> None:
    output, target = pair()
    result = score(output, target, PROTOCOLS["denoise-color-awgn"])
    out8, target8 = as_uint8(output), as_uint8(target)
    assert result.psnr_db == pytest.approx(peak_signal_noise_ratio(target8, out8, data_range=255), abs=1e-9)
    assert result.ssim == pytest.approx(skimage_ssim(out8.astype(np.float64), target8.astype(np.float64)), abs=1e-7)


def test_default_scikit_image_ssim_agrees_where_it_crops_as_we_do() -> None:
    output, target = (as_uint8(image).astype(np.float64) for image in pair())
    ours = np.mean([ssim(output[..., c:c + 1], target[..., c:c + 1]) for c in range(3)])
    theirs = structural_similarity(output, target, data_range=255, gaussian_weights=True, sigma=1.5,
                                   use_sample_covariance=False, channel_axis=2)
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(("name", "rounded", "border"), [
    ("derain-y", True, 0), ("sr-y", False, 3), ("csr-y", False, 4),
])
def test_luma_protocols_equal_scikit_images_ycbcr(name: str, rounded: bool, border: int) -> None:
    output, target = pair()
    planes = []
    for image in (output, target):
        luma = rgb2ycbcr(as_uint8(image))[..., :1]
        luma = luma[border:luma.shape[0] - border, border:luma.shape[1] - border]
        planes.append(np.round(luma) if rounded else luma)
    result = score(output, target, find_protocol(name, scale=3))
    assert result.psnr_db == pytest.approx(10 * math.log10(255**2 / np.mean((planes[0] - planes[1]) ** 2)), abs=1e-6)
    assert result.ssim == pytest.approx(skimage_ssim(*planes), abs=1e-6)


def test_protocols_differ_by_what_they_say() -> None:
    output, target = pair()
    figures = {name: score(output, target, protocol).psnr_db for name, protocol in PROTOCOLS.items()}
    assert figures["denoise-color-awgn"] == figures["deblur-rgb"] == figures["paired-rgb"]
    assert figures["sr-y"] == figures["paired-y"]
    assert len({round(value, 6) for value in figures.values()}) == len(figures) - 3
    assert figures["derain-y"] > figures["deblur-rgb"] + 1


def test_quantisation_happens_only_where_the_protocol_says() -> None:
    target = torch.full((3, 16, 16), 0.5)
    output = target + 0.4 / 255 + (128 / 255 - 0.5)
    assert math.isinf(score(output, target + (128 / 255 - 0.5), PROTOCOLS["denoise-color-awgn"]).psnr_db)
    unrounded = score(output, target + (128 / 255 - 0.5), PROTOCOLS["denoise-sidd"]).psnr_db
    assert unrounded == pytest.approx(20 * math.log10(255 / 0.4), abs=1e-3)


def test_border_pixels_do_not_count() -> None:
    output, target = pair()
    spoiled = output.clone()
    spoiled[:, :4] = 9
    spoiled[:, :, -4:] = -9
    assert score(spoiled, target, PROTOCOLS["csr-y"]) == score(output, target, PROTOCOLS["csr-y"])
    assert score(spoiled, target, PROTOCOLS["deblur-rgb"]) != score(output, target, PROTOCOLS["deblur-rgb"])


def test_gray_scores_as_its_repetition() -> None:
    output, target = pair(channels=1)
    repeated = score(output.expand(3, -1, -1), target.expand(3, -1, -1), PROTOCOLS["jpeg-y"])
    assert repeated == pytest.approx(score(output, target, PROTOCOLS["jpeg-y"]), abs=1e-9)


def test_psnr_by_hand() -> None:
    zeros = np.zeros((2, 2, 1))
    assert psnr_db(zeros, zeros + 255) == pytest.approx(0)
    assert psnr_db(zeros, zeros + 25.5) == pytest.approx(20)
    assert math.isinf(psnr_db(zeros, zeros)) and ssim(np.ones((12, 12, 1)), np.ones((12, 12, 1))) == pytest.approx(1)


def test_an_output_with_nan_scores_nan() -> None:
    output, target = pair()
    output[0, 3, 3] = float("nan")
    result = score(output, target, PROTOCOLS["denoise-color-awgn"])
    assert math.isnan(result.psnr_db) and math.isnan(result.ssim)


def test_the_input_is_scored_before_any_clipping() -> None:
    black = torch.zeros(3, 16, 16)
    result = score_input(black - 0.1, black, PROTOCOLS["denoise-color-awgn"])
    assert result.psnr_db == pytest.approx(20, abs=1e-4)


def test_bad_arguments_are_named() -> None:
    output, target = pair()
    with pytest.raises(ValueError, match="one shape"):
        score(output[:, 1:], target, PROTOCOLS["sr-y"])
    with pytest.raises(ValueError, match="nothing is left of 8×8"):
        score(output[:, :8, :8], target[:, :8, :8], PROTOCOLS["csr-y"])
    with pytest.raises(ValueError, match="rgb, y, y_rounded, gray"):
        convert_colour(np.zeros((2, 2, 3)), "lab")
    with pytest.raises(ValueError, match="denoise-color-awgn, denoise-sidd, derain-y"):
        find_protocol("psnr")
