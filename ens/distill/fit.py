"""The one training loop, end to end: teachers are trained and hybrids fine-tuned with it; resumable at any step.

Shapes: degraded (B, C, H, W) and clean (B, C, scale·H, scale·W), float32 in about [0, 1].
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ens.distill.losses import TaughtLoss, l1_loss
from ens.distill.recipe import Recipe, learning_rate, share_batch
from ens.distill.resume import ResumeMismatch, TrainState, read_resume, taken_up
from ens.networks.checkpoints import save_state

MAX_SKIPPED = 10
WEIGHT_DECAY = 1e-4


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


class PatchSource(Protocol):
    """What `ens.data.pairs.Patches` offers: any batch, rebuilt from its index."""

    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Progress:
    """State after a step: steps done of how many, loss of this step, updates skipped for NaN or Inf."""

    step: int
    steps: int
    loss: float
    skipped: int


@dataclass(frozen=True)
class Fit:
    """How a training ended: `step` is the one the weights are from, the best validated or else the last done.

    `psnr_db` is the validation of those weights and `psnr_db_start` that of the weights training began with; None
    without validation.
    """

    complete: bool
    step: int
    psnr_db: float | None
    psnr_db_start: float | None


@dataclass(frozen=True)
class _Best:
    """The best weights validated so far, on the CPU."""

    weights: dict[str, Tensor]
    step: int
    psnr_db: float
    psnr_db_start: float


@dataclass
class _Run:
    """All that a training changes, and so all that it must keep to be resumed."""

    network: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    done: int = 0
    skipped: int = 0
    best: _Best | None = None

    def state(self, recipe: Mapping[str, str]) -> dict[str, Any]:
        # The fields of _Best one by one: asdict would copy the weights once more.
        best = None if self.best is None else dict(vars(self.best))
        return {"recipe": dict(recipe), "done": self.done, "skipped": self.skipped, "best": best,
                "params": self.network.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def judge(self, validate: Callable[[nn.Module], float]) -> None:
        """Validate the averaged weights and keep them where they are the best so far; NaN never is."""
        with torch.no_grad():
            psnr_db = float(validate(self.ema.module.eval()))
        best = self.best or _Best({}, 0, math.nan, psnr_db)
        if not best.weights or psnr_db > best.psnr_db or (math.isnan(best.psnr_db) and not math.isnan(psnr_db)):
            weights = {name: value.detach().to("cpu", copy=True)
                       for name, value in self.ema.module.state_dict().items()}
            self.best = _Best(weights, self.done, psnr_db, best.psnr_db_start)

    def fit(self, *, complete: bool) -> Fit:
        best = self.best
        return (Fit(complete, self.done, None, None) if best is None
                else Fit(complete, best.step, best.psnr_db, best.psnr_db_start))


def train_network(network: nn.Module, patches: PatchSource, *, recipe: Recipe, checkpoint: Path, device: str = "cpu",
                  taught_by: nn.Module | None = None, identity: Mapping[str, str] | None = None,
                  validate: Callable[[nn.Module], float] | None = None, validate_every: int = 0,
                  on_progress: Callable[[Progress], None] | None = None,
                  should_stop: Callable[[], bool] | None = None, bf16: bool | None = None,
                  save_every: int = 200) -> Fit:
    """Train in place by a recipe.

    Afterwards `network` holds the averaged weights: the last, or with `validate` (network in evaluation mode -> PSNR in
    dB) the best of those seen at the start, every `validate_every` steps (0: ten times) and at the end. Every
    `save_every` steps, and when `should_stop` says so, all state goes to `checkpoint`; the same call goes on there and
    ends with the weights of an uninterrupted run. Under `torchrun` each process takes its share of the global batch and
    the first one validates. `identity` names what else must be the same on resume. Raises ValueError for a batch that
    the processes cannot share, ResumeMismatch, DamagedState, or TrainingError after ten losses that were not finite and
    where the weights or the validation are not finite in the end.
    """
    rank, world = _find_rank()
    shares = {phase.batch_size: share_batch(phase.batch_size, world) for phase in recipe.phases}
    device, every, steps = local_device(device), validate_every or max(1, recipe.steps // 10), recipe.steps
    known = {**recipe.describe(), "validated": f"every {every} steps" if validate else "never", **(identity or {})}
    rate_at = learning_rate(steps=steps, lr=recipe.lr, lr_final=recipe.lr_final, warmup_steps=recipe.warmup_steps)
    loss = l1_loss if taught_by is None else TaughtLoss(copy.deepcopy(taught_by).to(device),
                                                        weight=recipe.taught_weight)
    network.to(device).train()
    run = _Run(network, AveragedModel(network, multi_avg_fn=_average(recipe.ema_decay)),
               torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=WEIGHT_DECAY))
    _resume(checkpoint, known, run, device)
    wrapped = wrap_for_processes(network, device) if world > 1 else network
    use_bf16 = gains_from_bf16(device) if bf16 is None else bf16

    def judge() -> None:
        if validate is not None and rank == 0:
            run.judge(validate)

    if run.done == 0:
        judge()
    while run.done < steps:
        phase = [phase for phase in recipe.phases if phase.start <= run.done][-1]
        share = shares[phase.batch_size]
        pair, rate = patches.batch(run.done, share, phase.patch_px, first=rank * share), rate_at(run.done)
        value = _take_step(run, wrapped, loss, pair, rate, clip_norm=recipe.clip_norm, device=device, bf16=use_bf16)
        if run.skipped >= MAX_SKIPPED:
            kept = f"; the last state is kept in {checkpoint}" if checkpoint.exists() else ""
            raise TrainingError(f"the loss was not finite in {run.skipped} steps up to step {run.done}{kept}. "
                                f"{recipe.advice}")
        if on_progress is not None:
            on_progress(Progress(run.done, steps, value, run.skipped))
        if run.done % every == 0 or run.done == steps:
            judge()
        stop = should_stop is not None and should_stop()
        if rank == 0 and (run.done % save_every == 0 or run.done == steps or stop):
            state = run.state(known)
            save_state(checkpoint, state)
        if stop and run.done < steps:
            return run.fit(complete=False)
    fit = _finish(run, world)
    if not all(value.isfinite().all() for value in network.state_dict().values()) or (
            fit.psnr_db is not None and (math.isnan(fit.psnr_db) or fit.psnr_db == -math.inf)):
        raise TrainingError(f"the training ended in weights that give no finite output. {recipe.advice}")
    return fit


def _take_step(run: _Run, wrapped: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
               pair: tuple[Tensor, Tensor], rate: float, *, clip_norm: float, device: str, bf16: bool) -> float:
    """One update of network and average, skipped where the gradient is not finite; returns the loss."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    degraded, clean = pair
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
        value = loss(wrapped, degraded.to(device), clean.to(device))
    run.optimizer.zero_grad(set_to_none=True)
    value.backward()
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), clip_norm)
    # The norm is taken after DDP has averaged, so every process skips the same steps.
    if math.isfinite(float(norm)):
        run.optimizer.step()
        run.ema.update_parameters(run.network)
    else:
        run.skipped += 1
    run.done += 1
    return float(value.detach())


