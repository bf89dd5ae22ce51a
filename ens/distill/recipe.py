"""How a network is trained: phases, learning rate, decay of the average, and what of it can be checked beforehand."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """From step `start` on, patches of `patch_px` (input side) in global batches of `batch_size`."""

    start: int
    patch_px: int
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW with warm-up and cosine, gradient clip, averaged weights, progressive phases.

    The loss is L1 to the target, or with a teacher (1 − taught_weight)·L1 + taught_weight·L1 to the teacher's output;
    `taught_by` names the teacher.
    """

    phases: tuple[Phase, ...]
    steps: int
    lr: float = 3e-4
    lr_final: float = 1e-6
    warmup_steps: int = 0
    clip_norm: float = 0.1
    ema_decay: float = 0.999
    taught_weight: float = 0.0
    taught_by: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        """Eight hex digits that name this recipe in files."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]

    @property
    def advice(self) -> str:
        """What to do where a training by this recipe has diverged."""
        return (f"Lower the learning rate ({self.lr:g}) or the clip ({self.clip_norm:g}); --restart begins this "
                "training again")

    def check_processes(self) -> None:
        """Raises ValueError where the processes that `torchrun` started cannot share a batch."""
        for phase in self.phases:
            share_batch(phase.batch_size, int(os.environ.get("WORLD_SIZE", "1")))

    def describe(self) -> dict[str, str]:
        """What must be the same when a training is resumed."""
        return {key: str(value) for key, value in vars(self).items()}

    def describe_loss(self) -> str:
        """The loss of a taught network in words."""
        return f"{1 - self.taught_weight:g}·L1 to the target + {self.taught_weight:g}·L1 to the teacher's output"


def share_batch(batch_size: int, processes: int) -> int:
    """Samples of a global batch for each process; raises ValueError naming the next sizes that can be shared."""
    if batch_size % processes:
        low = batch_size // processes * processes
        fitting = f"{low} or {low + processes}" if low else str(processes)
        raise ValueError(f"batch of {batch_size} cannot be shared by {processes} processes; take {fitting}")
    return batch_size // processes


def learning_rate(*, steps: int, lr: float, lr_final: float, warmup_steps: int) -> Callable[[int], float]:
    """Rate of every step: linear warm-up, then cosine from `lr` to `lr_final` at the last step."""
    def rate_at(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return lr_final + (lr - lr_final) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate_at
