"""A predictor of one value of genotypes: what each choice does alone, in pairs and in triples, and how sure that is.

Legend: N genotypes measured, M genotypes asked about, S slots, D choices of all slots together. What is learned is kept
as logarithms, `theta`: S variances, the odds that choices of like costs are alike, the weights of pairs and of triples,
and the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from ens.objectives import QUALITY
from ens.space import Genotype, Measurement, Tally

Array = NDArray[np.float64]
_START, _SPREAD = -1.0, 1.5
"""Logarithms of a slot's variance before anything is measured (of values scaled to variance 1): mean, deviation."""
_OTHERS = (0.0, 0.0, 0.0, -4.0)
"""Of the odds, the weights of pairs and of triples, and the noise; their deviation is 2."""
_FURTHEST = 5.0
"""Deviations from those means at which learning stops, well before numbers overflow."""
_BENDS, _BEND_SPREAD = (1.0, 0.3, 3.0), 1.5
"""Scales of the warp that are tried, as multiples of the median's distance, and the deviation of their logarithm."""
_REACH = 0.3
"""Difference of costs, as a share of what a slot's choices span, over which likeness falls to 1/e."""
_ITERATIONS, _FURTHER = 30, 10
"""With the first bend, and with each of the others, which begin at what the one before ended with."""
_GROWTH = 1.15
"""From one learning to the next. Variances are learned of that many genotypes and no more, so a prediction
follows from what was measured, in order, and not from how often it was asked for."""
_MOST_LEARNED = 512
"""Genotypes that variances are learned of, at most: more would take minutes and tell nothing new of a number a slot."""
_JITTER = 1e-8
_FEWEST, _MOST = 20, 400
"""Measurements that a predictor is judged by."""
_NOT_ADDITIVE = 1.25
"""Error of sums over slots, relative to the predictor's, from which on a space does not count as additive."""
_WORTH_SAYING = 0.2
"""And relative to the deviation of what is measured."""


