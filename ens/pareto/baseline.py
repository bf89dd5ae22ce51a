"""What a front is compared with: the teacher and the degraded input, and what fine-tuning made of its members."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """PSNR of every validation image in dB, restored by the teacher and as it came; and the teacher's own objectives.

    `input_psnr_db` is empty where input and target differ in size (super-resolution). `values` are the teacher's
    parameters, multiply-adds, penalty and so on, by objective name.
    """

    teacher_psnr_db: tuple[float, ...]
    input_psnr_db: tuple[float, ...]
    values: Mapping[str, float]

    @property
    def teacher_mean_db(self) -> float:
        """Mean PSNR of the teacher, dB."""
        return statistics.fmean(self.teacher_psnr_db)

    @property
    def input_mean_db(self) -> float | None:
        """Mean PSNR of the degraded input, dB; None where it has none."""
        return statistics.fmean(self.input_psnr_db) if self.input_psnr_db else None

    @property
    def input_drop_db(self) -> float | None:
        """PSNR drop of leaving the input as it is, dB; None where it has none."""
        return None if self.input_mean_db is None else self.teacher_mean_db - self.input_mean_db


REPORT_KEYS = ("input", "before", "after", "teacher")
"""Whose mean PSNR a fine-tuning reports on images that chose nothing."""


@dataclass(frozen=True)
class Tuned:
    """Result of one fine-tuning: its recipe, PSNR of every validation image in dB, and mean PSNR in dB on the report
    images by `REPORT_KEYS` (empty where there are none).
    """

    recipe: str
    psnr_db: tuple[float, ...]
    report: Mapping[str, float]

    @property
    def mean_db(self) -> float:
        """Mean PSNR over the validation images, dB: what the best recipe is chosen by."""
        return statistics.fmean(self.psnr_db)
