"""The verbs with which one starts on a network of one's own: `ens slots` and `ens init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ens.console import make_table, reporting, say, show
from ens.options import Import, Task, Teacher, bound_changes, spell

if TYPE_CHECKING:
    from ens.networks.discover import Candidate, Discovery

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
    found, study = _discover(_name_network(network, options), size)
    listed = [one for one in found.candidates
              if every or one.name in found.slots or (one.time >= _SHOWN and not one.is_layer)]
    table = make_table(("submodule", "class", "sees", "slot"), ("calls", "params", "time %", "MACs %"))
    for one in listed:
        verdict = "proposed" if one.name in found.slots else "may be" if one.is_fit else "no"
        table.add_row(one.name, one.kind, _describe(one), verdict, str(one.calls), f"{one.params:,}",
                      f"{100 * one.time:.1f}", f"{100 * one.macs:.1f}")
    show(table)
    for one in listed:
        if one.reason:
            say(f"No slot: {one.name} {one.reason}")
    say(f"The proposed slots take {100 * found.coverage:.0f} % of the time. In a study:\n")
    say(yaml.safe_dump({"network": study}, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None))


def _name_network(network: str, options: list[str] | None) -> dict[str, Any]:
    """A network as a study names it, its code imported where a file was given."""
    from ens.config import parse_changes
    from ens.own_code import name_code

    return {"name": name_code(network), **parse_changes(options or ())}


def _discover(named: dict[str, Any], size: int) -> tuple[Discovery, dict[str, Any]]:
    """What a user's network is made of, and how a study names it with the proposed slots."""
    from ens.networks import create_network
    from ens.networks.discover import discover_slots
    from ens.networks.own import build_module, split_options
    from ens.own_code import is_own

    given = dict(named)
    name = str(given.pop("name"))
    if not is_own(name):
        known = ", ".join(spec.name for spec in create_network(name, **given).slots)
        raise ValueError(f"{name} is a network of ens, whose slots are known: {known}")
    own, frame = split_options(name, given)
    call = {key: frame[key] for key in ("in_channels", "output", "extras") if key in frame}
    found = discover_slots(build_module(name, own), side_px=size, **call)
    study: dict[str, Any] = {"name": name, **given, "slots": list(found.slots)}
    study |= {key: value for key, value in (("upscale", found.upscale), ("size_multiple", found.size_multiple))
              if value > 1 and key not in given}
    return found, study


def init(
    data: Annotated[str, typer.Option(help="Folder of training images, clean or with input/ and target/.")],
    task: Task,
    network: Annotated[str, typer.Option(metavar="NETWORK", help=(
        "my_network:build with --import, or my_network.py:build: a function that returns the module."))] = "",
    teacher: Teacher = None,
    validation: Annotated[str, typer.Option(help="Folder of the images that choose; those of --data by default.")] = "",
    report: Annotated[str, typer.Option(help="Folder of images that choose nothing, to report on.")] = "",
    budgets: Annotated[list[str] | None, typer.Option("--device-budget", metavar="OBJECTIVE:VALUE", help=(
        "What the hybrid may cost at most, latency_ms:100 or peak_bytes:200M; may be given twice."))] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Study file to write.")] = Path("study.yaml"),
    options: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=(
        "Option of the network, for instance dim=48; in_channels, output and extras say how it is called."))] = None,
    code: Import = None,
) -> None:
    """Write a study for a network, images and a goal, every key with its meaning and default, and check it.

    Slots are those that `ens slots` proposes, sizes and batches what the images and a pilot of seconds allow.
    """
    from ens.atomic import write_atomic
    from ens.config import ConfigError, load_study
    from ens.data.tasks import create_task
    from ens.draft import comment_study, draft_study, relate_teacher
    from ens.export.hybrid import open_network
    from ens.networks import create_network
    from ens.opened_study import OpenedStudy
    from ens.own_code import is_own

    if out.exists():
        raise ConfigError(f"{out} exists; give another --out")
    if not (network or teacher):
        raise ConfigError("give --network, or --teacher with a checkpoint that ens knows, or both")
    job, named = create_task(task), _name_network(network, options) if network else {}
    if is_own(str(named.get("name", ""))):
        named = _discover(named, 128)[1]
    described = dict(named)
    built = create_network(described.pop("name"), **described).eval() if named else open_network(str(teacher))
    goals = dict(map(_split_bound, bound_changes([text.replace(":", "=", 1) for text in budgets or ()])))
    draft = draft_study(built, task={"name": task}, scale=job.scale, data=data, validation=validation, report=report,
                        bounds=goals, folder=out.parent)
    values = {"name": out.stem, "network": named, **draft.values,
              "teacher": relate_teacher(teacher, out.parent) if teacher else ""}
    command = spell("run", str(out), "--out", "run" if out.stem == "study" else out.stem)
    text = comment_study(values, draft.notes, ["Written by `ens init`; every key there is. Next:", command])
    write_atomic(out, text.encode())
    try:
        with reporting() as control:
            OpenedStudy(out.with_suffix(".run"), load_study(out), say=control.say).check(tuned=True)
    except ValueError as error:
        raise ConfigError(f"{out} is written, and will not run like this: {error}") from None
    say(f"Wrote {out}. Next: {command}")


def _split_bound(change: str) -> tuple[str, float]:
    """`search.max.latency_ms=100.0` -> ("latency_ms", 100.0)."""
    key, _, value = change.partition("=")
    return key.removeprefix("search.max."), float(value)


def _describe(one: Candidate) -> str:
    if not one.layout:
        return ""
    scale = f"/{one.downscale}" if one.downscale > 1 else ""
    return f"{one.layout} {one.channels}ch{scale}"