def _finish(run: _Run, world: int) -> Fit:
    """Give the network its final weights, in every process those of the first."""
    weights = run.best.weights if run.best else {k: v.cpu() for k, v in run.ema.module.state_dict().items()}
    result: list[Any] = [weights, run.fit(complete=True)]
    if world > 1:
        torch.distributed.broadcast_object_list(result, 0)
    run.network.load_state_dict(result[0])
    run.network.eval()
    return cast(Fit, result[1])


def _decay_at(updates: int, decay: float) -> float:
    """Decay of the average after so many updates, at most `decay`: (1 + n) / (10 + n), as TensorFlow warms it up.

    A constant 0.999 keeps 96 % of the first step's weights in a training of 40 steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    def update(averaged: Any, current: Any, updates: Any) -> None:
        get_ema_multi_avg_fn(_decay_at(int(updates), decay))(averaged, current, updates)

    return update


def start_processes(device: str) -> None:
    """Join the group that `torchrun` started this process in; does nothing without torchrun."""
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        own = torch.device(local_device(device))
        if own.type == "cuda" and own.index is not None:
            torch.cuda.set_device(own)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def local_device(device: str) -> str:
    """The device of this process: under `torchrun`, `cuda` is the GPU of its LOCAL_RANK; any other name stays."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def choose_device(name: str) -> str:
    """`auto` is the GPU where there is one; raises ValueError for another name, or a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device is auto, cpu, cuda or cuda:1, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} is asked for, but torch sees no GPU; use auto or cpu")
    return name


def wrap_for_processes(network: nn.Module, device: str) -> DistributedDataParallel:
    """The network with gradients averaged over all processes, bound to this process's GPU where it has one."""
    own = torch.device(device)
    return DistributedDataParallel(network, device_ids=[own] if own.type == "cuda" else None)


def _find_rank() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gains_from_bf16(device: str) -> bool:
    """Half the memory traffic pays on CUDA, and on a CPU only where it multiplies bfloat16 in hardware."""
    return device.startswith("cuda") or bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _resume(path: Path, recipe: Mapping[str, str], run: _Run, device: str) -> None:
    state = read_resume(path, TrainState, device=device)
    if state is None:
        return
    differences = [f"{key}: {state.recipe.get(key, 'absent')} there, {recipe.get(key, 'absent')} now"
                   for key in sorted({*state.recipe, *recipe}) if state.recipe.get(key) != recipe.get(key)]
    if differences:
        raise ResumeMismatch(f"{path} was written with another configuration ({'; '.join(differences)}). Go back to it "
                             "to continue, take another output folder, or begin this training again with --restart")
    with taken_up(path):
        run.network.load_state_dict(state.params)
        run.ema.load_state_dict(state.ema)
        run.optimizer.load_state_dict(state.optimizer)
    run.done, run.skipped = state.done, state.skipped
    if state.best is not None:
        weights = {name: value.cpu() for name, value in state.best.weights.items()}
        run.best = _Best(**{**dict(state.best), "weights": weights})
