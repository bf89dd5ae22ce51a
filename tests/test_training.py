"""The end-to-end loop: resume, refusal, bad losses, several processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.distill.losses import TaughtLoss, l1_loss, relative_error
from ens.distill.training import Phase, ResumeMismatch, TrainingError, learning_rate, train_network


class Ramp:
    """A patch source whose target is half its input: one weight solves it."""

    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
        clean = torch.stack([torch.rand(1, patch_px, patch_px, generator=torch.Generator().manual_seed(
            1000 * index + first + i)) for i in range(batch_size)])
        return 2 * clean, clean


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(1, 1, 1)


def fit(network: nn.Module, path: Path, *, steps: int = 12, stop_after: int | None = None, lr: float = 0.05,
        loss=l1_loss, seen: list[float] | None = None) -> bool:  # type: ignore[no-untyped-def]
    losses: list[float] = [] if seen is None else seen
    return train_network(network, Ramp(), checkpoint=path, loss=loss, phases=[Phase(0, 4, 4), Phase(6, 6, 2)],
                         steps=steps, lr=lr, clip_norm=1.0, ema_decay=0.5, bf16=False, save_every=5,
                         on_progress=lambda progress: losses.append(progress.loss),
                         should_stop=lambda: stop_after is not None and len(losses) >= stop_after)


@pytest.mark.parametrize("stop_after", [1, 5, 7, 11])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, stop_after: int) -> None:
    whole, halves = conv(), conv()
    assert fit(whole, tmp_path / "whole.pt")
    assert not fit(halves, tmp_path / "halves.pt", stop_after=stop_after)
    halves = conv()
    rest: list[float] = []
    assert fit(halves, tmp_path / "halves.pt", seen=rest)
    assert len(rest) == 12 - stop_after
    for ours, theirs in zip(halves.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_learns_what_one_weight_can_learn(tmp_path: Path) -> None:
    network = conv()
    seen: list[float] = []
    fit(network, tmp_path / "t.pt", steps=300, seen=seen)
    assert seen[-1] < seen[0] / 10
    assert float(network.weight) == pytest.approx(0.5, abs=0.05)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    fit(conv(), tmp_path / "t.pt", stop_after=2)
    with pytest.raises(ResumeMismatch, match=r"lr: 0.05 .* there, 0.01 .* now"):
        fit(conv(), tmp_path / "t.pt", lr=0.01)


def test_bad_losses_are_skipped_and_ten_end_the_training(tmp_path: Path) -> None:
    calls = iter(range(100))

    def sometimes_nan(network: nn.Module, degraded: Tensor, clean: Tensor) -> Tensor:
        factor = float("nan") if next(calls) % 4 == 0 else 1.0
        return F.l1_loss(network(degraded), clean) * factor

    network = conv()
    assert fit(network, tmp_path / "t.pt", loss=sometimes_nan)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    with pytest.raises(TrainingError, match=r"10 steps.*learning rate"):
        fit(conv(), tmp_path / "bad.pt", steps=40,
            loss=lambda network, degraded, clean: F.l1_loss(network(degraded), clean) * float("nan"))


def test_learning_rate_warms_up_then_follows_a_cosine() -> None:
    rates = [learning_rate(step, steps=110, lr=1.0, lr_final=0.0, warmup_steps=10) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0.0)
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates[10:]))


def test_relative_error_is_one_for_an_identity_and_zero_for_the_teacher() -> None:
    given, wanted = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3)
    assert float(relative_error(given, wanted, given)) == pytest.approx(1.0)
    assert float(relative_error(wanted, wanted, given)) == 0.0


def test_taught_loss_mixes_both_targets_by_its_weight() -> None:
    degraded, clean = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 1.0)

    class Add(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return x + self.value

    loss = TaughtLoss(Add(0.5), weight=0.25)
    assert float(loss(Add(0.0), degraded, clean)) == pytest.approx(0.75 * 1.0 + 0.25 * 0.5)
    with pytest.raises(ValueError, match="0 to 1"):
        TaughtLoss(Add(0.5), weight=1.5)


WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
import torch.distributed as dist
from test_training import Ramp, conv
from ens.distill.losses import l1_loss
from ens.distill.training import Phase, start_processes, train_network
torch.set_num_threads(1)
start_processes("cpu")
network = conv()
train_network(network, Ramp(), checkpoint=Path(sys.argv[2]), loss=l1_loss, phases=[Phase(0, 4, 4)], steps=8, lr=0.05,
              clip_norm=1.0, ema_decay=0.5, bf16=False)
if dist.get_rank() == 0:
    torch.save(network.state_dict(), sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes_train_like_one_at_the_same_global_batch(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
                    str(Path(__file__).parent), str(tmp_path / "two.pt"), str(tmp_path / "two.pth")],
                   check=True, capture_output=True, timeout=120)
    two = torch.load(tmp_path / "two.pth", weights_only=True)
    one = conv()
    train_network(one, Ramp(), checkpoint=tmp_path / "one.pt", loss=l1_loss, phases=[Phase(0, 4, 4)], steps=8, lr=0.05,
                  clip_norm=1.0, ema_decay=0.5, bf16=False)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7)
