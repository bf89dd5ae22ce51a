"""The verbs with which one starts on a network of one's own: `ens slots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ens.console import make_table, say, show
from ens.options import Import

if TYPE_CHECKING:
    from ens.networks.discover import Candidate

_SHOWN = 0.01
"""Share of the time from which on a submodule is listed."""


def slots(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help=(
        "my_network:build with --import, or my_network.py:build: a function that returns the module."))],
    size: Annotated[int, typer.Option(metavar="PX", min=16, help="Height of the image; half as wide again.")] = 128,
    every: Annotated[bool, typer.Option("--all", help="List every submodule that is called.")] = False,
    options: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
        "Option of the network, for instance dim=48; in_channels, output and extras say how it is called."))] = None,
    code: Import = None,
) -> None:
    """List which submodules of a network may be slots, what share of its cost each has, and propose a set as YAML.

    One image of noise is run through the network; time and multiply-adds of a submodule include what is inside it.
    """
    from ens.config import parse_changes
    from ens.networks import create_network
    from ens.networks.discover import discover_slots
    from ens.networks.own import build_module, is_own, name_code, split_options

    name, given = name_code(network), parse_changes(options or ())
    if not is_own(name):
        known = ", ".join(spec.name for spec in create_network(name, **given).slots)
        raise ValueError(f"{name} is a network of ens, whose slots are known: {known}")
    own, frame = split_options(name, given)
    call = {key: frame[key] for key in ("in_channels", "output", "extras") if key in frame}
    found = discover_slots(build_module(name, own), side_px=size, **call)
    listed = [one for one in found.candidates
              if every or one.name in found.slots or (one.time >= _SHOWN and not one.is_layer)]
    table = make_table(("submodule", "class", "sees", "slot"), ("calls", "parameters", "time %", "mult.-adds %"))
    for one in listed:
        verdict = "proposed" if one.name in found.slots else "may be" if one.is_fit else "no"
        table.add_row(one.name, one.kind, _describe(one), verdict, str(one.calls), f"{one.params:,}",
                      f"{100 * one.time:.1f}", f"{100 * one.macs:.1f}")
    show(table)
    for one in listed:
        if one.reason:
            say(f"No slot: {one.name} {one.reason}")
    say(f"The proposed slots take {100 * found.coverage:.0f} % of the time. In a study:\n")
    study: dict[str, Any] = {"name": name, **given, "slots": list(found.slots)}
    study |= {key: value for key, value in (("upscale", found.upscale), ("size_multiple", found.size_multiple))
              if value > 1 and key not in given}
    say(yaml.safe_dump({"network": study}, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None))


def _describe(one: Candidate) -> str:
    if not one.layout:
        return ""
    scale = f"/{one.downscale}" if one.downscale > 1 else ""
    return f"{one.layout} {one.channels}ch{scale}"
