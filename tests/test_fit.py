"""The end-to-end loop: the weights it ends with, resume, refusal, bad losses, several processes."""

from __future__ import annotations

import io
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ens.distill import fit as fit_module
from ens.distill.fit import Fit, TrainingError, local_device, start_processes, train_network
from ens.distill.losses import TaughtLoss, l1_loss, relative_error
from ens.distill.recipe import Phase, Recipe, learning_rate, share_batch
from ens.distill.resume import DamagedState, ResumeMismatch


class Ramp:
    """A patch source whose target is half its input: one weight solves it."""

    def batch(self, index: int, batch_size: int, patch_px: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
        clean = torch.stack([torch.rand(1, patch_px, patch_px, generator=torch.Generator().manual_seed(
            1000 * index + first + i)) for i in range(batch_size)])
        return 2 * clean, clean


def conv(weight: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 1)
    if weight is not None:
        nn.init.constant_(network.weight, weight)
    return network


def fit(network: nn.Module, path: Path, *, steps: int = 12, stop_after: int | None = None, lr: float = 0.05,
        loss=l1_loss, seen: list[float] | None = None,  # type: ignore[no-untyped-def]
        validate: Callable[[nn.Module], float] | None = None) -> Fit:
    losses: list[float] = [] if seen is None else seen
    recipe = Recipe((Phase(0, 4, 4), Phase(6, 6, 2)), steps, lr=lr, clip_norm=1.0, ema_decay=0.5)
    with mock.patch.object(fit_module, "l1_loss", loss):
        return train_network(network, Ramp(), recipe=recipe, checkpoint=path, bf16=False, save_every=5,
                             validate=validate, validate_every=3,
                             on_progress=lambda progress: losses.append(progress.loss),
                             should_stop=lambda: stop_after is not None and len(losses) >= stop_after)


def error(network: nn.Module) -> float:
    degraded, clean = Ramp().batch(10_000, 16, 8)
    with torch.no_grad():
        return float(l1_loss(network, degraded, clean))


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


class Bowl:
    """A validation that is best at a weight the training passes on its way: neither start nor end wins."""

    def __init__(self) -> None:
        self.seen: dict[float, float] = {}

    def __call__(self, network: nn.Module) -> float:
        assert not network.training
        weight = float(network.weight.detach())  # type: ignore[arg-type]
        self.seen[weight] = 30 - abs(weight + 0.3)
        return self.seen[weight]


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("stop_after", [1, 5, 7, 11])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, stop_after: int, validated: bool) -> None:
    validate = Bowl() if validated else None
    whole, halves = conv(-0.5), conv(-0.5)
    expected = fit(whole, tmp_path / "whole.pt", validate=validate)
    assert expected.complete and (not validated or 0 < expected.step < 12)
    assert not fit(halves, tmp_path / "halves.pt", stop_after=stop_after, validate=validate).complete
    halves = conv()
    rest: list[float] = []
    assert fit(halves, tmp_path / "halves.pt", seen=rest, validate=validate) == expected
    assert len(rest) == 12 - stop_after and same(halves, whole)


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, killed = conv(-0.5), conv(-0.5)
    expected = fit(whole, tmp_path / "whole.pt", validate=Bowl())
    calls: list[float] = []

    def dies(network: nn.Module, degraded: Tensor, clean: Tensor) -> Tensor:
        if len(calls) == 8:
            raise KeyboardInterrupt
        return l1_loss(network, degraded, clean)

    with pytest.raises(KeyboardInterrupt):
        fit(killed, tmp_path / "killed.pt", loss=dies, seen=calls, validate=Bowl())
    killed = conv()
    assert fit(killed, tmp_path / "killed.pt", validate=Bowl()) == expected and same(killed, whole)


def test_training_learns_what_one_weight_can_learn(tmp_path: Path) -> None:
    network = conv()
    seen: list[float] = []
    fit(network, tmp_path / "t.pt", steps=300, seen=seen)
    assert seen[-1] < seen[0] / 10
    assert float(network.weight.detach()) == pytest.approx(0.5, abs=0.05)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    fit(conv(), tmp_path / "t.pt", stop_after=2)
    with pytest.raises(ResumeMismatch, match=r"lr: 0\.05 there, 0\.01 now"):
        fit(conv(), tmp_path / "t.pt", lr=0.01)


