"""What a study names, opened: its task, networks, search space, library and validation images.

The bridge between config and pipeline: the only functions beside the verbs that take a `StudyConfig`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ens.config import ConfigError, StudyConfig, parse_choices
from ens.data.folders import load_pairs
from ens.data.pairs import Patches, ValidationSet, load_validation_set
from ens.data.tasks import Task, create_task
from ens.distill.library import BUILTIN, Library, LibraryError, create_library, open_library
from ens.evaluate.cost import build_cost_table
from ens.evaluate.evaluator import Evaluator
from ens.evaluate.protocols import task_protocols
from ens.export.hybrid import build_hybrid, open_network
from ens.networks import create_network
from ens.networks.slots import build_space
from ens.networks.steps import Network, create_filling
from ens.objectives import find_objectives
from ens.search import create_engine
from ens.space import Genotype, SearchSpace


def check_study(study: StudyConfig) -> None:
    """Raise now what would otherwise be found out after hours of training: names, choices, device and images."""
    choose_device(study)
    scale = read_task(study).scale
    load_pairs(study.data.validation, scale=scale, limit=study.data.limit)
    find_objectives(study.search.objectives)
    with torch.device("meta"):  # in no time, and without the memory of a large network
        network = create_study_network(study) if not study.teacher else None
    network = network or open_location(study.teacher)
    if network.upscale != scale:
        raise ConfigError(f"{study.name}: the network enlarges {network.upscale} times, the task {scale} times")
    space = read_space(study, network)
    with torch.device("meta"):
        for slot in space.slots:
            for choice in slot.choices[1:]:
                create_filling(network.slot(slot.name), choice)
    create_engine(study.search.engine, space, seed=study.seed)


def read_task(study: StudyConfig) -> Task:
    """The task with its options; raises ConfigError where the study names none."""
    options = dict(study.task)
    if "name" not in options:
        raise ConfigError(f"{study.name}: `task` needs a name, for instance {{name: denoise, sigma_255: 25}}")
    return create_task(str(options.pop("name")), options)


def create_study_network(study: StudyConfig) -> Network:
    """The network to train as a teacher, randomly initialised; raises ConfigError where the study describes none."""
    options = dict(study.network)
    if "name" not in options:
        raise ConfigError(f"{study.name}: give `teacher`, or `network` with a name, for instance {{name: restormer}}")
    return create_network(str(options.pop("name")), **options)


def open_location(location: str) -> Network:
    """A network from a checkpoint, a hybrid file, or `builtin:NAME` for a shipped teacher."""
    return open_library(location).load_teacher() if location.startswith(BUILTIN) else open_network(location)


def read_space(study: StudyConfig, teacher: Network) -> SearchSpace:
    """The search space a study describes on this teacher."""
    return build_space(study.name, teacher, granularity=study.granularity, choices=parse_choices(study.choices),
                       slots={name: parse_choices(entries) for name, entries in study.slots.items()},
                       penalty_teacher=study.penalty.teacher, penalty_per_block=study.penalty.per_block)


@dataclass(frozen=True)
class SpaceSummary:
    """What `ens spaces` lists; ranges are over the choices, MACs for an image of 256×256."""

    space: SearchSpace
    params: tuple[float, float]
    macs: tuple[float, float]


def summarise_space(study: StudyConfig) -> SpaceSummary:
    """Slots, choices and cost range of a study, without any weights where it names no teacher."""
    with torch.device("meta"):  # in no time, and without the memory of 26 M random weights
        teacher = create_study_network(study) if not study.teacher else None
    teacher = teacher or open_location(study.teacher)
    space = read_space(study, teacher)
    costs = build_cost_table(teacher, space)
    return SpaceSummary(space, costs.range("params"), costs.range("macs"))


def open_study_library(study: StudyConfig, out: Path, teacher: Network | None) -> Library:
    """The study's library; begun in `out/library` when a teacher is given and there is none."""
    if study.library:
        library = open_library(study.library)
    elif teacher is None or (out / "library" / "manifest.json").exists():
        library = open_library(out / "library")
    else:
        return create_library(out / "library", teacher, task=str(read_task(study)), dtype=study.distill.dtype,
                              recipe=dataclasses.asdict(study.distill))
    if teacher is not None and not library.imitates(teacher):
        raise LibraryError(f"{library.root} imitates another teacher than the one of {study.name}")
    return library


def load_patches(study: StudyConfig, network: Network, *, purpose: int) -> Patches:
    """Training patches of the study's folder; every purpose (teacher, library, hybrid) draws others."""
    if not study.data.train:
        raise ConfigError(f"{study.name}: `data.train` names no folder of training images")
    task = read_task(study)
    return Patches(load_pairs(study.data.train, scale=task.scale, channels=network.in_channels), task,
                   seed=study.seed + purpose)


def load_validation(study: StudyConfig, teacher: Network) -> ValidationSet:
    """The images a genotype's PSNR is measured on, degraded as the protocol says."""
    return load_validation_set(study.data.validation, read_task(study), channels=teacher.in_channels,
                               crop_px=study.data.crop_px, limit=study.data.limit)


def build_genotype(teacher: Network, space: SearchSpace, library: Library, genotype: Genotype) -> Network:
    """The hybrid of a genotype with the library's weights, in evaluation mode."""
    return build_hybrid(teacher, {name: library.load_surrogate(teacher.slot(name), choice)
                                  for name, choice in space.replaced(genotype).items()})


def build_evaluator(study: StudyConfig, library: Library) -> tuple[Evaluator, SearchSpace, ValidationSet]:
    """The evaluator with every surrogate the library holds, its space and its images."""
    teacher = library.load_teacher()
    space = read_space(study, teacher)
    device = choose_device(study)
    fillings: list[list[nn.Module | str | None]] = []
    for slot in space.slots:
        spec = teacher.slot(slot.name)
        fillings.append([None, *(library.missing(slot.name, choice) or library.load_surrogate(spec, choice).to(device)
                                 for choice in slot.choices[1:])])
    images = load_validation(study, teacher)
    evaluator = Evaluator(teacher, space, fillings, images=images, protocol=task_protocols(read_task(study))[0],
                          costs=build_cost_table(teacher, space), device=device)
    return evaluator, space, images


def choose_device(study: StudyConfig) -> str:
    """`auto` is the GPU where there is one; raises ConfigError for a GPU that is not there."""
    if study.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if study.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"{study.name}: device is auto, cpu, cuda or cuda:1, got {study.device!r}")
    if study.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"{study.name}: device {study.device} is asked for, but torch sees no GPU; use auto or cpu")
    return study.device
