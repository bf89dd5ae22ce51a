"""What a number means: the colour, border and rounding rules behind a PSNR. A task names its protocols."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ens.data.tasks import Task
from ens.space import suggest


@dataclass(frozen=True)
class Protocol:
    """How an output is scored: `colour` is a rule of `convert_colour`, `border_px` is cut from each side first,
    `quantised` says whether output and target are clipped and rounded to uint8 before anything else.
    """

    name: str
    colour: str
    border_px: int = 0
    quantised: bool = True


PROTOCOLS = {protocol.name: protocol for protocol in (
    Protocol("denoise-color-awgn", "rgb"),
    Protocol("denoise-sidd", "rgb", quantised=False),
    Protocol("derain-y", "y_rounded"),
    Protocol("deblur-rgb", "rgb"),
    Protocol("sr-y", "y"),
    Protocol("sr-rgb", "rgb", border_px=4),  # NTIRE efficient super-resolution
    Protocol("csr-y", "y", border_px=4),
    Protocol("jpeg-y", "gray"),
    Protocol("paired-rgb", "rgb"),
    Protocol("paired-y", "y"),
)}


def find_protocol(name: str, *, scale: int = 1) -> Protocol:
    """The protocol of that name; `sr-y` cuts `scale` pixels from each side. Raises ValueError naming the right ones."""
    if name not in PROTOCOLS:
        raise ValueError(f"no protocol {name!r}{suggest(name, PROTOCOLS)}; there are {', '.join(PROTOCOLS)}")
    return replace(PROTOCOLS[name], border_px=scale) if name == "sr-y" else PROTOCOLS[name]


def task_protocols(task: Task) -> list[Protocol]:
    """Every protocol that people quote for a task, its own first."""
    return [find_protocol(name, scale=task.scale) for name in task.protocols]
