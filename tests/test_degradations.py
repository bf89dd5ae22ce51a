"""Degradations: statistics, seeds, and comparison with independent implementations."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from ens.data import degradations as d
from ens.data.images import FloatImage


def photo(height: int = 61, width: int = 47, channels: int = 3, seed: int = 0) -> FloatImage:
    noise = np.random.default_rng(seed).random((height, width, channels))
    smooth = scipy.ndimage.gaussian_filter(noise, (2, 2, 0))
    return ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)


def test_gaussian_noise_has_the_stated_sigma_and_is_not_clipped() -> None:
    black = np.zeros((200, 200, 3), np.float32)
    noisy = d.add_gaussian_noise(black, 25, np.random.default_rng(0))
    assert noisy.dtype == np.float32 and noisy.min() < -0.2
    assert noisy.std() == pytest.approx(25 / 255, rel=0.01) and abs(noisy.mean()) < 1e-3


def test_protocol_noise_is_the_published_recipe() -> None:
    clean = photo()
    np.random.seed(0)
    expected = clean.copy()
    expected += np.random.normal(0, 15 / 255.0, clean.shape)
    np.testing.assert_array_equal(d.add_protocol_noise(clean, 15), expected)
    np.testing.assert_array_equal(d.add_protocol_noise(clean, 15), expected)


def test_rain_only_adds_light_and_stays_in_range() -> None:
    clean = photo(100, 80)
    rainy = d.add_rain(clean, np.random.default_rng(1))
    assert (rainy >= clean).all() and rainy.max() <= 1 and (rainy > clean + 0.02).mean() > 0.01
    assert (d.add_rain(clean, np.random.default_rng(1), density=(0, 0)) == clean).all()


@pytest.mark.parametrize("angle_deg", [-30, 0, 20])
def test_streaks_lie_along_the_stated_angle(angle_deg: float) -> None:
    rain = d.render_streaks(200, 200, np.random.default_rng(2), angle_deg=angle_deg, length_px=40, density=0.003)
    # Smoothed, because gradients of lines one pixel wide prefer the axes and diagonals.
    down, right = np.gradient(scipy.ndimage.gaussian_filter(rain.astype(np.float64), 2))
    # The gradient is across the streak; the structure tensor's weak axis lies along it.
    across = 0.5 * np.arctan2(2 * (down * right).sum(), (right**2 - down**2).sum())
    assert np.rad2deg(-across) == pytest.approx(angle_deg, abs=3)


def test_more_density_and_length_cover_more() -> None:
    def cover(density: float, length_px: float) -> float:
        rain = d.render_streaks(200, 200, np.random.default_rng(3), angle_deg=5, length_px=length_px, density=density)
        return float((rain > 0.1).mean())
    assert cover(0.001, 20) < cover(0.003, 20) < cover(0.003, 40) < 0.9


@pytest.mark.parametrize("seed", range(8))
def test_motion_kernel_is_a_centred_weighting(seed: int) -> None:
    kernel = d.draw_motion_kernel(np.random.default_rng(seed), length_px=20)
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1 and (kernel >= 0).all()
    assert kernel.sum() == pytest.approx(1, abs=1e-5) and 3 < (kernel > 0).sum() < 120
    centre = scipy.ndimage.center_of_mass(kernel)
    np.testing.assert_allclose(centre, kernel.shape[0] // 2, atol=1e-3)  # sub-pixel: exact, not to the nearest pixel
    rows, columns = np.nonzero(kernel)
    assert np.hypot(np.ptp(rows), np.ptp(columns)) <= 20 + 3


def test_shake_bends_the_path() -> None:
    def thickness(shake: float) -> float:
        total = 0.0
        for seed in range(10):
            kernel = d.draw_motion_kernel(np.random.default_rng(seed), length_px=20, shake=shake)
            rows, columns = np.nonzero(kernel)
            cov = np.cov(np.stack([rows, columns]), aweights=kernel[rows, columns])
            total += float(np.linalg.eigvalsh(cov)[0])
        return total
    assert thickness(0.0) < 5 < thickness(0.15)


def test_blur_is_a_convolution_with_mirrored_border() -> None:
    clean = photo()
    kernel = d.draw_motion_kernel(np.random.default_rng(4), length_px=9)
    expected = np.stack([scipy.ndimage.convolve(clean[..., c].astype(np.float64), kernel.astype(np.float64),
                                                mode="mirror") for c in range(3)], axis=2)
    np.testing.assert_allclose(d.blur(clean, kernel), expected, atol=1e-5)


def slow_matlab_resize(line: list[float], size_out: int) -> list[float]:
    """MATLAB's imresize of one line, sample by sample, from its documentation."""
    size_in, scale = len(line), size_out / len(line)
    shrink = min(scale, 1.0)

    def cubic(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    result = []
    for position in range(1, size_out + 1):
        centre = position / scale + 0.5 * (1 - 1 / scale)
        total = weight_sum = 0.0
        for tap in range(int(centre - 4 / shrink) - 3, int(centre + 4 / shrink) + 4):
            weight = shrink * cubic(shrink * (centre - tap))
            folded = (tap - 1) % (2 * size_in)
            total += weight * line[folded if folded < size_in else 2 * size_in - 1 - folded]
            weight_sum += weight
        result.append(total / weight_sum)
    return result


@pytest.mark.parametrize("sizes", [(24, 6), (24, 8), (24, 12), (6, 24), (7, 21), (31, 10), (5, 2)])
def test_bicubic_equals_matlabs_algorithm_borders_included(sizes: tuple[int, int]) -> None:
    line = np.random.default_rng(5).random(sizes[0]).astype(np.float32)
    expected = slow_matlab_resize([float(value) for value in line], sizes[1])
    image = np.tile(line[None, :, None], (4, 1, 1))
    np.testing.assert_allclose(d.resize_bicubic(image, height=4, width=sizes[1])[2, :, 0], expected, atol=1e-6)
    turned = image.transpose(1, 0, 2)
    np.testing.assert_allclose(d.resize_bicubic(turned, height=sizes[1], width=4)[:, 1, 0], expected, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_equals_pillow_away_from_the_border(scale: int) -> None:
    plane = photo(72, 96, 1)
    small = (96 // scale, 72 // scale)
    pillow = np.asarray(Image.fromarray(plane[..., 0]).resize(small, Image.Resampling.BICUBIC))
    ours = d.resize_bicubic(plane, height=small[1], width=small[0])[..., 0]
    np.testing.assert_allclose(ours[3:-3, 3:-3], pillow[3:-3, 3:-3], atol=1e-5)


def test_bicubic_keeps_constants_and_known_values() -> None:
    flat = np.full((9, 12, 3), 0.3, np.float32)
    np.testing.assert_allclose(d.resize_bicubic(flat, height=3, width=4), 0.3, atol=1e-6)
    # By hand: halving an impulse far from the border spreads the kernel sampled at odd quarters, times one half.
    impulse = np.zeros((1, 16, 1), np.float32)
    impulse[0, 7] = 1
    weights = d.resize_bicubic(impulse, height=1, width=8)[0, :, 0]
    np.testing.assert_allclose(weights[1:7], [0, -0.03515625, 0.43359375, 0.11328125, -0.01171875, 0], atol=1e-6)


@pytest.mark.parametrize(("quality", "channels"), [(10, 3), (40, 3), (10, 1), (90, 1)])
def test_jpeg_is_what_another_encoder_makes(quality: int, channels: int) -> None:
    image = photo(48, 64, channels)
    pixels = np.rint(image * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(buffer, "JPEG", quality=quality, subsampling=2)
    expected = np.atleast_3d(np.asarray(Image.open(buffer)))
    ours = np.rint(d.compress_jpeg(image, quality) * 255)
    assert ours.shape == expected.shape and np.abs(ours - expected).max() <= 3
    assert np.abs(ours - expected).mean() < 0.2


def test_jpeg_quality_is_checked_and_monotonic() -> None:
    image = photo(64, 64)
    errors = [float(np.mean((d.compress_jpeg(image, quality) - image) ** 2)) for quality in (10, 30, 80)]
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match="1 to 100, got 0"):
        d.compress_jpeg(image, 0)


def test_same_generator_state_same_pixels() -> None:
    clean = photo()
    for degrade in (lambda rng: d.add_gaussian_noise(clean, 30, rng), lambda rng: d.add_rain(clean, rng),
                    lambda rng: d.draw_motion_kernel(rng, length_px=15)):
        first, again, other = (degrade(np.random.default_rng(seed)) for seed in (7, 7, 8))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
