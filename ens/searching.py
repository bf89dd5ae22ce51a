"""The verbs that search and show what was found: `ens search` and `ens pareto`."""

from __future__ import annotations

from typing import Annotated

import typer

import ens.options as given
from ens.console import print_front, print_tuned, reporting, say, show_json
from ens.space import format_genotype

_JOIN_S = 24 * 3600
"""A worker that finds its folder being prepared by another waits for it, and measures with it then."""


def search(study: given.Study, out: given.Out, teacher: given.Teacher = None, bounds: given.Bounds = None,
           require: given.Require = None, patience: given.Patience = None, fix: given.Fix = None,
           forbid: given.Forbid = None, storage: given.Storage = "", jobs: given.Jobs = 1,
           deterministic: given.Deterministic = False, ray: given.Ray = "", changes: given.Set = None,
           code: given.Import = None) -> None:
    """Measure genotypes until the budget of unique evaluations is spent, with all who share the archive."""
    import ens.pipeline as pipeline
    from ens.forecast import forecast
    from ens.pareto.storage import Storage

    with reporting() as control:
        asked = given.search_changes(changes, bounds, require, patience, fix, forbid)
        folder = given.start(study, out, asked, teacher=teacher, storage=storage, wait_s=_JOIN_S, ray=ray,
                             jobs=jobs)
        if folder.study.search.engine == "exhaustive" and not folder.is_searched and (ahead := forecast(folder)):
            control.say(f"search: {ahead.until('search').describe()}")
        if ray:
            pipeline.distill_spread(folder, control)
        measured = pipeline.search(folder, control, jobs=jobs, deterministic=deterministic, ray=bool(ray))
    url = ["--storage", str(Storage(storage))] if storage else []
    say(f"{len(measured)} genotypes are measured. Next: {given.spell('pareto', str(out), *url)}")


def pareto(run: given.Run, objectives: Annotated[str, typer.Option(help=(
        "Two or three measured objectives instead of the search's: psnr_drop_db,macs."))] = "",
        within: given.Within = None,
        diverse: Annotated[int | None, typer.Option(min=2, metavar="N", help=(
            "Name N members of the front that differ from one another in as many slots as possible, the knee first."
        ))] = None,
        bounds: given.Bounds = None, fix: given.Fix = None, forbid: given.Forbid = None,
        unmark: Annotated[str, typer.Option(metavar="GENOTYPE", help=(
            "Put a genotype back that a failed export has marked invalid."))] = "",
        storage: given.Storage = "", as_json: given.AsJson = False, code: given.Import = None) -> None:
    """Print the front of a run and write it as CSV, Markdown, PNG and one HTML page."""
    import ens.pipeline as pipeline
    from ens.pareto.selection import diverse_members, pick_genotype
    from ens.pareto.tables import front_data

    names = given.parse_names(objectives)
    folder = given.open_run(run, given.search_changes(None, bounds, fix=fix, forbid=forbid), storage=storage)
    if unmark:
        folder.unmark(unmark)
    front = folder.front(names)
    chosen = format_genotype(pick_genotype(f"within {within:g}", front=front, space=folder.archive.space)
                             ) if within is not None else ""
    spread = diverse_members(front, count=diverse) if diverse is not None else []
    if as_json:
        show_json({**front_data(front, archive=folder.archive), "cheapest_within": chosen,
                   "diverse": [format_genotype(genotype) for genotype, _ in spread]})
    else:
        print_front(folder, front)
        print_tuned(folder, list(folder.archive.tuned))
        if chosen:
            say(f"Cheapest within {within:g} dB: {chosen}")
        for genotype, distance in spread:
            say(f"Diverse: {format_genotype(genotype)}" + (
                f", at least {distance} of {len(genotype)} slots differ" if distance else ", the knee"))
    with reporting() as control:  # last, so that a folder that is read-only has shown its front
        pipeline.pareto(folder, control, objectives=names)
