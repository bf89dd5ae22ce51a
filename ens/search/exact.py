"""The engine that this project is for: a predictor of the quality, costs that are known, and the front between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ens.search.additive import find_additive_front
from ens.search.ledger import Ledger
from ens.search.predictor import Array, Belief, Encoding, Learned, Predictor, count_learned, learn, liken
from ens.space import Genotype, SearchSpace, Tally

Entry = TypeVar("Entry")
_MOST = 1024
"""Candidates of one ask."""
_MOST_CELLS = 64
"""Front members that divide a cost axis, where several costs are searched."""
_WORST = 0.9
"""Where no reference is given: the share of the values measured first that lie below its coordinate."""


class ExactEngine:
    """Starts at both ends, then measures what is expected to enlarge the dominated hypervolume most.

    One objective is predicted (`Predictor`): the first whose entry in `costs` is None, else the first of all. The
    others are tallies known in advance, or where None stands there too, sums over slots fitted to what was measured.
    The expected improvement is then a closed form: an integral over costs of the expected improvement on the best
    member that is no dearer. Candidates are all unseen genotypes of a small space; of a larger one, the front of the
    predictor's slots and neighbouring pairs against each cost, the neighbours of the measured front by one slot and by
    two, and uniform ones. `reference` is the hypervolume's corner, an entry an objective; without one, nine tenths of
    the values measured first lie within.
    """

    def __init__(self, space: SearchSpace, *, seed: int, costs: Sequence[Tally | None] = (),
                 reference: Sequence[float] | None = None) -> None:
        self._ledger = Ledger(space, seed)
        self._predicted = next((index for index, tally in enumerate(costs) if tally is None), 0)
        self._costs, self._reference = self._sort(costs), None if reference is None else self._sort(reference)
        self._near = liken(space.sizes, [tally for tally in self._costs[1:] if tally is not None])
        self._learned: tuple[int, Learned] | None = None
        self._startup = max(space.sizes) + len(space.slots) // 2 + 2

    def _sort(self, entries: Sequence[Entry]) -> list[Entry]:
        """An entry an objective, that of the predicted one first."""
        first = entries[self._predicted:self._predicted + 1]
        return [*first, *entries[:self._predicted], *entries[self._predicted + 1:]]

    def tell(self, genotypes: list[Genotype], values: np.ndarray) -> None:
        self._ledger.add(genotypes, np.array([self._sort(row) for row in np.asarray(values).tolist()]))

    def ask(self, n: int, pending: Sequence[Genotype] = ()) -> list[Genotype]:
        rng = self._ledger.rng(pending)
        genotypes, values = self._ledger.valid()
        if len(self._ledger) + len(pending) < self._startup or len(genotypes) < 3:
            return self._ledger.opening(n, beside=pending, rng=rng)
        quality = self._predict(genotypes, values[:, 0])
        candidates = self._candidates(n, pending, quality, genotypes, values, rng)
        if not candidates:
            return []
        both = [*candidates, *pending]
        rows = Encoding(self._ledger.space.sizes).encode(both)
        costs = np.stack([self._price(index, both, genotypes, values)
                          for index in range(1, values.shape[1])], axis=1)
        points = np.vstack([values, self._corner(values, costs)])
        points[:, 0] = quality.warp.warp(points[:, 0])
        chooser = _Chooser(quality.predict(rows), costs, points[:-1], points[-1])
        for index in range(len(candidates), len(both)):
            chooser.take(index)
        chosen = [chooser.choose()]
        while len(chosen) < min(n, len(candidates)):
            chooser.take(chosen[-1])
            chosen.append(chooser.choose())
        return [candidates[index] for index in chosen]

    def _price(self, index: int, asked: Sequence[Genotype], genotypes: Sequence[Genotype], values: Array) -> Array:
        """One cost (M,) of the genotypes asked about."""
        tally = self._costs[index] if index < len(self._costs) else None
        encoding = Encoding(self._ledger.space.sizes)
        if tally is not None and tally.is_maximum:
            return np.array([tally.value(genotype) for genotype in asked])
        if tally is not None:
            return np.asarray(encoding.encode(asked) @ np.concatenate(tally.entries) + tally.rest)
        x, mean = encoding.encode(genotypes), values[:, index].mean()
        weights = np.linalg.lstsq(x, values[:, index] - mean, rcond=1e-9)[0]
        return np.asarray(encoding.encode(asked) @ weights + mean)

    def _predict(self, genotypes: Sequence[Genotype], values: Array) -> Predictor:
        sizes, count = self._ledger.space.sizes, count_learned(len(values))
        if self._learned is None or self._learned[0] != count:
            self._learned = (count, learn(sizes, genotypes[:count], values[:count], self._near))
        return Predictor(sizes, genotypes, values, self._learned[1], self._near)

    def _corner(self, values: Array, costs: Array) -> Array:
        if self._reference is not None:
            return np.array(self._reference, np.float64)
        dearest = np.maximum(values[:, 1:].max(axis=0), costs.max(axis=0))
        return np.array([np.quantile(values[:self._startup, 0], _WORST), *dearest + 0.1 * np.abs(dearest)])

    def _candidates(self, n: int, pending: Sequence[Genotype], quality: Predictor, genotypes: Sequence[Genotype],
                    values: Array, rng: np.random.Generator) -> list[Genotype]:
        space, ledger, most = self._ledger.space, self._ledger, max(n, _MOST)
        if space.num_genotypes - len(ledger) <= 2 * most:
            return list(ledger.unseen(space.enumerate(), beside=pending))
        front = [genotype for genotype, keep in zip(genotypes, moocore.is_nondominated(values), strict=True) if keep]
        sources = (itertools.islice(ledger.unseen(self._predicted_front(quality, values.shape[1])), most // 4),
                   itertools.islice(ledger.neighbours(front), most // 2), self._mutate(front, rng),
                   map(tuple, self._draw(most, rng).tolist()))
        found = list(itertools.islice(ledger.unseen(itertools.chain(*sources), beside=pending), most))
        return found if len(found) >= n else found + ledger.uniform(n - len(found), beside=[*pending, *found], rng=rng)

    def _predicted_front(self, quality: Predictor, objectives: int) -> list[Genotype]:
        """The front of predicted quality against each cost alone, in an order that spreads over it."""
        alone, pairs = quality.explain()
        opened = [np.array(slot.open) for slot in self._ledger.space.slots]
        joint = [np.stack([pair[np.ix_(*both)], np.zeros([len(row) for row in both])], axis=-1)
                 for pair, both in zip(pairs, itertools.pairwise(opened), strict=True)]
        found: list[Genotype] = []
        for tally in self._costs[1:objectives]:
            if tally is None or tally.is_maximum:
                continue
            entries = [np.column_stack([effect, row])[allowed]
                       for effect, row, allowed in zip(alone, tally.entries, opened, strict=True)]
            front = [tuple(int(allowed[index]) for index, allowed in zip(genotype, opened, strict=True))
                     for genotype in find_additive_front(entries, joint)[0]]
            spread = sorted(range(len(front)), key=lambda index: int(f"{index:032b}"[::-1], 2))
            found += [front[index] for index in spread]
        return found

    def _mutate(self, front: Sequence[Genotype], rng: np.random.Generator) -> Iterator[Genotype]:
        """Front members with two slots changed at random."""
        rows, drawn = np.array(front)[rng.integers(len(front), size=_MOST // 4)], self._draw(_MOST // 4, rng)
        for _ in range(2):
            slots = rng.integers(rows.shape[1], size=len(rows))
            rows[np.arange(len(rows)), slots] = drawn[np.arange(len(rows)), slots]
        return map(tuple, rows.tolist())

    def _draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Uniform genotypes (count, S), whether a bound allows them or not."""
        return np.column_stack([rng.choice(slot.open, size=count) for slot in self._ledger.space.slots])


