from __future__ import annotations

import pytest
import torch

from ens.ops.scan_order import FOUR_DIRECTIONS, invert_order, scan_order

SIZES = [(1, 1), (1, 5), (4, 1), (3, 7), (8, 8)]


@pytest.mark.parametrize("name", FOUR_DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_order_is_a_permutation_and_its_inverse_undoes_it(name: str, size: tuple[int, int]) -> None:
    order = scan_order(name, *size)
    pixels = torch.arange(size[0] * size[1])
    assert torch.equal(order.sort().values, pixels)
    assert torch.equal(pixels[order][invert_order(order)], pixels)


def test_column_order_reads_columns_of_a_non_square_image() -> None:
    assert scan_order("column", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_order("column_reversed", 2, 3).tolist() == [5, 2, 4, 1, 3, 0]


def test_bad_requests_name_what_is_allowed() -> None:
    with pytest.raises(KeyError, match="row, column"):
        scan_order("diagonal", 2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        scan_order("row", 0, 2)
