"""What an export writes beside the ONNX file: its int8 form, a bundle that runs without ens, the hybrid's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ens.data.sizes import check_patches_fit
from ens.export.bundle import write_bundle
from ens.export.card import write_card
from ens.export.formats import ExportError, describe_network
from ens.export.plain import write_plain, write_source
from ens.networks.steps import Network
from ens.run_folder import RunFolder
from ens.runtime.bench import bench_files
from ens.runtime.runner import describe_machine
from ens.space import Genotype

COMPANIONS = ("int8", "bundle", "plain")
_CALIBRATION, _PATCH_PX, _SAMPLES = 16, 128, 3
_BENCH_PX, _BENCH_REPEATS, _BENCH_THREADS = 256, 7, (1, 2)


def check_companions(run: RunFolder, genotype: Genotype, names: Sequence[str], *, formats: Sequence[str],
                     fixed: bool) -> None:
    """Raise now what could not be written afterwards: ExportError, or ConfigError where int8 lacks training images."""
    if {"int8", "bundle"} & set(names) and (fixed or not {"onnx", "openvino"} & set(formats)):
        raise ExportError("--int8 and --bundle are made of the ONNX file with free sides: leave --size out and name "
                          "onnx in --format")
    if "int8" in names:
        check_patches_fit(run.train_folder, _PATCH_PX, scale=run.task.scale)
    if "plain" in names:
        write_source(run.skeleton, run.space.replaced(genotype))


def write_companions(run: RunFolder, genotype: Genotype, hybrid: Network, names: Sequence[str], *,
                     facts: Mapping[str, str], say: Callable[[str], None]) -> list[Path]:
    """Write those of COMPANIONS that are named, each checked first; return their paths."""
    model = run.hybrids.exported(genotype)
    writers: dict[str, Callable[[], Path]] = {
        "int8": lambda: _write_int8(run, hybrid, model, facts, say),
        "bundle": lambda: write_bundle(model.with_suffix(".bundle"), model, model.with_name(f"{model.name}.yaml"),
                                       run.validation.images[:_SAMPLES]),
        "plain": lambda: _write_plain(run, genotype, hybrid, model.parent)}
    return [writers[name]() for name in COMPANIONS if name in names]


def _write_int8(run: RunFolder, hybrid: Network, model: Path, facts: Mapping[str, str],
                say: Callable[[str], None]) -> Path:
    """The int8 file and its card, with what it costs and how fast it is."""
    from ens.export.int8 import write_int8  # brings the quantiser, half a second

    target, patches = model.with_suffix(".int8.onnx"), run.patches("int8")
    report = write_int8(model, target, slots={spec.name: spec.module for spec in hybrid.slots},
                        calibration=[patches.batch(index, 1, _PATCH_PX)[0] for index in range(_CALIBRATION)],
                        images=run.validation, protocol=run.protocol, on_event=say)
    side = _BENCH_PX // hybrid.size_multiple * hybrid.size_multiple
    speed = {}
    for threads in _BENCH_THREADS:
        low, high = (timing := bench_files([model, target], height=side, width=side, threads=threads,
                                           repeats=_BENCH_REPEATS)[1]).times_as_fast_quartiles
        speed[f"int8_times_as_fast_threads_{threads}"] = f"{timing.times_as_fast:.2f} ({low:.2f} to {high:.2f})"
    where = "; ".join(f"{key} {value}" for key, value in describe_machine().items())
    card = {**facts, **report.facts(), **speed, "int8_timed_on": f"{side}x{side}, in turn with the float file; {where}"}
    write_card(target, card, metadata=describe_network(hybrid))
    say(f"export: {target} costs {report.cost_db:.3f} dB and is {timing.times_as_fast:.2f} times as fast as the float "
        f"file with {_BENCH_THREADS[-1]} threads")
    return target


def _write_plain(run: RunFolder, genotype: Genotype, hybrid: Network, folder: Path) -> Path:
    path = folder / f"{run.hybrids.exported(genotype).stem}.plain" / "hybrid.py"
    write_plain(hybrid, path, choices=run.space.replaced(genotype), photo=run.validation.images[0].degraded[None])
    return path