class _Chooser:
    """Candidates in the order of the hypervolume that they are expected to add, each taken for measured."""

    def __init__(self, belief: Belief, costs: Array, points: Array, corner: Array) -> None:
        self._belief, self._costs, self._corner = belief, costs, corner
        self._front = points[moocore.is_nondominated(points)]
        self._free = np.ones(len(costs), bool)

    def choose(self) -> int:
        return int(np.where(self._free, self._improvement(), -1.0).argmax())

    def take(self, index: int) -> None:
        point = np.array([self._belief.means[index], *self._costs[index]])
        front = np.vstack([self._front, point])
        self._front = front[moocore.is_nondominated(front)]
        self._belief.take(index)
        self._free[index] = False

    def _improvement(self) -> Array:
        """Expected hypervolume improvement (M,): cost cells · EI on the best value that is no dearer than the cell."""
        front = self._front[np.argsort(self._front[:, 1], kind="stable")]
        if self._costs.shape[1] > 1 and len(front) > _MOST_CELLS:
            front = front[np.linspace(0, len(front) - 1, _MOST_CELLS).astype(int)]
        levels, widths = self._cells(front)
        best, where = np.unique(levels, return_inverse=True)
        means, deviations = self._belief.means[:, None], self._belief.deviations[:, None]
        z = (best - means) / deviations
        gain = deviations * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))  # (M, levels)
        total = np.zeros(len(means))
        where = where.reshape(levels.shape)
        if levels.ndim == 1:
            return np.asarray((gain[:, where] * widths[0]).sum(axis=1))
        for cell in itertools.product(*(range(size) for size in levels.shape[:-1])):
            volume = np.prod([widths[axis][:, index] for axis, index in enumerate(cell)], axis=0)
            total += volume * (gain[:, where[cell]] * widths[-1]).sum(axis=1)
        return total

    def _cells(self, front: Array) -> tuple[Array, list[Array]]:
        """The best value of the front in every cell of the costs, and the width (M, cells) of each that a candidate
        covers, cost by cost.
        """
        best, widths, masks = self._corner[0], [], []
        for axis in range(1, front.shape[1]):
            edges = np.unique(front[front[:, axis] < self._corner[axis], axis])
            low, high = np.concatenate([[-np.inf], edges]), np.concatenate([edges, [self._corner[axis]]])
            widths.append(np.clip(high - np.maximum(low, self._costs[:, axis - 1:axis]), 0.0, None))
            masks.append(front[:, axis:axis + 1] <= low)  # (front, cells)
        levels = np.full(tuple(mask.shape[1] for mask in masks), best)
        for member, value in enumerate(front[:, 0]):
            inside = masks[0][member]
            for mask in masks[1:]:
                inside = inside[..., None] & mask[member]
            levels = np.where(inside, np.minimum(levels, value), levels)
        return levels, widths
