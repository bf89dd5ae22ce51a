"""The one search loop: it owns the budget, the duplicates and the resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ens.objectives import find_objectives, objective_values
from ens.search import Engine
from ens.space import Genotype, Measurement


def run_search(*, engine: Engine, objectives: Sequence[str], known: Mapping[Genotype, Measurement],
               evaluate: Callable[[list[Genotype]], Iterable[Measurement]], record: Callable[[Measurement], None],
               budget: int, batch_size: int = 1,
               progress: Callable[[int, int], None] | None = None) -> list[Measurement]:
    """Measure until `budget` genotypes are known, those in `known` included; return all of them in archive order.

    `known` is the archive in the order of recording, `engine` is fresh. `evaluate` gets a batch in lexicographic order
    (neighbours share prefixes) and returns or yields one measurement for each; `record` makes each one durable as it
    comes; `progress(done, budget)` follows. No genotype is evaluated twice. Whole batches of `known` are told without
    asking, so a resume costs no model fits; the batch a kill interrupted is asked for again and only its missing part
    evaluated. Ends early when the space is exhausted. Raises ValueError for a budget or batch below one, RuntimeError
    when `evaluate` returns other genotypes than it was given.
    """
    find_objectives(objectives)
    if budget < 1 or batch_size < 1:
        raise ValueError(f"budget and batch size must be at least 1, got {budget} and {batch_size}")
    archive = dict(known)
    order = list(archive.values())
    told = 0
    while len(archive) < budget:
        while told + batch_size <= len(archive):
            _tell(engine, order[told:told + batch_size], objectives)
            told += batch_size
        # Never past a multiple of batch_size: what an engine was told when it asked then follows from the length of
        # the archive alone, whatever was interrupted or put there by hand.
        missing = min(budget, told + batch_size) - len(archive)
        todo = [genotype for genotype in engine.ask(batch_size) if genotype not in archive][:missing]
        if not todo:
            break
        for measurement in _measure(evaluate, sorted(todo)):
            record(measurement)
            archive[measurement.genotype] = measurement
            order.append(measurement)
            if progress is not None:
                progress(len(archive), budget)
    return order


def _tell(engine: Engine, batch: Sequence[Measurement], objectives: Sequence[str]) -> None:
    """Tell in lexicographic order, so that the order in which a batch was finished changes nothing."""
    batch = sorted(batch, key=lambda measurement: measurement.genotype)
    engine.tell([measurement.genotype for measurement in batch], objective_values(batch, objectives))


def _measure(evaluate: Callable[[list[Genotype]], Iterable[Measurement]],
             batch: list[Genotype]) -> Iterator[Measurement]:
    """One measurement for each genotype of the batch, as it comes; RuntimeError for others, repeats and missing."""
    waiting = set(batch)
    for measurement in evaluate(batch):
        if measurement.genotype not in waiting:
            raise RuntimeError(f"the evaluator returned {measurement.genotype}, which it was not asked for")
        waiting.remove(measurement.genotype)
        yield measurement
    if waiting:
        raise RuntimeError(f"the evaluator returned no measurement of {sorted(waiting)[0]}")
