"""What every operator asks of the tensors it is given before it computes with them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_real(operator: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError for a tensor that does not hold real floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{operator} computes with real floating-point numbers, {name} is {tensor.dtype}")
