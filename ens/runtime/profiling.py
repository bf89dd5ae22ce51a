"""Fills a latency table: writes every choice of every slot as a file of the runtime, times them in turn, adds up.

A slot's file is a network of its blocks alone, on the maps that reach it; what no slot touches is the network with all
slots empty. Slots of one width, size and filling share a file, so each is timed once; formats with free sides share it
between sizes too. Alone, a slot takes longer than between its neighbours, since its maps enter and leave the runtime: a
few hybrids timed whole give the factor, others check what is predicted with it. The folder that is timed is a bundle:
plan, files and a runner that needs no `ens`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from ens.atomic import atomic_path, write_atomic
from ens.blocks.rep import fold_blocks
from ens.evaluate.latency import Check, Entry, LatencyError, LatencyTable, Protocol, checked_genotypes
from ens.evaluate.memory import build_peak_tally
from ens.export.formats import FORMATS, RUNTIMES, describe_network
from ens.networks.borders import MapView
from ens.networks.steps import Network, RowNetwork, SlotSpec, create_filling
from ens.runtime import runner
from ens.runtime.bench import quartiles
from ens.runtime.process import format_duration
from ens.space import Choice, Genotype, SearchSpace, format_genotype, parse_genotype

# Prefixes of the names of hybrids that are timed whole; the last is the network with one slot filled, by the user's own
# blocks, which do not run alone: what they take is what they add to the network with all slots empty.
_FITTED, _CHECKED, _WITHIN = "fit-", "hybrid-", "within-"
_WRITE_S = {"executorch": (8, 80)}
"""Seconds that the file of a slot takes to be written, and that of a whole network, where it is not 3."""
_HELD = 2
"""What ONNX Runtime holds of a network that it has run, in units of its peak: 1.3 to 3.2 times, measured."""


@dataclass(frozen=True)
class Part:
    """One thing to time: its name, the stem of its file where sides are free, the shape of its input (1, C, H, W), and
    how its network comes about.
    """

    name: str
    stem: str
    shape: tuple[int, int, int, int]
    build: Callable[[], Network]


@dataclass(frozen=True)
class Plan:
    """Parts by group, whose files take turns; `entries` says which part each choice of each slot is."""

    groups: tuple[tuple[Part, ...], ...]
    entries: Mapping[str, Mapping[str, str]]

    def files(self, runtime: str) -> dict[str, Part]:
        """Every file that the parts need in a runtime, by name."""
        suffix = check_runtime(runtime)
        return {_name_file(part, suffix): part for group in self.groups for part in group}


def plan_profile(network: Network, space: SearchSpace, *, height: int, width: int, checks: int, seed: int) -> Plan:
    """What has to be timed of a space, on random weights: a time does not depend on them.

    Every choice of every slot that differs in more than the slot, `checks` hybrids, and a quarter as many others that
    give the factor, both fewer in a small space. `network` may be on the meta device.
    """
    multiple = network.size_multiple
    height, width = (side + -side % multiple for side in (height, width))
    entries: dict[str, dict[str, str]] = {}
    groups: dict[tuple[int, ...], dict[str, Part]] = {}
    for slot in space.slots:
        spec = network.slot(slot.name)
        shape = (1, spec.channels, height // spec.downscale, width // spec.downscale)
        entries[slot.name] = {}
        for choice in slot.choices:
            if choice.teacher and not _runs_alone(network.content(slot.name)):
                continue
            stem = _name_part(network, spec, choice)
            name = entries[slot.name][choice.label] = f"{stem}-{shape[2]}x{shape[3]}"
            groups.setdefault(shape, {})[name] = Part(name, stem, shape, _slot_builder(network, spec, choice))
    image = (1, network.in_channels, height, width)
    whole = [Part("rest", "rest", image, lambda: _build_hybrid(network, space, None))]
    for slot in space.slots:
        if not _runs_alone(network.content(slot.name)):
            name = entries[slot.name][slot.choices[0].label] = f"{_WITHIN}{slot.name}"
            whole.append(Part(name, name, image, functools.partial(_build_hybrid, network, space, None, slot.name)))
    timed = checked_genotypes(space, checks + checks // 4, seed)
    for index, genotype in enumerate(timed):
        name = f"{_FITTED if index < len(timed) // 5 else _CHECKED}{format_genotype(genotype)}"
        whole.append(Part(name, name, image, _hybrid_builder(network, space, genotype)))
    return Plan((tuple(whole), *(tuple(group.values()) for group in groups.values())), entries)


def _name_part(network: Network, spec: SlotSpec, choice: Choice) -> str:
    """A file's name that two slots share where nothing in it differs."""
    own = spec.options if choice.teacher or choice.family == spec.family else ()
    single = _describe_structure(network.content(spec.name)) if spec.single and choice.teacher else ""
    known = repr((spec.heads, choice.family, choice.depth, choice.options, own, single))
    return f"{choice.family}-{choice.depth}-{spec.channels}ch-{hashlib.sha256(known.encode()).hexdigest()[:8]}"


