"""Every engine on tables that are measured whole: share of the exhaustive hypervolume by unique evaluations.

    .venv/bin/python scripts/bench_search.py --nas ../shared/tables/nas_bench_macro.csv

`--from` writes results/tables/denoise_demo.csv first, of the run folder of scripts/table.yaml, `--large`
results/tables/denoise_34560.csv, of that of scripts/table_large.yaml.

Every search is one line of results/search.jsonl, so that a broken off bench goes on; the table in results/search.md and
the chart in results/search.png are made of all lines. Batches of one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import moocore
import numpy as np

from ens.pareto.archive import read_archive
from ens.pareto.front import hypervolume, hypervolume_history
from ens.search import ENGINES
from ens.search.table import Table, load_table
from ens.space import format_genotype

ROOT = Path(__file__).resolve().parents[1]
AT = (25, 50, 100, 200)
SKIPPED = ("exhaustive",)
LARGE = "denoise_34560"
OBJECTIVES = ("psnr_drop_db", "latency_ms@one")
BUDGETS = {LARGE: 400}
"""Unique evaluations of a search, of tables that take more than the usual 200."""


def write_synthetic(path: Path, sizes: tuple[int, ...], order: int, seed: int) -> None:
    """A table in which slots alone explain two thirds of the variance, and groups of `order` slots the rest."""
    rng = np.random.default_rng(seed)
    genotypes = np.array(list(itertools.product(*map(range, sizes))))
    alone, cost, joint = (np.zeros(len(genotypes)) for _ in range(3))
    for slot, size in enumerate(sizes):
        price = np.sort(rng.uniform(0.2, 1.0, size))[::-1] * rng.uniform(0.5, 2.0)
        effect = np.sort(rng.exponential(1.0, size)) * rng.uniform(0.2, 1.5)
        cost += price[genotypes[:, slot]]
        alone += effect[genotypes[:, slot]]
    groups = list(itertools.combinations(range(len(sizes)), order))
    for group in rng.permutation(len(groups))[:2 * len(sizes)]:
        shape = [sizes[slot] for slot in groups[group]]
        joint += rng.normal(size=shape)[tuple(genotypes[:, slot] for slot in groups[group])]
    design = np.hstack([(genotypes[:, [slot]] == np.arange(size)) for slot, size in enumerate(sizes)]).astype(float)
    joint -= design @ np.linalg.lstsq(design, joint, rcond=None)[0]
    quality = np.sqrt(2 / 3) * alone / alone.std() + np.sqrt(1 / 3) * joint / joint.std()
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["genotype", "quality", "cost"])
        rows.writerows(["-".join(map(str, genotype)), f"{value:.6f}", f"{price:.6f}"]
                       for genotype, value, price in zip(genotypes.tolist(), quality - quality.min(), cost,
                                                         strict=True))


def write_measured(run: Path, path: Path, names: Sequence[str] = ()) -> None:
    """Values (all and the PSNR of every image, unless named) of every genotype of an exhaustive search as a table."""
    archive = read_archive(run / "archive.db")
    measured = sorted(archive.known().values(), key=lambda item: item.genotype)
    if len(measured) != archive.space.num_genotypes:
        raise SystemExit(f"{run} holds {len(measured)} of {archive.space.num_genotypes} genotypes")
    images = [] if names else [f"psnr_db_{index}" for index in range(len(measured[0].psnr_db))]
    names = names or list(measured[0].values)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["genotype", *names, *images])
        rows.writerows([format_genotype(item.genotype), *(f"{item.values[name]:.7g}" for name in names),
                        *(f"{value:.4f}" for value in item.psnr_db[:len(images)])] for item in measured)


def corner_of(name: str, table: Table) -> tuple[float, ...]:
    """The fixed reference point: the teacher's quality plus 6 (synthetic: the median), 1.1 times its cost; of the large
    table the front's own worst values and a tenth of its range beyond them, as BoTorch infers one, which leaves nothing
    to a few points in the middle.
    """
    values = table.values(list(table.rows))
    if name == LARGE:
        front = values[moocore.is_nondominated(values)]
        return tuple((front.max(0) + 0.1 * np.ptp(front, axis=0)).tolist())
    teacher = table.values([table.space.teacher])[0]
    quality = float(np.median(values[:, 0])) if name.startswith("synthetic") else teacher[0] + 6.0
    return (quality, *(1.1 * teacher[1:]).tolist())


def count_fewest(name: str, table: Table, level: float = 0.99) -> int:
    """How many genotypes reach that share of the hypervolume where every value is known beforehand: no search needs
    fewer. Of two objectives, by dynamic programming over the front from the cheapest on.
    """
    corner = np.array(corner_of(name, table))
    values = table.values(list(table.rows))
    front = np.unique(values[moocore.is_nondominated(values)], axis=0)
    front = front[(front < corner).all(axis=1)]
    quality, cost = front[np.argsort(front[:, 1])].T
    best, count = (corner[0] - quality) * (corner[1] - cost), 1  # by the dearest of those chosen
    while best.max() < level * hypervolume(values, tuple(corner)):
        best = np.array([max((best[:last] + (quality[:last] - quality[last]) * (corner[1] - cost[last])).tolist(),
                             default=-np.inf) for last in range(len(front))])
        count += 1
    return count


def search(name: str, table: Table, engine: str, seed: int) -> dict[str, object]:
    """One search and what it reached."""
    corner = corner_of(name, table)
    whole = hypervolume(table.values(list(table.rows)), corner)
    start = time.process_time()
    order = table.replay(engine, budget=BUDGETS.get(name, max(AT)), seed=seed, reference=corner)
    seconds = time.process_time() - start
    shares = hypervolume_history(table.values(order), corner) / whole
    until = {f"to_{level}": int(np.argmax(shares >= level / 100)) + 1 if shares[-1] >= level / 100 else None
             for level in (95, 99)}
    return {"table": name, "engine": engine, "seed": seed, "seconds": round(seconds, 2),
            "shares": {str(count): round(float(shares[min(count, len(shares)) - 1]), 5) for count in AT},
            **until, "history": [round(float(share), 4) for share in shares[::5]]}


def summarise(lines: list[dict], tables: dict[str, Table]) -> str:
    """A Markdown table of medians and quartiles."""
    text = ["Share of the exhaustive hypervolume after so many unique evaluations: medians (quartiles) of seeds.",
            "Reference points are fixed: 6 dB below the teacher (synthetic tables: the median quality), 1.1 times its",
            f"cost; of {LARGE} the worst values on the front and a tenth of its range beyond, which leaves",
            "nothing to a few points in the middle. Drawn in `search.png`.", "",
            "Fewest evaluations for 99 %, were every value known beforehand: "
            + ", ".join(f"{name} {count_fewest(name, table)}" for name, table in sorted(tables.items())) + ".", "",
            "| table | engine | seeds | " + " | ".join(f"after {count}" for count in AT)
            + " | to 95 % | to 99 % | processor s |", "|---" * (len(AT) + 6) + "|"]
    for (table, engine), group in itertools.groupby(lines, key=lambda line: (line["table"], line["engine"])):
        found = list(group)
        cells = []
        for count in AT:
            low, middle, high = np.quantile([line["shares"][str(count)] for line in found], (0.25, 0.5, 0.75))
            cells.append(f"{middle:.4f} ({low:.4f} to {high:.4f})")
        for level in (95, 99):
            budget = BUDGETS.get(table, max(AT))
            middle = statistics.median(line[f"to_{level}"] or budget + 1 for line in found)
            cells.append(f"{middle:g}" if middle <= budget else f"> {budget}")
        seconds = statistics.median(line["seconds"] for line in found)
        text.append(f"| {table} | {engine} | {len(found)} | " + " | ".join(cells) + f" | {seconds:.1f} |")
    return "\n".join(text) + "\n"


def draw(lines: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(line["table"] for line in lines))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.9), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for number, engine in enumerate(dict.fromkeys(line["engine"] for line in lines)):
            history = [line["history"] for line in lines if (line["table"], line["engine"]) == (name, engine)]
            if history:
                low, middle, high = np.quantile([row[:min(map(len, history))] for row in history], (0.25, 0.5, 0.75), 0)
                steps = 1 + 5 * np.arange(len(middle))
                axis.plot(steps, middle, label=engine, color=f"C{number}")
                axis.fill_between(steps, low, high, alpha=0.15, color=f"C{number}")
        axis.set(title=name, xlabel="unique evaluations", ylim=(0.7, 1.0))
    axes[0][0].set_ylabel("share of the exhaustive hypervolume")
    figure.legend(*max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1])),
                  loc="outside upper center", ncols=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nas", type=Path, help="nas_bench_macro.csv (NAS-Bench-Macro)")
    parser.add_argument("--from", dest="run", type=Path, help="run folder of scripts/table.yaml")
    parser.add_argument("--large", type=Path, help="run folder of scripts/table_large.yaml")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--engines", nargs="+", default=[name for name in ENGINES if name not in SKIPPED])
    parser.add_argument("--tables", nargs="+", help="only these, and what is known of the others")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "search")
    arguments = parser.parse_args()
    record, scratch = arguments.out.with_suffix(".jsonl"), arguments.out.with_suffix(".csv")
    tables = {}
    for name, sizes, order in (("synthetic pairs", (3,) * 8, 2), ("synthetic triples", (4,) * 6, 3)):
        write_synthetic(scratch, sizes, order, seed=7)
        tables[name] = load_table(scratch, ("quality", "cost"))
        scratch.unlink()
    if arguments.nas:
        tables["nas_bench_macro"] = load_table(arguments.nas, ("error_percent", "flops"))
    for name, run, columns in (("denoise_demo", arguments.run, ()), (LARGE, arguments.large, OBJECTIVES)):
        path = ROOT / "results" / "tables" / f"{name}.csv"
        if run:
            write_measured(run, path, columns)
        if path.exists():
            tables[name] = load_table(path, OBJECTIVES)
    known = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.exists() else []
    done = {(line["table"], line["engine"], line["seed"]) for line in known}
    for seed, name, engine in itertools.product(range(arguments.seeds), arguments.tables or tables, arguments.engines):
        if (name, engine, seed) not in done:
            known.append(search(name, tables[name], engine, seed))
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[-1]) + "\n")
            print(name, engine, seed, known[-1]["shares"], f"{known[-1]['seconds']} s", flush=True)
    order = {engine: index for index, engine in enumerate(ENGINES)}
    known.sort(key=lambda line: (line["table"], order.get(line["engine"], len(order)), line["seed"]))
    arguments.out.with_suffix(".md").write_text(summarise(known, tables), encoding="utf-8")
    draw(known, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
