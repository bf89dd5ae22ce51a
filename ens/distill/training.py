"""The one end-to-end training loop: teachers are trained and hybrids fine-tuned with it; resumable at any step.

Shapes: degraded (B, C, H, W) and clean (B, C, scale·H, scale·W), float32 in about [0, 1].
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ens.networks.checkpoints import load_state, save_state

MAX_SKIPPED = 10


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class ResumeMismatch(ValueError):
    """A checkpoint belongs to another configuration; the message lists the differences."""


class PatchSource(Protocol):
    """What `ens.data.pairs.Patches` offers: any batch, rebuilt from its index."""

    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Phase:
    """From step `start` on, patches of `patch_px` (input side) in global batches of `batch_size`."""

    start: int
    patch_px: int
    batch_size: int


@dataclass(frozen=True)
class Progress:
    """State after a step: steps done of how many, loss of this step, updates skipped for NaN or Inf."""

    step: int
    steps: int
    loss: float
    skipped: int


LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, degraded, clean) -> scalar."""


def train_network(network: nn.Module, patches: PatchSource, *, checkpoint: Path, loss: LossFunction,
                  phases: Sequence[Phase], steps: int, lr: float = 3e-4, lr_final: float = 1e-6,
                  warmup_steps: int = 0, weight_decay: float = 1e-4, clip_norm: float = 0.1,
                  ema_decay: float = 0.999, device: str = "cpu", bf16: bool | None = None, save_every: int = 200,
                  identity: Mapping[str, str] | None = None,
                  on_progress: Callable[[Progress], None] | None = None,
                  should_stop: Callable[[], bool] | None = None) -> bool:
    """Train in place with AdamW, warm-up and cosine, gradient clip and EMA; True when all steps are done.

    Afterwards `network` holds the EMA weights. Every `save_every` steps, and when `should_stop` says so, all state goes
    to `checkpoint` (a temporary name, then a rename); the same call continues there, seeing the batches an
    uninterrupted run would see. Under `torchrun` each process takes its share of the global batch. `identity` names
    what must be the same on resume. Raises ResumeMismatch, or TrainingError after ten losses that were not finite.
    """
    recipe = {"steps": str(steps), "phases": str([(p.start, p.patch_px, p.batch_size) for p in phases]),
              "lr": f"{lr} -> {lr_final}, {warmup_steps} warm-up", "weight_decay": str(weight_decay),
              "clip_norm": str(clip_norm), "ema_decay": str(ema_decay), **(identity or {})}
    rank, world = _find_rank()
    network.to(device).train()
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=weight_decay)
    done, skipped = _resume(checkpoint, recipe, network, ema, optimizer, device)
    wrapped = DistributedDataParallel(network) if world > 1 else network
    use_bf16 = gains_from_bf16(device) if bf16 is None else bf16

    def save() -> None:
        if rank == 0:
            _save(checkpoint, recipe, done, skipped, network, ema, optimizer)

    while done < steps:
        phase = [phase for phase in phases if phase.start <= done][-1]
        share = phase.batch_size // world
        degraded, clean = patches.batch(done, share, phase.patch_px, first=rank * share)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, steps=steps, lr=lr, lr_final=lr_final, warmup_steps=warmup_steps)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=use_bf16):
            value = loss(wrapped, degraded.to(device), clean.to(device))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        # The norm is taken after DDP has averaged, so every process skips the same steps.
        if math.isfinite(float(norm)):
            optimizer.step()
            ema.update_parameters(network)
        else:
            skipped += 1
        done += 1
        if skipped >= MAX_SKIPPED:
            raise TrainingError(f"the loss was not finite in {skipped} steps up to step {done}; the last good state is "
                                f"kept in {checkpoint.name}. Lower the learning rate ({lr}) or the clip ({clip_norm})")
        if on_progress is not None:
            on_progress(Progress(done, steps, float(value.detach()), skipped))
        stop = should_stop is not None and should_stop()
        if done % save_every == 0 or done == steps or stop:
            save()
        if stop and done < steps:
            return False
    network.load_state_dict(ema.module.state_dict())
    network.eval()
    return True


def learning_rate(step: int, *, steps: int, lr: float, lr_final: float, warmup_steps: int) -> float:
    """Linear warm-up, then cosine from `lr` to `lr_final` at the last step."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr_final + (lr - lr_final) * 0.5 * (1 + math.cos(math.pi * progress))


def start_processes(device: str) -> None:
    """Join the group that `torchrun` started this process in; does nothing without torchrun."""
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def _find_rank() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gains_from_bf16(device: str) -> bool:
    """Half the memory traffic pays on CUDA, and on a CPU only where it multiplies bfloat16 in hardware."""
    return device.startswith("cuda") or bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _save(path: Path, recipe: Mapping[str, str], done: int, skipped: int, network: nn.Module, ema: AveragedModel,
          optimizer: torch.optim.Optimizer) -> None:
    save_state(path, {"recipe": dict(recipe), "done": done, "skipped": skipped, "params": network.state_dict(),
                      "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})


def _resume(path: Path, recipe: Mapping[str, str], network: nn.Module, ema: AveragedModel,
            optimizer: torch.optim.Optimizer, device: str) -> tuple[int, int]:
    state = load_state(path, device=device)
    if state is None:
        return 0, 0
    stored = cast(dict[str, str], state["recipe"])
    differences = [f"{key}: {stored.get(key, 'absent')} there, {recipe.get(key, 'absent')} now"
                   for key in sorted({*stored, *recipe}) if stored.get(key) != recipe.get(key)]
    if differences:
        raise ResumeMismatch(f"{path} was written with another configuration ({'; '.join(differences)}); "
                             "take another output folder, or the old configuration to continue")
    network.load_state_dict(state["params"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["done"]), int(state["skipped"])