def _describe_structure(module: nn.Module) -> str:
    """Equal for a user's modules that differ in weights alone: classes, plain attributes, and shapes of tensors."""
    return repr([(name, type(part).__qualname__, [tuple(tensor.shape) for tensor in (
        *part.parameters(recurse=False), *part.buffers(recurse=False))], sorted(
        (key, repr(value)) for key, value in vars(part).items() if isinstance(value, str | int | float | tuple)
        and key != "training")) for name, part in module.named_modules()])


def _name_file(part: Part, suffix: str) -> str:
    return f"{part.name if FORMATS[suffix].default_size else part.stem}{suffix}"


def _fill(network: Network, spec: SlotSpec, choice: Choice) -> nn.Module:
    if not choice.teacher:
        return create_filling(spec, choice)
    own = copy.deepcopy(network.content(spec.name))
    return _materialise(own)


def _materialise(module: nn.Module) -> nn.Module:
    """Random weights for what is on the meta device: small ones, so that nothing overflows or is denormal."""
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.01, 0.05)
    return module


def _slot_builder(network: Network, spec: SlotSpec, choice: Choice) -> Callable[[], Network]:
    multiple = max(1, network.size_multiple // spec.downscale)
    return lambda: RowNetwork(_fill(network, spec, choice), spec.channels, multiple).eval()


def _hybrid_builder(network: Network, space: SearchSpace, genotype: Genotype) -> Callable[[], Network]:
    return lambda: _build_hybrid(network, space, genotype)


def _runs_alone(module: nn.Module) -> bool:
    """Whether blocks need nothing but their map."""
    return not (isinstance(module, MapView) and module.form.is_live)


def _build_hybrid(network: Network, space: SearchSpace, genotype: Genotype | None, kept: str = "") -> Network:
    """A whole network on random weights; without a genotype every slot of the space is empty but the one `kept`."""
    fillings: dict[str, nn.Module] = {}
    for position, slot in enumerate(space.slots):
        index = genotype[position] if genotype else 0
        fillings[slot.name] = _fill(network, network.slot(slot.name), slot.choices[index]) if (
            genotype or slot.name == kept) else nn.Sequential()
    whole = copy.deepcopy(network)
    for name in fillings:
        whole.fill(name, nn.Sequential())
    whole = _materialise(whole)  # type: ignore[assignment]
    for name, filling in fillings.items():
        whole.fill(name, filling)
    return whole.eval()


def estimate_held(plan: Plan, network: Network, space: SearchSpace) -> float:
    """Bytes that a runtime holds while whole networks take turns: all of them are open, and each has run."""
    teacher = replace(space, slots=tuple(replace(slot, choices=slot.choices[:1]) for slot in space.slots))
    _, _, height, width = plan.groups[0][0].shape
    peak = build_peak_tally(network, teacher, height=height, width=width).value(teacher.teacher)
    return _HELD * len(plan.groups[0]) * peak


def write_bundle(plan: Plan, folder: Path, *, runtime: str, threads: int, repeats: int, passes: int,
                 on_step: Callable[[int, int], None], should_stop: Callable[[], bool]) -> bool:
    """Write what `plan` needs that is not in `folder` yet; False where it was stopped before the end.

    Raises ValueError for a runtime there is not, and whatever an exporter raises.
    """
    suffix, files = check_runtime(runtime), plan.files(runtime)
    for done, (name, part) in enumerate(files.items(), 1):
        if not (folder / name).exists():
            torch.manual_seed(0)
            with atomic_path(folder / name) as temporary:
                write_part(part, temporary, suffix)
        on_step(done, len(files))
        if should_stop() and done < len(files):
            return False
    described = {"runtime": runtime, "threads": threads, "repeats": repeats, "passes": passes,
                 "entries": plan.entries, "groups": [[
                     {"name": part.name, "file": _name_file(part, suffix), "shape": list(part.shape)}
                     for part in group] for group in plan.groups]}
    write_atomic(folder / "plan.json", json.dumps(described, indent=1).encode())
    write_atomic(folder / "run.py", Path(runner.__file__).read_bytes())
    return True


def check_runtime(runtime: str) -> str:
    """The suffix of a runtime's files; raises ValueError with those there are."""
    if runtime not in RUNTIMES:
        raise ValueError(f"no runtime {runtime!r} to time files in; allowed: {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime][0]


def write_part(part: Part, path: Path, suffix: str) -> None:
    """Write a part as a file of this suffix, on random weights."""
    network = fold_blocks(part.build())
    kind = FORMATS[suffix]
    size = part.shape[2:] if kind.default_size else None
    kind.write(network, path, describe_network(network, size), size, lambda line: None)


def remove_bundle(folder: Path) -> None:
    """Remove the files of a table that is written."""
    shutil.rmtree(folder)


class _Results(BaseModel):
    """What a runner has left behind."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    plan: dict[str, Any]
    facts: dict[str, str]
    done: dict[str, dict[str, list[float]]]


def read_results(path: Path, space: SearchSpace) -> LatencyTable:
    """The table that a runner's `results.json` makes of its times; raises LatencyError where it is no whole one."""
    try:
        results = _Results.model_validate_json(path.read_text(encoding="utf-8"))
        plan = results.plan
        missing = plan["passes"] * len(plan["groups"]) - len(results.done)
        if missing:
            raise LatencyError(f"{path} is not whole: {missing} groups of files were not timed; run.py goes on")
        times: dict[str, list[float]] = {}
        for group in results.done.values():
            for name, spent in group.items():
                times.setdefault(name, []).extend(spent)
        image = plan["groups"][0][0]["shape"]
        protocol = Protocol(runtime=plan["runtime"], threads=plan["threads"], dtype="float32", height=image[2],
                            width=image[3], repeats=plan["passes"] * plan["repeats"], **results.facts)
        slots = {slot: {label: _summarise(_list_added(name, times)) for label, name in choices.items()}
                 for slot, choices in plan["entries"].items()}
    except (OSError, UnicodeDecodeError, ValidationError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise LatencyError(f"{path} is no result of a runner ({' '.join(str(error).split())[:200]})") from None
    return _assemble(space, protocol, slots, times)


def _list_added(name: str, times: Mapping[str, Sequence[float]]) -> list[float]:
    """Milliseconds of what was timed alone, or of what it adds to the network with all slots empty."""
    rest = statistics.median(times["rest"]) if name.startswith(_WITHIN) else 0.0
    return [max(0.0, spent - rest) for spent in times[name]]


def _assemble(space: SearchSpace, protocol: Protocol, slots: dict[str, dict[str, Entry]],
              times: Mapping[str, Sequence[float]]) -> LatencyTable:
    """The table of slots timed alone, by the factor that the fitted hybrids give; the other hybrids check it."""
    alone = LatencyTable(protocol=protocol, rest=_summarise(times["rest"]), slots=slots)
    alone.check_space(space)
    whole = {prefix: {parse_genotype(name.removeprefix(prefix), space): statistics.median(spent)
                      for name, spent in times.items() if name.startswith(prefix)} for prefix in (_FITTED, _CHECKED)}
    table = alone.scale_slots(statistics.median(
        (measured - alone.rest.ms) / (alone.predict_ms(space, genotype) - alone.rest.ms)
        for genotype, measured in whole[_FITTED].items())) if whole[_FITTED] else alone
    checks = {format_genotype(genotype): Check(predicted_ms=table.predict_ms(space, genotype), measured_ms=measured)
              for genotype, measured in whole[_CHECKED].items()}
    return table.model_copy(update={"checks": checks})


def _summarise(spent: Sequence[float]) -> Entry:
    return Entry(ms=statistics.median(spent), quartiles_ms=quartiles(spent))


def profile_space(network: Network, space: SearchSpace, folder: Path, *, runtime: str, threads: int, height: int,
                  width: int, repeats: int, passes: int, checks: int, seed: int, files_only: bool,
                  say: Callable[[str], None],
                  on_write: Callable[[int, int], None], on_time: Callable[[int, int], None],
                  should_stop: Callable[[], bool]) -> LatencyTable | None:
    """Make the table of a space in `folder`, going on where it was stopped; None where it is stopped again.

    With `files_only` nothing is timed: the folder is then a bundle for another device.
    """
    plan = plan_profile(network, space, height=height, width=width, checks=checks, seed=seed)
    files = plan.files(runtime)
    missing = [part for name, part in files.items() if not (folder / name).exists()]
    slot_s, whole_s = _WRITE_S.get(runtime, (3, 3))
    seconds = sum(whole_s if part in plan.groups[0] else slot_s for part in missing)
    say(f"profile: {len(files)} files, {len(missing)} to write, about {format_duration(seconds)} of processor time; "
        f"then {passes * len(plan.groups)} groups of {runtime} times at {height}x{width}")
    if not (write_bundle(plan, folder, runtime=runtime, threads=threads, repeats=repeats, passes=passes,
                         on_step=on_write, should_stop=should_stop)
            and not files_only and runner.time_plan(folder, on_step=on_time, should_stop=should_stop)):
        return None
    return read_results(folder / "results.json", space)
