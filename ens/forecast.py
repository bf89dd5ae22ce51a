"""What is left of a study and how long that takes on this machine: time of every verb, memory and disk.

A pilot of seconds times all of it small and multiplies: patches of at most `_SIDE_PX`, as many as `_BUDGET_S` allows, a
crop of one image, one file of a slot. Surrogates have random weights: a time does not depend on them.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.config import TrainConfig
from ens.data.folders import find_pairs
from ens.data.sizes import read_size
from ens.distill.fit import gains_from_bf16
from ens.distill.losses import relative_error
from ens.evaluate.metrics import score_psnr_db
from ens.networks.steps import Network, RowNetwork, SlotSpec, create_filling, pad_to_multiple
from ens.run_folder import RunFolder
from ens.runtime.process import format_duration
from ens.runtime.profiling import Part, check_runtime, estimate_held, plan_profile, write_part
from ens.space import BUILTIN, Choice, Genotype

_SIDE_PX, _BUDGET_S = 64, 0.3
_BACKWARD = 2
"""A backward pass takes about twice as long as a forward one."""
_FASTER = 1.5
"""ONNX Runtime against eager PyTorch, from 1.2 to 2 times as fast for whole networks (results/export.md)."""
_WRITE_S, _SHARED = 2.5, 0.6
"""Seconds that a slot's file takes where none is to be timed, and what a whole network takes of the sum of its slots:
blocks that are alike are traced once."""
_CHECKS = 3
"""Times that an exported network is run or written anew while it is checked, in units of writing it."""
_LONG_S, _SHORTER = 12 * 3600.0, 10


@dataclass(frozen=True)
class Cost:
    """One verb: its time, of what it consists, and the key of the study that shortens it, where there is one.

    `count` is the value of that key, `unit_s` what one of it takes with `beside` changed too.
    """

    verb: str
    seconds: float
    what: str
    key: str = ""
    count: int = 0
    unit_s: float = 0.0
    beside: str = ""

    def shorten(self) -> Cost:
        """The same with a tenth of `count`."""
        count = int(round(self.count / _SHORTER, 1 - len(str(self.count // _SHORTER))))
        return replace(self, count=count, seconds=count * self.unit_s)


@dataclass(frozen=True)
class Forecast:
    """Costs of the verbs that are not done, in order; the most memory and disk that any of them needs."""

    costs: tuple[Cost, ...]
    memory_bytes: float
    disk_bytes: float

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)

    def until(self, verb: str) -> Forecast:
        """The same without what comes after a verb."""
        return replace(self, costs=self.costs[:[cost.verb for cost in self.costs].index(verb) + 1])

    def describe(self) -> str:
        """One line: time in all and of the verbs that take most of it, memory, disk, and what would take less."""
        parts = ", ".join(f"{cost.verb} {format_duration(cost.seconds)}" for cost in self.costs
                          if cost.seconds >= 0.03 * self.seconds)
        memory, disk = (f"{size / 2**30:.1f} GiB" for size in (self.memory_bytes, self.disk_bytes))
        return (f"about {format_duration(self.seconds)} on this machine{_describe_load()} ({parts}), {memory} of "
                f"memory, {disk} of disk{self.suggest()}")

    def suggest(self) -> str:
        """What makes a long study shorter, as the end of a sentence; nothing where it is short."""
        costs, changes = list(self.costs), list[str]()
        while sum(cost.seconds for cost in costs) > _LONG_S and len(changes) < len(costs):
            index = max(range(len(costs)), key=lambda place: costs[place].seconds)
            if not costs[index].key or costs[index].count < 10 * _SHORTER or costs[index] not in self.costs:
                break
            costs[index] = costs[index].shorten()
            changes.append(f"`{costs[index].key}={costs[index].count}`{costs[index].beside}")
        shorter = format_duration(sum(cost.seconds for cost in costs))
        return f"; {' with '.join(changes)} would take {shorter}" if changes else ""


def forecast(run: RunFolder, *, clock: Callable[[], float] = time.perf_counter) -> Forecast | None:
    """Time what is left of a run for some seconds; None where nothing takes long any more."""
    tuned = [path for path in run.hybrids.list_tuned() if path.stem.endswith(run.recipe(run.study.finetune).key)]
    if run.has_archive and run.is_searched and tuned:
        return None
    return _Pilot(run, clock).forecast(candidates=max(0, run.study.finetune.candidates - len(tuned)))


class _Pilot:
    """The network that is timed, on the study's device."""

    def __init__(self, run: RunFolder, clock: Callable[[], float]) -> None:
        self.run, self.clock = run, clock
        self.has_teacher = bool(run.study.teacher) or run.has_library or run.teacher_path.exists()
        own = run.teacher if run.has_library else run.source if self.has_teacher else run.create_network()
        self.device, self.bf16 = run.device, gains_from_bf16(run.device)
        self.network = copy.deepcopy(own).to(self.device).eval()
        self.rng, self.peak_bytes = np.random.default_rng(0), 0.0

    def forecast(self, *, candidates: int) -> Forecast:
        study, costs = self.run.study, []
        if not self.has_teacher:
            costs.append(self._train("train", self.network, study.train, 1, 0.0))
        if jobs := self.run.missing_jobs if self.run.has_library else self.run.jobs:
            costs.append(self._distill(jobs))
        slot_s = self._write_slot()
        whole = _SHARED * slot_s * len(self.run.space.slots)
        hybrids = [self._fill(self.run.restricted.sample(self.rng)) for _ in range(2)]
        image_s = [self._evaluate(network) for network in (self.network, *hybrids)]
        if self.run.is_untimed:
            costs.append(self._profile(slot_s, whole, image_s))
        costs.append(self._search(image_s))
        if candidates and study.data.train:
            passes = len(self.run.validation.images) * (12 * image_s[1] + image_s[0])
            costs.append(self._train("finetune", hybrids[0], study.finetune, candidates, passes))
        if candidates:
            costs.append(Cost("export", whole * (1 + _CHECKS), "one ONNX file, written and checked"))
        params = _count_params(self.network)
        with torch.device("meta"):
            surrogates = sum(_count_params(create_filling(spec, choice)) for spec, choice in jobs)
        disk = 4 * (params + surrogates) + 12 * max(params, min(surrogates, study.distill.group_size * surrogates
                                                                / max(1, len(jobs)))) + 4 * 8 * params
        return Forecast(tuple(costs), self.peak_bytes + _resident_bytes() + self._images_bytes(), disk)

    def _time(self, work: Callable[[int], object], count: float) -> float:
        """Seconds of `work(count)`: of as many as the budget allows, after a first of one, which is slower."""
        spent = self._clock(work, 1)
        if spent < 2 * _BUDGET_S:
            number = max(1, int(min(count, _BUDGET_S / max(spent, 1e-6))))
            spent = min(spent, self._clock(work, number) / number)
        return spent * count

    def _clock(self, work: Callable[[int], object], number: int) -> float:
        began = self.clock()
        work(number)
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return self.clock() - began

    def _noise(self, number: int, side: int) -> Tensor:
        image = torch.rand(number, self.network.in_channels, side, side, device=self.device)
        return pad_to_multiple(image, self.network.size_multiple)

    def _distill(self, jobs: Sequence[tuple[SlotSpec, Choice]]) -> Cost:
        """Every step: a pass of the teacher a group, and an update of every surrogate; kinds of them are timed once."""
        settings = self.run.study.distill
        side = min(_SIDE_PX, settings.patch_px)
        patches = settings.batch_size * (settings.patch_px / side)**2
        groups = math.ceil(len(jobs) / settings.group_size)
        with torch.no_grad():
            teacher = groups * self._time(lambda number: self.network.restore(self._noise(number, side)), patches)
        kinds = Counter((replace(spec, name="", module="", behind=()), choice) for spec, choice in jobs)
        update = sum(count * self._time(self._update(spec, choice, side), patches)
                     for (spec, choice), count in kinds.items())
        step, settling = teacher + update, 4 * (teacher + update / (1 + _BACKWARD))
        what = f"{len(jobs)} surrogates, {settings.steps} steps of {step:.2g} s"
        return Cost("distill", settings.steps * step + settling, what + (f" in {groups} groups" if groups > 1 else ""),
                    "distill.steps", settings.steps, step)

    def _update(self, spec: SlotSpec, choice: Choice, side: int) -> Callable[[int], None]:
        """One step of a surrogate on so many patches."""
        blocks = create_filling(spec, choice).to(self.device).train()
        optimizer = torch.optim.AdamW(blocks.parameters()) if _count_params(blocks) else None
        height, width = (length // spec.downscale for length in self._noise(1, side).shape[-2:])

        def work(number: int) -> None:
            if optimizer is None:
                return
            given, wanted = torch.rand(2, number, spec.channels, height, width, device=self.device)
            optimizer.zero_grad(set_to_none=True)
            with self._counting(side, number, self.run.study.distill.batch_size, self.run.study.distill.patch_px):
                with torch.autocast(given.device.type, torch.bfloat16, enabled=self.bf16):
                    output = blocks(given)
                loss = relative_error(output.float(), wanted, given)
            loss.backward()
            optimizer.step()

        return work

    def _counting(self, side: int, number: int, batch_size: int, patch_px: int) -> Any:
        """While it is open, the bytes kept for a backward pass are counted, and scaled to a batch of the study."""
        seen: set[int] = set()
        scale = batch_size * patch_px**2 / (number * side**2)

        def keep(kept: Tensor) -> Tensor:
            if not isinstance(kept, nn.Parameter) and kept.untyped_storage()._cdata not in seen:
                seen.add(kept.untyped_storage()._cdata)
                total[0] += kept.untyped_storage().nbytes()
                self.peak_bytes = max(self.peak_bytes, scale * total[0])
            return kept

        total = [0]
        return torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept)

    def _train(self, verb: str, network: Network, settings: TrainConfig, times: int, passes_s: float) -> Cost:
        """Steps of a training end to end, its phases by their pixels, and `passes_s` of validation."""
        phases = settings.phases
        _, side, batch = phases[0]
        small = min(_SIDE_PX, side)
        per_px = self._time(self._step(network, small, phases, taught=verb == "finetune"),
                            batch * (side / small)**2) / (batch * side**2)
        ends = [*(start for start, _, _ in phases[1:]), settings.steps]
        pixels = sum((end - start) * batch * side**2 for (start, side, batch), end in zip(phases, ends, strict=True))
        first = f"`{verb}.phases=[[0, {side}, {batch}]]`"
        return Cost(verb, times * (per_px * pixels + passes_s), f"{times * settings.steps} steps, the first of "
                    f"{per_px * batch * side**2:.2g} s", f"{verb}.steps", settings.steps, times * per_px * batch
                    * side**2, f" {first}" if len(phases) > 1 else "")

    def _step(self, network: Network, side: int, phases: Sequence[tuple[int, int, int]], *,
              taught: bool) -> Callable[[int], None]:
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-6)
        _, patch_px, batch_size = max(phases, key=lambda phase: phase[2] * phase[1]**2)

        def work(number: int) -> None:
            image = self._noise(number, side)
            optimizer.zero_grad(set_to_none=True)
            with self._counting(side, number, batch_size, patch_px), torch.autocast(
                    image.device.type, torch.bfloat16, enabled=self.bf16):
                output = network(image)
                with torch.no_grad():
                    wanted = self.network(image) if taught else torch.zeros_like(output)
                loss = F.l1_loss(output.float(), wanted.float())
            loss.backward()
            optimizer.step()

        return work

    def _fill(self, genotype: Genotype) -> Network:
        hybrid = copy.deepcopy(self.network)
        for name, choice in self.run.space.replaced(genotype).items():
            hybrid.fill(name, create_filling(self.run.skeleton.slot(name), choice))
        return hybrid.to(self.device).eval()

    def _evaluate(self, network: Network) -> float:
        """Seconds that a validation image takes in the mean: of a crop of the first one, by pixels."""
        images = self.run.validation.images
        looked = [images[index] for index in range(0, len(images), -(-len(images) // 8))]
        scale, grid = network.upscale, 8 * network.upscale
        side = max(grid, min(_SIDE_PX * scale, *looked[0].clean.shape[-2:]) // grid * grid)
        clean, degraded = looked[0].clean[:, :side, :side], looked[0].degraded[:, :side // scale, :side // scale]
        mean_px = sum(image.clean[0].numel() for image in looked) / len(looked)

        def work(number: int) -> None:
            with torch.inference_mode():
                for _ in range(number):
                    score_psnr_db(network(degraded[None].to(self.device))[0].cpu(), clean, self.run.protocol)

        return self._time(work, 1) * mean_px / clean[0].numel()

    def _search(self, image_s: Sequence[float]) -> Cost:
        """Genotypes that are not measured yet, each on every image; a batch shares what its genotypes begin with."""
        run, images = self.run, len(self.run.validation.images)
        left = max(0, run.budget - (len(run.archive.known()) if run.has_archive else 0))
        batch = max(1, min(run.study.search.batch_size, left))
        sizes = [len(slot.open) for slot in run.restricted.slots]
        steps = [self.network.slot_step(slot.name) for slot in run.space.slots]
        distinct = sum(min(batch, math.prod(size for size, other in zip(sizes, steps, strict=True) if other <= step))
                       for step in steps)
        genotype = images * sum(image_s[1:]) / len(image_s[1:]) * distinct / (batch * len(steps))
        seconds = left * genotype + images * image_s[0] * (not run.has_archive)
        return Cost("search", seconds, f"{left} genotypes, {images} images, {genotype:.2g} s each", "search.budget",
                    run.study.search.budget, genotype)

    def _write_slot(self) -> float:
        """Seconds that a slot's file takes to be written: one of a kind in the middle is."""
        if not self.run.is_untimed:
            return _WRITE_S
        run, suffix = self.run, check_runtime(self.run.study.latency.runtime)
        plan = plan_profile(run.skeleton, run.space, height=_SIDE_PX, width=_SIDE_PX, checks=0, seed=0)
        shape = (1, self.network.in_channels, _SIDE_PX, _SIDE_PX)
        first = Part("first", "first", shape, lambda: RowNetwork(nn.Identity(), shape[1]).eval())  # loads the exporter
        part = plan.groups[-1][len(plan.groups[-1]) // 2]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"slot{suffix}"
            write_part(first, path, suffix)
            return self._clock(lambda _: write_part(part, path, suffix), 1)

    def _profile(self, slot_s: float, whole: float, image_s: Sequence[float]) -> Cost:
        """Files that are written, and passes in which they are timed."""
        run, settings = self.run, self.run.study.latency
        plan = plan_profile(run.skeleton, run.space, height=settings.size[0], width=settings.size[1],
                            checks=settings.checks, seed=run.study.seed)
        files = plan.files(settings.runtime)
        hybrids = len(plan.groups[0])
        self.peak_bytes = max(self.peak_bytes, estimate_held(plan, run.skeleton, run.space))
        looked = run.validation.images[:4]
        one = image_s[1] / _FASTER * math.prod(settings.size) * len(looked) / sum(
            image.degraded[0].numel() for image in looked)
        timed = settings.passes * (settings.repeats + 1) * one * (hybrids + sum(
            len(group) for group in plan.groups[1:]) / len(run.space.slots))
        write = hybrids * whole + (len(files) - hybrids) * slot_s
        return Cost("profile", write + timed, f"{len(files)} files to write, then {settings.passes} passes over them")

    def _images_bytes(self) -> float:
        """Training images in memory, three bytes a pixel, by the sizes of some of them."""
        data = self.run.study.data.train
        if not data or data.startswith(BUILTIN):
            return 0.0
        pairs = find_pairs(data, scale=self.run.task.scale)
        looked = pairs[::-(-len(pairs) // 50)]
        return 3.0 * len(pairs) * sum(math.prod(read_size(pair.clean)) for pair in looked) / len(looked)


def _describe_load() -> str:
    """How busy the machine is, where others take what the pilot would have had."""
    if not hasattr(os, "getloadavg") or (load := os.getloadavg()[0]) < 1.5 * (os.cpu_count() or 1):
        return ""
    return f", as busy as it is now (load {load:.0f})"


def _count_params(module: nn.Module) -> int:
    return sum(map(torch.numel, module.parameters()))


def _resident_bytes() -> float:
    """The most memory that this process has had so far; 0 where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
