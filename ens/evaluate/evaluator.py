"""Genotype -> Measurement: genotypes that share a prefix share its activations, one image at a time.

Shapes: images (C, H, W) float32; one image at a time goes through the network as (1, C, H, W).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ens.data.pairs import ValidationImage, ValidationSet
from ens.evaluate.meters import Meter
from ens.evaluate.metrics import SSIM_WINDOW_PX, Score, score, score_input, score_psnr_db
from ens.evaluate.protocols import Protocol
from ens.evaluate.racing import Race
from ens.networks.steps import Network, State, pad_to_multiple
from ens.objectives import QUALITY, add_quality, count_perfect, mean_psnr_db, psnr_drop_db
from ens.shortage import is_shortage
from ens.space import Genotype, Measurement, SearchSpace

CACHE_BYTES = 2 * 2**30


class Evaluator:
    """Measures genotypes of one space with one teacher, its surrogates and one validation set.

    `fillings[slot][choice]` is the module of every choice, None for the teacher's own and a text where the choice
    cannot be built: genotypes that use it are recorded as invalid with that text. States at slot borders are kept for
    one image and one genotype, up to `cache_bytes` of them: memory does not grow with the number of images.
    `teacher_psnr_db` is the teacher's PSNR of every image, which drops are measured from.
    """

    def __init__(self, network: Network, space: SearchSpace, fillings: Sequence[Sequence[nn.Module | str | None]], *,
                 images: ValidationSet, protocol: Protocol, meters: Mapping[str, Meter],
                 teacher_psnr_db: Sequence[float], device: str = "cpu", cache_bytes: int = CACHE_BYTES) -> None:
        # A copy, because its slots are filled: the teacher that was given stays the teacher.
        network = copy.deepcopy(network).to(device).eval()
        self._network = network
        self._space = space
        self._fillings = [[network.content(slot.name) if module is None else
                           module if isinstance(module, str) else module.to(device) for module in modules]
                          for slot, modules in zip(space.slots, fillings, strict=True)]
        self._slot_steps = [network.slot_step(slot.name) for slot in space.slots]
        self._teacher_psnr_db = tuple(teacher_psnr_db)
        self._images = images.images
        self._protocol = protocol
        self._meters = meters
        self._device = device
        self._cache_bytes = cache_bytes
        self.steps_run = 0

    def measure(self, genotype: Genotype) -> Measurement:
        """`evaluate` of one genotype."""
        return next(self.evaluate([genotype]))

    def evaluate(self, genotypes: Sequence[Genotype], race: Race | None = None) -> Iterator[Measurement]:
        """One measurement a genotype, in the given order: PSNR of every validation image, and every meter.

        Image after image is run through all of them, sorted so that neighbours share the longest prefixes. What loses
        the `race` is left out of the images that follow; its drop is estimated, and its note says so. A hybrid
        that cannot be built, raises, or returns what is not finite is an invalid measurement that says so; memory or
        disk that runs out is raised, for no genotype is to blame.
        """
        values = {one: {name: meter.measure(one) for name, meter in self._meters.items()} for one in genotypes}
        reasons = {genotype: self._missing(genotype) for genotype in genotypes}
        psnr_db: dict[Genotype, list[float]] = {genotype: [] for genotype in genotypes}
        lost: dict[Genotype, tuple[float, str]] = {}
        for image in self._images:
            cache = _PrefixCache(self._start(image), self._cache_bytes)
            for genotype in sorted(one for one, reason in reasons.items() if not reason and one not in lost):
                try:
                    psnr_db[genotype].append(self._psnr_db(genotype, image, cache))
                except Exception as error:
                    if is_shortage(error):
                        raise
                    reasons[genotype] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if race and (found := race.judge(psnr_db[genotype], values[genotype])):
                    lost[genotype] = found
        for genotype in genotypes:
            yield self._conclude(genotype, values[genotype], psnr_db[genotype], reasons[genotype], lost.get(genotype))

    def _conclude(self, genotype: Genotype, values: dict[str, float], psnr_db: Sequence[float], reason: str,
                  lost: tuple[float, str] | None) -> Measurement:
        """The measurement of what was found; `lost` holds drop and note of one that was stopped."""
        if not reason and any(math.isnan(value) or value == -math.inf for value in psnr_db):
            reason = "PSNR is not finite"
        found = add_quality(Measurement(genotype, values, tuple(psnr_db), not reason, reason),
                            teacher_psnr_db=self._teacher_psnr_db[:len(psnr_db)])
        if lost and found.valid:
            return replace(found, values={**found.values, QUALITY: lost[0]}, note=lost[1])
        return found

    def _missing(self, genotype: Genotype) -> str:
        """Why the hybrid cannot be built, "" where it can."""
        self._space.check(genotype)
        chosen = [modules[index] for modules, index in zip(self._fillings, genotype, strict=True)]
        return next((module for module in chosen if isinstance(module, str)), "")

    @torch.inference_mode()
    def _psnr_db(self, genotype: Genotype, image: ValidationImage, cache: _PrefixCache) -> float:
        for slot, modules, index in zip(self._space.slots, self._fillings, genotype, strict=True):
            module = modules[index]
            assert isinstance(module, nn.Module)
            self._network.fill(slot.name, module)
        start, state = cache.deepest(genotype)
        borders = [step for step in dict.fromkeys(self._slot_steps) if step > start]
        for border in [*borders, len(self._network.steps)]:
            state = self._network.run(state, start, border)
            self.steps_run += border - start
            start = border
            if border < len(self._network.steps):
                cache.keep(genotype[:sum(step < border for step in self._slot_steps)], border, state)
        height, width = image.clean.shape[-2:]
        return score_psnr_db(state["x"][0, :, :height, :width].cpu(), image.clean, self._protocol)

    @torch.inference_mode()
    def _start(self, image: ValidationImage) -> State:
        padded = pad_to_multiple(image.degraded[None].to(self._device), self._network.size_multiple)
        return self._network.start(padded)


class _PrefixCache:
    """States of one image at the slot borders of the genotype that ran last, within a budget of bytes.

    A state beyond the budget is not kept: what follows it is computed again, with the same result.
    """

    def __init__(self, start: State, max_bytes: int) -> None:
        self._stack: list[tuple[Genotype, int, State, int]] = [((), 0, start, 0)]
        self._max_bytes = max_bytes

    def deepest(self, genotype: Genotype) -> tuple[int, State]:
        """Step and state of the longest prefix that this genotype shares with the last one."""
        while self._stack[-1][0] != genotype[:len(self._stack[-1][0])]:
            self._stack.pop()
        return self._stack[-1][1:3]

    def keep(self, prefix: Genotype, step: int, state: State) -> None:
        """Keep a state; kept features that it shares with the one below it count once."""
        below = {id(value) for value in self._stack[-1][2].values()}
        new = {id(value): value.numel() * value.element_size() for value in state.values() if id(value) not in below}
        total = self._stack[-1][3] + sum(new.values())
        if total <= self._max_bytes:
            self._stack.append((prefix, step, state, total))


@dataclass(frozen=True)
class Evaluation:
    """Scores of one file on one folder, and what they mean."""

    protocol: str
    fingerprint: str
    names: tuple[str, ...]
    inputs: tuple[Score, ...]
    outputs: tuple[Score, ...]

    def means(self) -> tuple[float, float, float]:
        """Mean PSNR in dB and SSIM of the output, and mean PSNR of the input (NaN where sizes differ).

        Images restored perfectly are left out of PSNRs, images too small for SSIM's window out of SSIM (NaN where no
        other is left); `left_out` says how many.
        """
        ssim = [score.ssim for score in self.outputs if not math.isnan(score.ssim)]
        return (mean_psnr_db([score.psnr_db for score in self.outputs]), statistics.fmean(ssim) if ssim else math.nan,
                mean_psnr_db([score.psnr_db for score in self.inputs]) if self.inputs else math.nan)

    @property
    def left_out(self) -> list[str]:
        """A sentence for every reason for which images are left out of means."""
        perfect = count_perfect([score.psnr_db for score in self.outputs])
        small = sum(math.isnan(score.ssim) and not math.isnan(score.psnr_db) for score in self.outputs)
        return [*([f"{perfect} of {len(self.outputs)} images equal their target: left out of the mean PSNR"]
                  if perfect else []),
                *([f"{small} of {len(self.outputs)} images are smaller than SSIM's window of {SSIM_WINDOW_PX} px: left "
                   "out of the mean SSIM"] if small else [])]

    @property
    def broken(self) -> str:
        """A sentence where the file under test gives no numbers on some image, "" where all is well."""
        names = [name for name, score in zip(self.names, self.outputs, strict=True)
                 if math.isnan(score.psnr_db) or score.psnr_db == -math.inf]
        return f"the output is not finite on {len(names)} of {len(self.names)} images: {names[0]} …" if names else ""

    @property
    def gain_db(self) -> float:
        """Mean PSNR of the output minus that of the input over the same images, dB; NaN where sizes differ."""
        if not self.inputs:
            return math.nan
        return psnr_drop_db(teacher_psnr_db=[score.psnr_db for score in self.outputs],
                            psnr_db=[score.psnr_db for score in self.inputs])


def evaluate_restorer(restore: Callable[[torch.Tensor], torch.Tensor], images: ValidationSet, protocol: Protocol, *,
                      on_progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """PSNR and SSIM of every image for anything that maps (1, C, H, W) to (1, C, scale·H, scale·W)."""
    return list(evaluate_protocols(restore, images, [protocol], on_progress=on_progress)[0].outputs)


def evaluate_protocols(restore: Callable[[torch.Tensor], torch.Tensor], images: ValidationSet,
                       protocols: Sequence[Protocol], *,
                       on_progress: Callable[[int, int], None] | None = None) -> list[Evaluation]:
    """`evaluate_restorer` by several protocols, the degraded input too where sizes agree; every image restored once."""
    scores: list[list[Score]] = [[] for _ in protocols]
    with torch.inference_mode():
        for done, image in enumerate(images.images, 1):
            output = restore(image.degraded[None])[0]
            for found, protocol in zip(scores, protocols, strict=True):
                found.append(score(output, image.clean, protocol))
            if on_progress is not None:
                on_progress(done, len(images.images))
    names = tuple(image.name for image in images.images)
    return [Evaluation(protocol.name, str(images.fingerprint), names, tuple(
        score_input(image.degraded, image.clean, protocol) for image in images.images
        if image.degraded.shape == image.clean.shape), tuple(found))
        for protocol, found in zip(protocols, scores, strict=True)]


def list_psnr_db(network: nn.Module, images: ValidationSet, protocol: Protocol) -> tuple[float, ...]:
    """PSNR of every image by a network in evaluation mode, dB."""
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    network.eval()
    with torch.inference_mode():
        return tuple(score_psnr_db(network(image.degraded[None].to(device))[0].cpu(), image.clean, protocol)
                     for image in images.images)


def list_input_psnr_db(images: ValidationSet, protocol: Protocol) -> tuple[float, ...]:
    """PSNR of every degraded image as it is, dB; empty where the task changes the size."""
    return tuple(score_input(image.degraded, image.clean, protocol).psnr_db for image in images.images
                 if image.degraded.shape == image.clean.shape)


class Judge:
    """Figures of a network on the validation images, which choose, and on the report images, which choose nothing."""

    def __init__(self, validation: ValidationSet, report: ValidationSet | None, protocol: Protocol) -> None:
        self._sets = {"": validation, **({} if report is None else {"report_": report})}
        self._protocol = protocol

    def score(self, network: nn.Module) -> float:
        """Mean PSNR on the validation images, dB."""
        return mean_psnr_db(list_psnr_db(network, self._sets[""], self._protocol))

    def judge(self, network: nn.Module, state: str) -> dict[str, tuple[float, ...]]:
        """PSNR of every image, dB: `psnr_db_STATE` on the validation images, `report_psnr_db_STATE` on the others."""
        return {f"{prefix}psnr_db_{state}": list_psnr_db(network, images, self._protocol)
                for prefix, images in self._sets.items()}

    def judge_input(self) -> dict[str, tuple[float, ...]]:
        """`judge` of the degraded images as they are, state `input`; empty where the task changes the size."""
        return {f"{prefix}psnr_db_input": list_input_psnr_db(images, self._protocol)
                for prefix, images in self._sets.items()}
