"""What a front is compared with: the teacher and the degraded input, and what fine-tuning made of its members."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ens.objectives import count_perfect, mean_psnr_db, psnr_drop_db


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
        return mean_psnr_db(self.teacher_psnr_db)

    @property
    def input_mean_db(self) -> float | None:
        """Mean PSNR of the degraded input, dB; None where it has none."""
        return mean_psnr_db(self.input_psnr_db) if self.input_psnr_db else None

    @property
    def input_drop_db(self) -> float | None:
        """PSNR drop of leaving the input as it is, dB; None where it has none."""
        if not self.input_psnr_db:
            return None
        return psnr_drop_db(teacher_psnr_db=self.teacher_psnr_db, psnr_db=self.input_psnr_db)

    @property
    def left_out(self) -> str:
        """A sentence on the images that means leave out because they are perfect; "" where there are none."""
        count = count_perfect(self.teacher_psnr_db, self.input_psnr_db)
        return (f"{count} of {len(self.teacher_psnr_db)} validation images are left out of means: the teacher's output "
                "or the degraded input equals the target.") if count else ""

    def describe(self) -> str:
        """What teacher and input reach, in a sentence's words."""
        degraded = "" if self.input_mean_db is None else f", the degraded input has {self.input_mean_db:.2f} dB"
        return f"the teacher restores the validation images to {self.teacher_mean_db:.2f} dB{degraded}"

    def check(self) -> Baseline:
        """Itself; raises ValueError where nothing can be measured against this teacher: before time is spent on it."""
        broken = sum(math.isnan(value) or value == -math.inf for value in self.teacher_psnr_db)
        if broken:
            raise ValueError(f"the teacher's PSNR is no number on {broken} of {len(self.teacher_psnr_db)} validation "
                             "images: its weights hold NaN or overflow. Give another teacher, or train it with a lower "
                             "learning rate (train.lr)")
        if self.teacher_mean_db == math.inf:
            raise ValueError(f"the teacher restores all {len(self.teacher_psnr_db)} validation images perfectly, so "
                             "nothing can be measured on them. Are degraded and clean images the same files?")
        if self.input_drop_db is not None and not self.input_drop_db > 0:
            raise ValueError(f"{self.describe()}: there is nothing to imitate. Train it longer (train.steps, where "
                             "this study trains it), or give another")
        return self


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
        return mean_psnr_db(self.psnr_db)