def test_bad_losses_are_skipped_and_ten_end_the_training(tmp_path: Path) -> None:
    calls = iter(range(100))

    def sometimes_nan(network: nn.Module, degraded: Tensor, clean: Tensor) -> Tensor:
        factor = float("nan") if next(calls) % 4 == 0 else 1.0
        return F.l1_loss(network(degraded), clean) * factor

    network = conv()
    assert fit(network, tmp_path / "t.pt", loss=sometimes_nan).complete
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    with pytest.raises(TrainingError, match=r"10 steps up to step 10; the last state is kept in .*bad\.pt"):
        fit(conv(), tmp_path / "bad.pt", steps=40, loss=nan_loss)


def nan_loss(network: nn.Module, degraded: Tensor, clean: Tensor) -> Tensor:
    return F.l1_loss(network(degraded), clean) * float("nan")


def test_a_state_is_named_only_where_there_is_one(tmp_path: Path) -> None:
    recipe = Recipe((Phase(0, 4, 4),), 40)
    with mock.patch.object(fit_module, "l1_loss", nan_loss), pytest.raises(
            TrainingError, match=r"up to step 10\. Lower the learning rate .0\.0003.* --restart"):
        train_network(conv(), Ramp(), recipe=recipe, checkpoint=tmp_path / "t.pt", bf16=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("figure", [math.nan, -math.inf])
def test_a_training_that_ends_in_nan_is_an_error_and_no_result(tmp_path: Path, figure: float) -> None:
    with pytest.raises(TrainingError, match=r"give no finite output\. Lower the learning rate"):
        fit(conv(), tmp_path / "t.pt", validate=lambda network: figure)
    with pytest.raises(TrainingError, match="give no finite output"):
        fit(conv(math.inf), tmp_path / "u.pt", steps=1)


def test_a_damaged_state_is_named_and_told_to_begin_again(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    fit(conv(), path, stop_after=6, validate=Bowl())
    whole, state, rng = path.read_bytes(), torch.load(path, weights_only=True), np.random.default_rng(0)
    damaged = [b"", b"PK", whole[:100], whole[:-100], whole[len(whole) // 2:], b"<html>" * 100]
    for _ in range(40):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), 200):
            data[position] = rng.integers(256)
        damaged.append(bytes(data))
    for changed in ({"done": -1}, {"done": "six"}, {"params": {}}, {"ema": [1]}, {"best": {"step": 1}}, {"recipe": 3},
                    {"optimizer": {"state": 1}}, {"params": {"weight": torch.zeros(3), "bias": torch.zeros(1)}}):
        buffer = io.BytesIO()
        torch.save({**state, **changed}, buffer)
        damaged.append(buffer.getvalue())
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        try:
            fit(conv(), path, validate=Bowl())
        except DamagedState as error:
            assert str(path) in str(error) and "--restart begins this training again" in str(error)
        except (ResumeMismatch, TrainingError):
            pass  # a sound file that says something else
        else:
            assert 6 <= number < 46, "some bytes of weights and of padding may change without a trace"


def test_the_best_weights_seen_are_kept_with_their_step(tmp_path: Path) -> None:
    validate, network = Bowl(), conv(-0.5)
    result = train_network(network, Ramp(), recipe=Recipe((Phase(0, 4, 4),), 30, lr=0.05, clip_norm=1.0),
                           checkpoint=tmp_path / "t.pt", bf16=False, validate=validate, validate_every=7)
    said = list(zip([0, 7, 14, 21, 28, 30], validate.seen.values(), strict=True))
    step, psnr_db = max(said, key=lambda entry: entry[1])
    assert 0 < step < 30 and result == Fit(True, step, psnr_db, said[0][1])
    assert validate.seen[float(network.weight.detach())] == psnr_db and not network.training  # type: ignore[arg-type]


def test_a_training_that_only_makes_worse_ends_with_the_weights_it_began_with(tmp_path: Path) -> None:
    network, start = conv(0.5), conv(0.5)
    result = fit(network, tmp_path / "t.pt", lr=5.0, validate=lambda network: -error(network))
    assert same(network, start)
    assert result == Fit(True, 0, -error(start), -error(start))


@pytest.mark.parametrize(("figures", "step"), [
    ([20.0, math.nan, math.nan, math.nan, math.nan], 0), ([math.nan, math.nan, 3.0, math.nan, 2.0], 6),
    ([20.0, 20.0, 20.0, 20.0, 20.0], 0), ([-math.inf, math.nan, math.inf, 9.0, math.nan], 6),
])
def test_nan_never_wins_and_a_tie_keeps_the_earlier_weights(tmp_path: Path, figures: list[float], step: int) -> None:
    coming = iter(figures)
    result = fit(conv(), tmp_path / "t.pt", validate=lambda network: next(coming))
    assert result.step == step and result.psnr_db is not None and next(coming, None) is None
    assert result.psnr_db == figures[step // 3] or math.isnan(figures[step // 3])


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    assert fit(conv(), tmp_path / "t.pt") == Fit(True, 12, None, None)


def test_no_steps_at_all_leave_the_network_as_it_was(tmp_path: Path) -> None:
    network = conv()
    assert fit(network, tmp_path / "t.pt", steps=0, validate=lambda network: 7.0) == Fit(True, 0, 7.0, 7.0)
    assert same(network, conv())


def train_recorded(path: Path, *, steps: int, ema_decay: float, lr: float) -> tuple[nn.Module, list[Tensor]]:
    """A network that starts near its solution, fine-tuned, and its weights after every step."""
    network, raw = conv(1.0), []
    train_network(network, Ramp(), recipe=Recipe((Phase(0, 4, 4),), steps, lr=lr, clip_norm=1.0, ema_decay=ema_decay),
                  checkpoint=path, bf16=False,
                  on_progress=lambda progress: raw.append(parameters(network).double()))
    return network, raw


def parameters(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def test_the_average_is_the_closed_form_sum_of_a_decay_that_warms_up(tmp_path: Path) -> None:
    network, raw = train_recorded(tmp_path / "t.pt", steps=30, ema_decay=0.6, lr=0.02)
    # The first update is taken whole; the one after n updates keeps min(0.6, (1 + n) / (10 + n)) of the average.
    kept = [0.0, *(min(0.6, (1 + n) / (10 + n)) for n in range(1, 30))]
    shares = [(1 - kept[k]) * math.prod(kept[k + 1:]) for k in range(30)]
    assert sum(shares) == pytest.approx(1.0)
    expected = sum(share * weights for share, weights in zip(shares, raw, strict=True))
    torch.testing.assert_close(parameters(network).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("steps", "lr"), [(40, 0.05), (400, 0.005)])
def test_a_short_fine_tuning_helps_where_a_constant_decay_cancels_it(tmp_path: Path, steps: int, lr: float) -> None:
    network, raw = train_recorded(tmp_path / "t.pt", steps=steps, ema_decay=0.999, lr=lr)
    constant, before = raw[0], error(conv(1.0))
    for weights in raw[1:]:
        constant = 0.999 * constant + 0.001 * weights
    cancelled = conv()
    nn.utils.vector_to_parameters(constant.float(), cancelled.parameters())
    assert error(network) < 0.25 * before
    assert error(cancelled) > 0.65 * before


def test_learning_rate_warms_up_then_follows_a_cosine() -> None:
    rates = list(map(learning_rate(steps=110, lr=1.0, lr_final=0.0, warmup_steps=10), range(111)))
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
from test_fit import Bowl, Ramp, conv
from ens.distill.fit import start_processes, train_network
from ens.distill.recipe import Phase, Recipe
torch.set_num_threads(1)
start_processes("cpu")
def alone(network):
    assert dist.get_rank() == 0
    return Bowl()(network)
out = Path(sys.argv[2])
network = conv(-0.5)
network.register_buffer("own", torch.tensor(float(dist.get_rank())))
def recipe(steps, *phases):
    return Recipe(phases, steps, lr=0.05, clip_norm=1.0, ema_decay=0.5)
last = train_network(network, Ramp(), recipe=recipe(8, Phase(0, 4, 4)), checkpoint=out / "two.pt", bf16=False)
torch.save(network.state_dict(), out / f"last{dist.get_rank()}.pth")
network = conv(-0.5)
network.register_buffer("own", torch.tensor(float(dist.get_rank())))
best = train_network(network, Ramp(), recipe=recipe(24, Phase(0, 4, 4)), checkpoint=out / "best.pt", validate=alone,
                     validate_every=2, bf16=False)
torch.save({**network.state_dict(), "step": best.step}, out / f"best{dist.get_rank()}.pth")
try:
    train_network(conv(), Ramp(), recipe=recipe(8, Phase(0, 4, 4), Phase(4, 4, 5)), checkpoint=out / "odd.pt")
except ValueError as error:
    (out / f"refused{dist.get_rank()}").write_text(str(error), encoding="utf-8")
dist.destroy_process_group()
"""


def test_two_processes_train_like_one_at_the_same_global_batch(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
                    str(Path(__file__).parent), str(tmp_path)], check=True, capture_output=True, timeout=120,
                   # The workers import the package that is tested, not another one that may be installed.
                   env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    for steps, name in ((8, "last"), (24, "best")):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pth", weights_only=True) for rank in (0, 1))
        one = conv(-0.5)
        recipe = Recipe((Phase(0, 4, 4),), steps, lr=0.05, clip_norm=1.0, ema_decay=0.5)
        result = train_network(one, Ramp(), recipe=recipe, checkpoint=tmp_path / f"{name}-one.pt", bf16=False,
                               validate=Bowl() if name == "best" else None, validate_every=2)
        assert first.pop("step", 8) == second.pop("step", 8) == result.step
        for key, value in one.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(first[key], second[key]) for key in first) and 0 < result.step < 24
    for rank in (0, 1):
        assert "batch of 5 cannot be shared by 2 processes" in (tmp_path / f"refused{rank}").read_text(encoding="utf-8")


def test_a_batch_the_processes_cannot_share_is_refused_with_the_next_sizes() -> None:
    assert share_batch(6, 3) == 2 and share_batch(8, 1) == 8
    with pytest.raises(ValueError, match="batch of 8 cannot be shared by 3 processes; take 6 or 9"):
        share_batch(8, 3)
    with pytest.raises(ValueError, match="batch of 2 cannot be shared by 3 processes; take 3"):
        share_batch(2, 3)


def test_each_process_takes_its_own_gpu_before_it_joins_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device("cuda") == "cuda"
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert [local_device(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:1", "cpu"]
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", done.append)
    start_processes("cuda")
    assert done == [torch.device("cuda:2"), "nccl"]
    monkeypatch.setattr(fit_module, "DistributedDataParallel", lambda network, device_ids: device_ids)
    assert fit_module.wrap_for_processes(conv(), "cuda:2") == [torch.device("cuda:2")]
    assert fit_module.wrap_for_processes(conv(), "cpu") is None


def test_a_recipe_is_named_by_everything_it_says() -> None:
    recipe = Recipe((Phase(0, 64, 8),), 100)
    others = [Recipe((Phase(0, 64, 8),), 101), Recipe((Phase(0, 64, 4),), 100), Recipe((Phase(0, 64, 8),), 100, seed=1),
              Recipe((Phase(0, 64, 8),), 100, taught_by="x.pth")]
    assert len({recipe.key, *(other.key for other in others)}) == 5
    assert recipe.key == Recipe((Phase(0, 64, 8),), 100).key and len(recipe.key) == 8


def test_a_batch_that_processes_cannot_share_is_found_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="take 6 or 9"):
        Recipe((Phase(0, 64, 8),), 100).check_processes()


def test_the_teacher_that_was_given_is_not_moved_or_changed(tmp_path: Path) -> None:
    teacher, network = conv(0.5).train(), conv(1.0)
    recipe = Recipe((Phase(0, 4, 4),), 40, lr=0.05, clip_norm=1.0, taught_weight=1.0)
    train_network(network, Ramp(), recipe=recipe, checkpoint=tmp_path / "t.pt", taught_by=teacher, bf16=False)
    assert teacher.training and same(teacher, conv(0.5))
    assert abs(network.weight.item() - 0.5) < 0.3  # type: ignore[arg-type]
