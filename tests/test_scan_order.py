from __future__ import annotations

import pytest
import torch

from ens.ops.scan_order import FOUR_DIRECTIONS, cross_scale_order, invert_order, scan_order, window_order

SIZES = [(1, 1), (1, 5), (4, 1), (3, 7), (8, 8)]


@pytest.mark.parametrize("name", FOUR_DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_order_is_a_permutation_and_its_inverse_undoes_it(name: str, size: tuple[int, int]) -> None:
    order = scan_order(name, *size)
    pixels = torch.arange(size[0] * size[1])
    assert torch.equal(order.sort().values, pixels)
    assert torch.equal(pixels[order][invert_order(order)], pixels)


@pytest.mark.parametrize("order", [[0, 2], [0, -1], [1, 1], [0.0, 1.0], [False, True]])
def test_what_is_no_permutation_has_no_inverse(order: list[float]) -> None:
    with pytest.raises(ValueError, match="order"):
        invert_order(torch.tensor(order))


def test_column_order_reads_columns_of_a_non_square_image() -> None:
    assert scan_order("column", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_order("column_reversed", 2, 3).tolist() == [5, 2, 4, 1, 3, 0]


def test_bad_requests_name_what_is_allowed() -> None:
    with pytest.raises(KeyError, match="row, column"):
        scan_order("diagonal", 2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        scan_order("row", 0, 2)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (10, 12), (5, 9)])
@pytest.mark.parametrize("window", [2, 3, 8])
@pytest.mark.parametrize("vertical", [False, True])
def test_window_order_is_a_permutation(size: tuple[int, int], window: int, vertical: bool) -> None:
    order = window_order(*size, window, vertical=vertical)
    assert torch.equal(order[invert_order(order)], torch.arange(size[0] * size[1]))


def test_window_orders_are_the_published_ones() -> None:
    assert window_order(4, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order(4, 4, 2, vertical=True).tolist() == [0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15]
    assert torch.equal(window_order(4, 4, 4), scan_order("row", 4, 4))
    assert torch.equal(window_order(3, 5, 8, vertical=True), scan_order("column", 3, 5))
    assert window_order(4, 4, 3).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 3, 7, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(("vertical", "reverse", "text"), [
    (False, False, "a 0 1 4 5 b 2 3 6 7 c 8 9 12 13 d 10 11 14 15"),
    (False, True, "d 15 14 11 10 c 13 12 9 8 b 7 6 3 2 a 5 4 1 0"),
    (True, False, "a 0 4 1 5 c 8 12 9 13 b 2 6 3 7 d 10 14 11 15"),
    (True, True, "d 15 11 14 10 b 7 3 6 2 c 13 9 12 8 a 5 1 4 0")])
def test_cross_scale_orders_are_the_published_ones(vertical: bool, reverse: bool, text: str) -> None:
    order = cross_scale_order(4, 4, 4, vertical=vertical, reverse=reverse)
    assert " ".join("abcd"[pixel - 16] if pixel >= 16 else str(pixel) for pixel in order.tolist()) == text


def test_cross_scale_order_nests_windows() -> None:
    order = cross_scale_order(8, 8, 4).tolist()
    assert order[:25] == [64, 0, 1, 8, 9, 65, 2, 3, 10, 11, 68, 16, 17, 24, 25, 69, 18, 19, 26, 27, 66, 4, 5, 12, 13]


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_cross_scale_order_puts_each_small_pixel_before_its_four_when_not_square(vertical: bool, reverse: bool) -> None:
    height, width = 16, 48
    order = cross_scale_order(height, width, 16, vertical=vertical, reverse=reverse)
    assert torch.equal(order[invert_order(order)], torch.arange(5 * height * width // 4))
    groups = order.view(-1, 5)
    small = groups[:, 0] - height * width
    y, x = groups[:, 1:] // width, groups[:, 1:] % width
    assert torch.equal(y // 2 * (width // 2) + x // 2, small[:, None].expand(-1, 4))


def test_cross_scale_order_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of the window 16"):
        cross_scale_order(16, 24, 16)
