"""Share of the exhaustive hypervolume that each engine reaches with a part of the evaluations, on a measured table.

    ens search scripts/table.yaml --out runs/table      # every genotype of a four-slot sub-space of the demo
    .venv/bin/python scripts/compare_engines.py runs/table
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

from ens.pareto.archive import Archive, read_archive
from ens.pareto.front import hypervolume
from ens.pareto.selection import select_front
from ens.search import ENGINES, create_engine
from ens.search.loop import run_search
from ens.space import Measurement


def reached(measurements: list[Measurement], archive: Archive) -> float:
    values = [[item.values[name] for name in archive.objectives] for item in measurements if item.valid]
    return hypervolume(np.array(values), reference_of(archive))


def reference_of(archive: Archive) -> tuple[float, ...]:
    """The fixed reference point, from the teacher's own values."""
    reference = select_front(archive.measurements(), archive.objectives, baseline=archive.baseline).reference
    assert reference is not None
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of an exhaustive search")
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    archive = read_archive(arguments.run / "archive.db")
    table, space = archive.known(), archive.space
    if len(table) != space.num_genotypes:
        raise SystemExit(f"{arguments.run} holds {len(table)} of {space.num_genotypes} genotypes; "
                         "the table must be whole")
    best, budget = reached(list(table.values()), archive), round(arguments.fraction * len(table))
    print(f"{len(table)} genotypes, {budget} evaluations, {' against '.join(archive.objectives)}")
    for name in ENGINES:
        shares = [reached(run_search(
            engine=create_engine(name, space, seed=seed), objectives=archive.objectives, known={},
            evaluate=lambda batch: [table[genotype] for genotype in batch], record=lambda item: None,
            budget=budget), archive) / best for seed in range(arguments.seeds)]
        print(f"{name:<10} mean {statistics.fmean(shares):.4f}  min {min(shares):.4f}  "
              f"{sum(share >= 0.95 for share in shares)} of {len(shares)} seeds reach 95 %", flush=True)


if __name__ == "__main__":
    main()
