"""Genotype -> Measurement: genotypes that share a prefix share its activations.

Shapes: images (C, H, W) float32; one image at a time goes through the network as (1, C, H, W).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ens.data.pairs import ValidationSet
from ens.evaluate.cost import CostTable
from ens.evaluate.metrics import Score, score, score_psnr_db
from ens.evaluate.protocols import Protocol
from ens.networks.steps import Network, State, pad_to_multiple
from ens.space import Genotype, Measurement, SearchSpace


class Evaluator:
    """Measures genotypes of one space with one teacher, its surrogates and one validation set.

    `fillings[slot][choice]` is the module of every choice, None for the teacher's own and a text where the choice
    cannot be built: genotypes that use it are recorded as invalid with that text. States at slot borders are kept
    for the genotype evaluated last, so give genotypes in lexicographic order.
    """

    def __init__(self, network: Network, space: SearchSpace, fillings: Sequence[Sequence[nn.Module | str | None]], *,
                 images: ValidationSet, protocol: Protocol, costs: CostTable, device: str = "cpu") -> None:
        self._network = network.to(device).eval()
        self._space = space
        self._fillings = [[network.get_submodule(network.slot(slot.name).module) if module is None else module
                           for module in modules] for slot, modules in zip(space.slots, fillings, strict=True)]
        self._slot_steps = [network.slot_step(slot.name) for slot in space.slots]
        self._images = images.images
        self._protocol = protocol
        self._costs = costs
        self._device = device
        # One entry a slot border: the choices made before it, and the state of every image there.
        self._cache: list[tuple[Genotype, int, list[State]]] = []
        self.steps_run = 0

    def evaluate(self, genotypes: Iterable[Genotype]) -> Iterator[Measurement]:
        """One measurement a genotype, in the given order; a hybrid that fails is an invalid measurement."""
        for genotype in genotypes:
            yield self.measure(genotype)

    def measure(self, genotype: Genotype) -> Measurement:
        """PSNR of every validation image, parameters and MACs of this genotype."""
        self._space.check(genotype)
        chosen = [modules[index] for modules, index in zip(self._fillings, genotype, strict=True)]
        reasons = [module for module in chosen if isinstance(module, str)]
        if reasons:
            return Measurement(genotype, {}, valid=False, note=reasons[0])
        values = self._costs.costs(genotype)
        with torch.inference_mode():
            states = self._run(genotype, [module for module in chosen if isinstance(module, nn.Module)])
        psnr_db = tuple(score_psnr_db(self._crop(state, image.clean.shape), image.clean, self._protocol)
                        for state, image in zip(states, self._images, strict=True))
        valid = all(map(math.isfinite, psnr_db))
        return Measurement(genotype, values, psnr_db, valid, "" if valid else "PSNR is not finite")

    def _run(self, genotype: Genotype, chosen: Sequence[nn.Module]) -> list[State]:
        for slot, module in zip(self._space.slots, chosen, strict=True):
            self._network.fill(slot.name, module)
        while self._cache and self._cache[-1][0] != genotype[:len(self._cache[-1][0])]:
            self._cache.pop()
        if not self._cache:
            self._cache.append(((), 0, [self._start(image.degraded) for image in self._images]))
        borders = [step for step in dict.fromkeys(self._slot_steps) if step > self._cache[-1][1]]
        for border in [*borders, len(self._network.steps)]:
            _, start, states = self._cache[-1]
            states = [self._network.run(state, start, border) for state in states]
            self.steps_run += border - start
            if border < len(self._network.steps):
                decided = sum(step < border for step in self._slot_steps)
                self._cache.append((genotype[:decided], border, states))
        return states

    def _start(self, degraded: torch.Tensor) -> State:
        image = degraded[None].to(self._device)
        return self._network.start(pad_to_multiple(image, self._network.size_multiple))

    @staticmethod
    def _crop(state: State, shape: torch.Size) -> torch.Tensor:
        return state["x"][0, :, :shape[-2], :shape[-1]].cpu()


@dataclass(frozen=True)
class Evaluation:
    """Scores of one file on one folder, and what they mean."""

    protocol: str
    fingerprint: str
    names: tuple[str, ...]
    inputs: tuple[Score, ...]
    outputs: tuple[Score, ...]

    def means(self) -> tuple[float, float, float]:
        """Mean PSNR in dB and SSIM of the output, and mean PSNR of the input (NaN where sizes differ)."""
        return (statistics.fmean(score.psnr_db for score in self.outputs),
                statistics.fmean(score.ssim for score in self.outputs),
                statistics.fmean(score.psnr_db for score in self.inputs) if self.inputs else float("nan"))


def evaluate_restorer(restore: Callable[[torch.Tensor], torch.Tensor], images: ValidationSet, protocol: Protocol, *,
                      on_progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """PSNR and SSIM of every image for anything that maps (1, C, H, W) to (1, C, scale·H, scale·W)."""
    return evaluate_protocols(restore, images, [protocol], on_progress=on_progress)[0]


def evaluate_protocols(restore: Callable[[torch.Tensor], torch.Tensor], images: ValidationSet,
                       protocols: Sequence[Protocol], *,
                       on_progress: Callable[[int, int], None] | None = None) -> list[list[Score]]:
    """`evaluate_restorer` by several protocols: a list of scores each, every image restored once."""
    scores: list[list[Score]] = [[] for _ in protocols]
    with torch.inference_mode():
        for done, image in enumerate(images.images, 1):
            output = restore(image.degraded[None])[0]
            for found, protocol in zip(scores, protocols, strict=True):
                found.append(score(output, image.clean, protocol))
            if on_progress is not None:
                on_progress(done, len(images.images))
    return scores


def mean_psnr_db(network: nn.Module, images: ValidationSet, protocol: Protocol) -> float:
    """Mean over the images of the PSNR of a network in evaluation mode."""
    return statistics.fmean(item.psnr_db for item in evaluate_restorer(network.eval(), images, protocol))
