"""Racing: what a rival dominates with confidence is not measured on the rest of the images.

Legend: R rivals, C costs, N images in their fixed order, k of them seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from ens.objectives import QUALITY
from ens.space import Measurement, format_genotype

CONFIDENCE = 0.999
"""Of one comparison. On 4,096 and on 34,560 measured genotypes it keeps the front and saves a third of the images."""
_PRIOR_IMAGES = 4
"""Degrees of freedom that the variance usual between front members counts for. Without, a few images that happen to
agree stopped a member: one or two of 143 were lost."""


class Race:
    """What genotypes have to beat: the front so far, every member measured on all N images.

    A member that is in none of `costs` dearer wins where the drops of PSNR on k images, paired by image, say that it
    is better on the mean of all N: Student's t with the correction for N − k images to come (Cochran 1977, eq. 2.20),
    its variance drawn towards the median of those between front members (the moderated t of Smyth 2004, section 3).
    """

    def __init__(self, front: Sequence[Measurement], costs: Sequence[str]) -> None:
        self._front = [one for one in front if np.isfinite(one.psnr_db).all()]
        self._costs = tuple(costs)
        self._paid = np.array([[one.values[name] for name in costs] for one in self._front]).reshape(-1, len(costs))
        self._psnr_db = np.array([one.psnr_db for one in self._front])
        self._prior = (_PRIOR_IMAGES, _usual_variance(self._psnr_db)) if len(self._front) > 1 else (0, 0.0)

    def judge(self, psnr_db: Sequence[float], values: Mapping[str, float]) -> tuple[float, str] | None:
        """Of a genotype's PSNR on the images so far and its costs: None while it may be on the front; else its drop in
        dB, estimated as the winner's and what it lacks of that on the same images, and a sentence that says so.
        """
        seen = len(psnr_db)
        able = np.flatnonzero((self._paid <= [values[name] for name in self._costs]).all(axis=1))
        if seen < 2 or not len(able) or seen >= self._psnr_db.shape[1] or not np.isfinite(psnr_db).all():
            return None
        count = self._psnr_db.shape[1]
        lacking = self._psnr_db[able, :seen] - np.asarray(psnr_db)
        means = lacking.mean(axis=1)
        (beside, usual), freedom = self._prior, seen - 1
        variances = (freedom * lacking.var(axis=1, ddof=1) + beside * usual) / (freedom + beside)
        errors = np.sqrt(variances * (1 - seen / count) / seen)
        sure = means - stdtrit(freedom + beside, CONFIDENCE) * errors
        best = int(sure.argmax())
        if sure[best] <= 0:
            return None
        winner = self._front[able[best]]
        return (winner.values[QUALITY] + float(means[best]),
                f"stopped after {seen} of {count} images: {format_genotype(winner.genotype)} is better")


def _usual_variance(psnr_db: NDArray[np.float64]) -> float:
    """Median over pairs of genotypes of the variance of their difference on an image, of PSNRs (R, N)."""
    first, second = np.triu_indices(len(psnr_db), 1)
    return float(np.median((psnr_db[first] - psnr_db[second]).var(axis=1, ddof=1)))
