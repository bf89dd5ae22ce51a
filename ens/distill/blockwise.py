"""Feature-wise distillation (ENS, section 3): every surrogate of every slot learns from one teacher pass a batch.

Shapes: features (B, C, H, W) of a slot's level.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ens.data.pairs import derive_seed
from ens.distill.fit import MAX_SKIPPED, PatchSource, gains_from_bf16
from ens.distill.library import Library
from ens.distill.losses import relative_error
from ens.distill.recipe import learning_rate
from ens.distill.resume import DistillState, PupilState, ResumeMismatch, read_resume, taken_up
from ens.networks.checkpoints import remove_state, save_state
from ens.networks.steps import Network, SlotSpec, create_filling, pad_to_multiple
from ens.space import Choice

_UNSEEN_BATCHES = 4


@dataclass
class _Pupil:
    """A surrogate in training, with its own optimiser."""

    spec: SlotSpec
    choice: Choice
    blocks: nn.Sequential
    optimizer: torch.optim.Optimizer | None
    skipped: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.spec.name}/{self.choice.label}"


def distill_library(teacher: Network, library: Library, patches: PatchSource, jobs: Sequence[tuple[SlotSpec, Choice]],
                    *, steps: int, batch_size: int, patch_px: int,
                    lr: float = 2e-3, group_size: int = 64, seed: int = 0, device: str = "cpu",
                    bf16: bool | None = None, save_every: int = 100,
                    on_progress: Callable[[int, int, float], None] | None = None,
                    should_stop: Callable[[], bool] | None = None) -> bool:
    """Train what the library still lacks of `jobs` (slot, choice) and store it; True when all of it is there.

    Works in groups of `group_size` surrogates, so that memory stays bounded; a group's state is kept beside the
    manifest every `save_every` steps and taken up again by the same call. A surrogate whose loss was not finite ten
    times is marked failed and the others go on. `on_progress` gets (steps done, steps in all, mean relative error).
    """
    teacher, checkpoint = copy.deepcopy(teacher).to(device), library.root / "training.pt"
    todo = [(spec, choice) for spec, choice in jobs if not library.has(spec.name, choice)]
    groups = _form_groups(todo, checkpoint, group_size)
    use_bf16 = gains_from_bf16(device) if bf16 is None else bf16
    rate_at = learning_rate(steps=steps, lr=lr, lr_final=lr * 1e-3, warmup_steps=min(50, steps // 10))
    for number, group in enumerate(groups):
        pupils = [_create_pupil(teacher, spec, choice, lr=lr, seed=seed, device=device) for spec, choice in group]
        recipe = f"{steps} steps of {batch_size}×{patch_px}², lr {lr}, seed {seed}, teacher {library.teacher_sha256}"
        done = _load_group(checkpoint, recipe, pupils)
        while done < steps:
            degraded, _ = patches.batch(done, batch_size, patch_px)
            for pupil, given, wanted in _features(teacher, pupils, degraded, device=device, bf16=use_bf16):
                _train_step(pupil, given, wanted, rate_at(done), bf16=use_bf16)
            done += 1
            if on_progress is not None:
                recent = [pupil.losses[-1] for pupil in pupils if pupil.losses]
                on_progress(number * steps + done, len(groups) * steps, sum(recent) / max(1, len(recent)))
            stop = should_stop is not None and should_stop()
            if done % save_every == 0 or stop or done == steps:
                _save_group(checkpoint, recipe, done, pupils)
            if stop:
                return False
        errors = _measure_alignment(teacher, pupils, patches, first=steps, batch_size=batch_size, patch_px=patch_px,
                                    device=device)
        for pupil in pupils:
            failed = "" if math.isfinite(errors[pupil.key]) else "its output is not finite"
            if pupil.skipped >= MAX_SKIPPED:
                failed = f"the loss was not finite {pupil.skipped} times; a lower learning rate than {lr} may help"
            library.store(pupil.spec, pupil.choice, pupil.blocks.to("cpu"), alignment_error=errors[pupil.key],
                          steps=steps, failed=failed)
        remove_state(checkpoint)
    return True


def _create_pupil(teacher: Network, spec: SlotSpec, choice: Choice, *, lr: float, seed: int, device: str) -> _Pupil:
    blocks = create_surrogate(teacher, spec, choice, seed=seed).to(device).train()
    parameters = list(blocks.parameters())
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4) if parameters else None
    return _Pupil(spec, choice, blocks, optimizer)


def create_surrogate(teacher: Network, spec: SlotSpec, choice: Choice, *, seed: int) -> nn.Sequential:
    """A surrogate before distillation; one of the teacher's own family starts from evenly spaced teacher blocks."""
    with torch.random.fork_rng(devices=[]):
        # Every surrogate starts from numbers of its own, the same whatever else is distilled beside it.
        torch.manual_seed(derive_seed(seed, spec.name, choice.label))
        blocks = create_filling(spec, choice)
    if choice.family == spec.family:
        original = list(teacher.content(spec.name).children()) if spec.depth > 1 else []
        for i, block in enumerate(blocks if len(original) >= choice.depth else []):
            source = copy.deepcopy(original[i * len(original) // choice.depth].state_dict())
            if {name: value.shape for name, value in source.items()} == {
                    name: value.shape for name, value in block.state_dict().items()}:
                block.load_state_dict(source)
    return blocks


def _features(teacher: Network, pupils: Sequence[_Pupil], degraded: Tensor, *, device: str,
              bf16: bool) -> Iterator[tuple[_Pupil, Tensor, Tensor]]:
    """Every pupil with its slot's input and output; one teacher run, features waiting in float16."""
    names = list(dict.fromkeys(pupil.spec.name for pupil in pupils))
    image = pad_to_multiple(degraded.to(device), teacher.size_multiple)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
        features = {name: (given.half(), wanted.half())
                    for name, (given, wanted) in teacher.capture(image, names).items()}
    for pupil in pupils:
        given, wanted = features[pupil.spec.name]
        yield pupil, given.float(), wanted.float()


def _train_step(pupil: _Pupil, given: Tensor, wanted: Tensor, rate: float, *, bf16: bool) -> None:
    if pupil.optimizer is None or pupil.skipped >= MAX_SKIPPED:
        return
    for group in pupil.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(given.device.type, torch.bfloat16, enabled=bf16):
        output = pupil.blocks(given)
    loss = relative_error(output.float(), wanted, given)
    pupil.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(pupil.blocks.parameters(), 1.0)
    if math.isfinite(float(norm)):
        pupil.optimizer.step()
        pupil.losses = [float(loss.detach())]
    else:
        pupil.skipped += 1


def _measure_alignment(teacher: Network, pupils: Sequence[_Pupil], patches: PatchSource, *, first: int,
                       batch_size: int, patch_px: int, device: str) -> dict[str, float]:
    """Mean relative squared error over batches that training has not seen, in full precision."""
    errors = {pupil.key: 0.0 for pupil in pupils}
    with torch.no_grad():
        for index in range(first, first + _UNSEEN_BATCHES):
            degraded, _ = patches.batch(index, batch_size, patch_px)
            for pupil, given, wanted in _features(teacher, pupils, degraded, device=device, bf16=False):
                pupil.blocks.eval()
                errors[pupil.key] += float(relative_error(pupil.blocks(given), wanted, given)) / _UNSEEN_BATCHES
    return errors


def _save_group(path: Path, recipe: str, done: int, pupils: Sequence[_Pupil]) -> None:
    save_state(path, {"recipe": recipe, "done": done, "pupils": {pupil.key: {
        "params": pupil.blocks.state_dict(), "skipped": pupil.skipped,
        "optimizer": pupil.optimizer.state_dict() if pupil.optimizer else {}} for pupil in pupils}})


def _load_group(path: Path, recipe: str, pupils: Sequence[_Pupil]) -> int:
    state = read_resume(path, DistillState)
    if state is None:
        return 0
    if state.recipe != recipe:
        raise ResumeMismatch(f"{path} holds an unfinished distillation of another configuration: {state.recipe}; now "
                             f"{recipe}. Go back to it to finish it, or begin again with --restart")
    with taken_up(path):
        for pupil in pupils:
            entry: PupilState = state.pupils[pupil.key]
            pupil.blocks.load_state_dict(entry.params)
            pupil.skipped = entry.skipped
            if pupil.optimizer is not None:
                pupil.optimizer.load_state_dict(entry.optimizer)
    return state.done


def _form_groups(todo: Sequence[tuple[SlotSpec, Choice]], checkpoint: Path,
                 size: int) -> list[list[tuple[SlotSpec, Choice]]]:
    """Groups of `size`; first, together, what is left of a group that was interrupted, also while it was stored.

    A state of which nothing is left to do is removed: its process was killed after the last surrogate was stored.
    """
    state = read_resume(checkpoint, DistillState)
    begun = [job for job in todo if state is not None and f"{job[0].name}/{job[1].label}" in state.pupils]
    if not begun:
        remove_state(checkpoint)
    rest = [job for job in todo if job not in begun]
    return [*([begun] if begun else []), *(list(rest[i:i + size]) for i in range(0, len(rest), size))]
