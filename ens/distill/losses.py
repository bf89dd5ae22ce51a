"""Losses of distillation, training and fine-tuning. Shapes: (B, C, H, W) throughout; every loss is a scalar."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def relative_error(output: Tensor, wanted: Tensor, given: Tensor) -> Tensor:
    """‖output − wanted‖² / ‖wanted − given‖²: squared error relative to the slot's own update; 1 for an identity."""
    update = (wanted - given).square().sum()
    return (output - wanted).square().sum() / update.clamp_min(torch.finfo(torch.float32).tiny)


def l1_loss(network: nn.Module, degraded: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute error of the restored image, the loss Restormer is trained with."""
    return F.l1_loss(network(degraded).float(), clean)


class TaughtLoss:
    """L1 to the clean image plus `weight` times L1 to the teacher's output (DVMSR's output distillation).

    The sum of both weights is one: (1 − weight)·L1(clean) + weight·L1(teacher).
    """

    def __init__(self, teacher: nn.Module, *, weight: float) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of the teacher's output goes from 0 to 1, got {weight}")
        self.teacher = teacher.eval()
        self.weight = weight

    def __call__(self, network: nn.Module, degraded: Tensor, clean: Tensor) -> Tensor:
        output = network(degraded).float()
        with torch.no_grad():
            taught = self.teacher(degraded).float()
        if taught.shape != output.shape:
            raise ValueError(f"the teacher returns {tuple(taught.shape)}, the network {tuple(output.shape)}; both must "
                             "restore at the same scale with the same channels")
        return (1 - self.weight) * F.l1_loss(output, clean) + self.weight * F.l1_loss(output, taught)
