"""Colours of families and depths: Okabe and Ito's set, which colour-blind readers tell apart."""

from __future__ import annotations

from ens.space import Choice, SearchSpace

TEACHER = "#0072B2"
_FAMILIES = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
_IDENTITY = "#C9CED6"


def choice_colours(space: SearchSpace) -> list[list[str]]:
    """Colour of every choice of every slot, `#RRGGBB`: hue says the family, a lighter tint fewer blocks."""
    families = sorted({choice.family for slot in space.slots for choice in slot.choices[1:]} - {"identity"})
    hues = {family: _FAMILIES[index % len(_FAMILIES)] for index, family in enumerate(families)}
    return [[_colour(choice, hues, deepest=max(choice.depth for choice in slot.choices)) for choice in slot.choices]
            for slot in space.slots]


def text_colour(background: str) -> str:
    """Near-black or white, whichever contrasts more with `#RRGGBB`."""
    red, green, blue = (_linear(int(background[start:start + 2], 16) / 255) for start in (1, 3, 5))
    return "#1b2430" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.22 else "#ffffff"


def _colour(choice: Choice, hues: dict[str, str], *, deepest: int) -> str:
    if choice.teacher:
        return TEACHER
    if choice.family == "identity":
        return _IDENTITY
    strength = 0.4 + 0.6 * choice.depth / deepest
    channels = (int(hues[choice.family][start:start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - channel)):02X}" for channel in channels)


def _linear(channel: float) -> float:
    """sRGB 0..1 to linear light (IEC 61966-2-1)."""
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
