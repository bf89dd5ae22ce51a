"""What is known of the sides of a map while a graph is exported."""

from __future__ import annotations


def is_known(fits: bool) -> bool:
    """While a graph is exported, sides that are known to fit must not become padding by an expression in symbols."""
    if isinstance(fits, bool):
        return fits
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy, a third of a second

    return statically_known_true(fits)