class Encoding:
    """Genotypes as rows of zeros and ones, one column for every choice of every slot."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.slots = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self._first = np.cumsum([0, *self.sizes[:-1]])

    def encode(self, genotypes: Sequence[Genotype]) -> Array:
        """(N, D)"""
        rows = np.zeros((len(genotypes), len(self.slots)))
        if len(genotypes):
            rows[np.arange(len(genotypes))[:, None], np.array(genotypes, np.int64) + self._first] = 1.0
        return rows


def liken(sizes: Sequence[int], costs: Sequence[Tally]) -> Array:
    """(D, D): from 0 to 1, how like the costs of two choices of one slot are; with none, a choice is like itself alone.

    What costs as much often does as much: conv×1 and rep×1 are surrogates of one size.
    """
    slots = Encoding(sizes).slots
    near = (slots[:, None] == slots).astype(float)
    for row in (np.concatenate(tally.entries) for tally in costs):
        spans = np.array([np.ptp(row[slots == slot]) or 1.0 for slot in range(len(sizes))])[slots]
        near *= np.exp(-np.abs(row[:, None] - row) / (_REACH * spans))
    return near if costs else np.eye(len(slots))


class Warp:
    """y -> s·log(1 + (y − least)/s): what lies orders of magnitude above the best counts little.

    Values of genotypes have a long upper tail, and only their lower end matters to a front. s is `bend` times the
    median's distance from the least.
    """

    def __init__(self, values: Array, bend: float) -> None:
        self._least = float(values.min())
        self._scale = bend * (float(np.median(values)) - self._least) or 1.0

    def warp(self, values: Array) -> Array:
        return np.asarray(self._scale * np.log1p(np.maximum(values - self._least, 0.0) / self._scale))

    def unwarp(self, warped: Array) -> Array:
        return np.asarray(self._least + self._scale * np.expm1(warped / self._scale))

    def slopes(self, values: Array) -> Array:
        """Of `warp` at the values."""
        return np.asarray(1.0 / (1.0 + np.maximum(values - self._least, 0.0) / self._scale))


@dataclass(frozen=True)
class Learned:
    """What `learn` found: `theta` (S + 4,) as at the head of this file, and the bend of the warp."""

    theta: Array
    bend: float


class Predictor:
    """Gaussian process whose kernel is a sum over slots, pairs and triples of slots that hold the same choice.

    Additive Gaussian processes (Duvenaud, Nickisch and Rasmussen 2011, eq. 3 and the Newton-Girard formula of their
    section 3.2) of warped values (Snelson, Rasmussen and Ghahramani 2003), with a variance a slot, a weight for pairs
    and one for triples, and noise. In the sum over slots, choices are alike as `near` (D, D; `liken`) says, as far as
    that was learned. Values (N,) must be finite; means and deviations are those of warped values.
    """

    def __init__(self, sizes: Sequence[int], genotypes: Sequence[Genotype], values: Array, learned: Learned,
                 near: Array | None = None) -> None:
        self._encoding, self._theta, self.warp = Encoding(sizes), learned.theta, Warp(values, learned.bend)
        share, same = _share(self._theta), np.eye(sum(sizes))
        self._alike = same if near is None else (1.0 - share) * same + share * near
        self.x = self._encoding.encode(genotypes)
        warped = self.warp.warp(values)
        self._mean, self._scale = float(warped.mean()), float(warped.std()) or 1.0
        self._y = (warped - self._mean) / self._scale
        covariance = self._kernel(self.x, self.x) + np.eye(len(self.x)) * (np.exp(self._theta[-1]) + _JITTER)
        self._lower = cholesky(covariance, lower=True)
        self._alpha = cho_solve((self._lower, True), self._y)
        self._prior = float(self._kernel(self.x[:1], self.x[:1])[0, 0])

    @property
    def noise(self) -> float:
        """Variance of what genotypes do not explain."""
        return float(np.exp(self._theta[-1])) * self._scale**2

    def _kernel(self, a: Array, b: Array) -> Array:
        weight = np.exp(self._theta[:-4])[self._encoding.slots]
        alone = (a * weight) @ self._alike @ b.T
        first, second, third = (a * weight) @ b.T, (a * weight**2) @ b.T, (a * weight**3) @ b.T
        pairs, triples = _join(first, second, third)
        return np.asarray(alone + np.exp(self._theta[-3]) * pairs + np.exp(self._theta[-2]) * triples)

    def predict(self, rows: Array) -> Belief:
        """Expected values with their uncertainty; it stays open to more."""
        across = self._kernel(rows, self.x)
        means = np.asarray(across @ self._alpha * self._scale + self._mean)
        solved = solve_triangular(self._lower, across.T, lower=True)
        return Belief(self, rows, means, solved)

    def explain(self) -> tuple[list[Array], list[Array]]:
        """What each choice (S arrays) and each pair of choices of neighbouring slots (S−1 arrays) adds to the mean."""
        slots, weights = self._encoding.slots, np.exp(self._theta[:-4])
        columns = [self.x[:, slots == slot] for slot in range(len(weights))]
        alpha = self._alpha * self._scale
        alone = [weight * ((alpha @ self.x) @ self._alike[:, slots == slot]) for slot, weight in enumerate(weights)]
        pairs = [np.exp(self._theta[-3]) * weights[slot] * weights[slot + 1]
                 * (columns[slot].T @ (alpha[:, None] * columns[slot + 1])) for slot in range(len(weights) - 1)]
        return alone, pairs

    def leave_one_out(self) -> Array:
        """What each measured value (N,) would be predicted as without it (Rasmussen and Williams 2006, eq. 5.12)."""
        inverse = cho_solve((self._lower, True), np.eye(len(self._y)))
        return self.warp.unwarp((self._y - self._alpha / np.diag(inverse)) * self._scale + self._mean)


class Belief:
    """Expected values (M,) and variances of candidates, which shrink as some of them are taken for measured."""

    def __init__(self, predictor: Predictor, rows: Array, means: Array, solved: Array) -> None:
        self._predictor, self._rows, self._solved = predictor, rows, solved
        self.means = means
        self._variances = np.maximum(predictor._prior - np.einsum("nm,nm->m", solved, solved), 1e-9)

    @property
    def deviations(self) -> Array:
        """Standard deviations (M,) of what a measurement would give."""
        return np.asarray(np.sqrt(self._variances * self._predictor._scale**2 + self._predictor.noise))

    def take(self, index: int) -> None:
        """Act as if the candidate had been measured and had given its expected value."""
        row = self._predictor._kernel(self._rows[index:index + 1], self._rows)[0]
        row -= self._solved[:, index] @ self._solved
        extra = row / np.sqrt(self._variances[index] + np.exp(self._predictor._theta[-1]) + _JITTER)
        self._solved = np.vstack([self._solved, extra])
        self._variances = np.maximum(self._variances - extra**2, 1e-9)


def count_learned(count: int) -> int:
    """Of how many genotypes the variances are learned when `count` are measured."""
    return min(_MOST_LEARNED, int(_GROWTH ** np.floor(np.log(count) / np.log(_GROWTH) + 1e-9)))


def learn(sizes: Sequence[int], genotypes: Sequence[Genotype], values: Array, near: Array | None = None) -> Learned:
    """The maximum a posteriori of values (N,), the bend among a few."""
    encoding = Encoding(sizes)
    x, parts = encoding.encode(genotypes), [encoding.slots == slot for slot in range(len(sizes))]
    same = np.stack([(x[:, part] @ x[:, part].T).ravel() for part in parts])
    alike = same if near is None else np.stack(
        [(x[:, part] @ near[np.ix_(part, part)] @ x[:, part].T).ravel() for part in parts])
    middle = np.array([*[_START] * len(sizes), *_OTHERS])
    spread = np.array([*[_SPREAD] * len(sizes), *[2.0] * len(_OTHERS)])
    bounds = np.stack([middle - _FURTHEST * spread, middle + _FURTHEST * spread], axis=1)

    def loss(theta: Array, y: Array) -> tuple[float, Array]:
        value, gradient = _likelihood(theta, same, alike, y)
        return (value + 0.5 * float((((theta - middle) / spread) ** 2).sum()), gradient + (theta - middle) / spread**2)

    start, found = middle, list[tuple[float, float, Array]]()
    for bend in _BENDS:
        warp = Warp(values, bend)
        warped = warp.warp(values)
        scale = float(warped.std()) or 1.0
        fit = minimize(loss, start, ((warped - warped.mean()) / scale,), jac=True, method="L-BFGS-B", bounds=bounds,
                       options={"maxiter": _FURTHER if found else _ITERATIONS})
        density = fit.fun + float(np.log(scale / warp.slopes(values)).sum()) + 0.5 * (np.log(bend) / _BEND_SPREAD) ** 2
        found.append((density, bend, fit.x))
        start = fit.x
    _, bend, theta = min(found, key=lambda entry: entry[:2])
    return Learned(theta, bend)


def _join(first: Array, second: Array, third: Array) -> tuple[Array, Array]:
    """Elementary symmetric polynomials of second and third order, by power sums."""
    pairs = (first * first - second) / 2
    return pairs, (first * (pairs - second) + third) / 3


def _share(theta: Array) -> float:
    """How far likeness counts, from 0 to 1."""
    return float(1.0 / (1.0 + np.exp(-theta[-4])))


def _likelihood(theta: Array, same: Array, alike: Array, y: Array) -> tuple[float, Array]:
    """Negative logarithm of the marginal likelihood of y and its gradient (Rasmussen and Williams 2006, eq. 5.9).

    By slot, `same` (S, N·N) tells which genotypes hold the same choice, zeros and ones, `alike` how alike theirs are.
    """
    weights, share, (pair, triple, noise) = np.exp(theta[:-4]), _share(theta), np.exp(theta[-3:])
    first, second, third = (row.reshape(len(y), -1) for row in np.stack([weights, weights**2, weights**3]) @ same)
    near = (weights @ alike).reshape(first.shape)
    pairs, triples = _join(first, second, third)
    covariance = ((1.0 - share) * first + share * near + pair * pairs + triple * triples
                  + np.eye(len(y)) * (noise + _JITTER))
    try:
        lower = cholesky(covariance, lower=True)
    except LinAlgError:
        return 1e10, np.zeros_like(theta)
    alpha = cho_solve((lower, True), y)
    slope = 0.5 * (cho_solve((lower, True), np.eye(len(y))) - np.outer(alpha, alpha))
    alone, by_first, by_pairs = (same @ np.stack([part.ravel() for part in (slope, slope * first, slope * pairs)], 1)).T
    likened = alike @ slope.ravel()
    # A slot's part of pairs is its own times the others' sum, first - weight * same, and of triples that times theirs.
    joint = pair * (by_first - weights * alone) + triple * (by_pairs - weights * by_first + weights**2 * alone)
    gradient = [*weights * ((1.0 - share) * alone + share * likened + joint),
                share * (1.0 - share) * float(weights @ (likened - alone)), pair * float((slope * pairs).sum()),
                triple * float((slope * triples).sum()), noise * float(np.trace(slope))]
    return 0.5 * float(y @ alpha) + float(np.log(np.diag(lower)).sum()), np.array(gradient)


def judge_predictor(sizes: Sequence[int], genotypes: Sequence[Genotype], values: Array) -> tuple[float, float, float]:
    """Leave-one-out Kendall tau, mean error, and the error of slots alone (ridge), in units of the values (N,).

    Where slots alone err much more, the space is not additive.
    """
    from scipy.stats import kendalltau  # half a second, for the report alone

    predicted = Predictor(sizes, genotypes, values, learn(sizes, genotypes, values)).leave_one_out()
    x = Encoding(sizes).encode(genotypes)
    x = np.hstack([x, np.ones((len(x), 1))])
    hat = x @ np.linalg.solve(x.T @ x + 1e-2 * np.eye(x.shape[1]), x.T)
    additive = np.abs((values - hat @ values) / np.maximum(1 - np.diag(hat), 1e-9))
    return (float(kendalltau(predicted, values).statistic), float(np.abs(predicted - values).mean()),
            float(additive.mean()))


def describe_fit(sizes: Sequence[int], measurements: Sequence[Measurement]) -> str:
    """A sentence on how well drops follow from each other, "" where too few are measured to say."""
    valid = [item for item in measurements if item.valid][:_MOST]
    if len(valid) < _FEWEST:
        return ""
    drops = np.array([item.values[QUALITY] for item in valid])
    tau, error, additive = judge_predictor(sizes, [item.genotype for item in valid], drops)
    text = f"predicted from the others, a drop is {error:.2f} dB off (Kendall tau {tau:.2f})"
    if additive > max(_NOT_ADDITIVE * error, _WORTH_SAYING * float(drops.std())):
        text += f"; the space is not additive: by sums over slots it would be {additive:.2f} dB off"
    return text
