"""Effective receptive field: modules whose field is known, and the picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ens.blocks import create_stack
from ens.evaluate.receptive_field import draw_receptive_fields, energy_side_px, measure_receptive_field


class Update(nn.Module):
    """input + kernel * input, depth-wise: the Jacobian of the update is the kernel at every position."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel[None, None].expand(x.shape[1], 1, -1, -1)
        return x + nn.functional.conv2d(x, weight, padding=self.kernel.shape[-1] // 2, groups=x.shape[1])


def test_map_of_a_convolution_is_its_kernel() -> None:
    kernel = torch.arange(1.0, 26.0).view(5, 5)
    energy = measure_receptive_field(Update(kernel), [torch.rand(1, 3, 15, 17), torch.rand(1, 3, 21, 19)])
    assert energy.shape == (15, 17) and energy.sum() == pytest.approx(1)
    # The centre reads its neighbour at offset k through kernel entry k.
    np.testing.assert_allclose(energy[5:10, 6:11], (kernel / kernel.sum()).numpy(), rtol=1e-5)


@pytest.mark.parametrize(("size", "side"), [(1, 1), (3, 3), (7, 7)])
def test_side_that_holds_nearly_everything_is_that_of_the_kernel(size: int, side: int) -> None:
    energy = measure_receptive_field(Update(torch.ones(size, size)), [torch.rand(1, 2, 16, 16)])
    assert energy_side_px(energy, 0.99) == side


def test_side_grows_with_the_share_it_holds() -> None:
    energy = np.zeros((9, 9))
    energy[4, 4], energy[2, 4], energy[4, 8] = 0.5, 0.4, 0.1
    assert [energy_side_px(energy, share) for share in (0.4, 0.5, 0.6, 0.9, 0.95)] == [1, 1, 5, 5, 9]


def test_an_attention_over_channels_sees_the_whole_image_and_a_conv_block_its_neighbourhood() -> None:
    torch.manual_seed(0)
    features = [torch.rand(1, 8, 24, 24)]
    wide, narrow = (measure_receptive_field(create_stack(family, 8, 1, heads=1, options=options).eval(), features)
                    for family, options in (("vssd", {"state": 4}), ("plk", {"kernel_size": 5, "use_ea": False})))
    assert (wide > 0).all()
    assert energy_side_px(narrow, 1.0) < 24


def test_a_module_that_passes_no_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="no receptive field"):
        measure_receptive_field(nn.Identity(), [torch.rand(1, 2, 8, 8)])


def test_picture_has_a_panel_for_every_map() -> None:
    energy = measure_receptive_field(Update(torch.ones(3, 3)), [torch.rand(1, 2, 16, 16)])
    small, large = (cv2.imdecode(np.frombuffer(draw_receptive_fields("title", rows), np.uint8), cv2.IMREAD_COLOR)
                    for rows in ({"a": {"teacher": energy}},
                                 {"a": {"teacher": energy}, "b": {"before": energy, "distilled": energy}}))
    assert small is not None and large is not None
    assert large.shape[0] > small.shape[0] and large.shape[1] > small.shape[1]
