"""What each choice costs and brings in its slot: PSNR drop where it alone is replaced, milliseconds there.

`bench_blocks.py RUN [SLOT...]` prints a Markdown table. RUN is distilled, and its tables `latency_ms@one` and
`latency_ms@two` are made by `ens profile RUN --name one --threads 1`, and two.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ens.evaluate.latency import read_table
from ens.run_folder import RunFolder


def main() -> None:
    """Print the table; times faster are those of the slot, and compare with `conv×1`."""
    run, names = RunFolder.reopen(Path(sys.argv[1])), sys.argv[2:]
    tables = [read_table(run.table_path(f"latency_ms@{name}", 0, run.study.latency.size)) for name in ("one", "two")]
    slots = [slot for slot in run.space.slots if not names or slot.name in names]
    for table in tables:
        print(f"{table.protocol}\n")
    print("| slot | choice | alignment error | drop dB | ms, one thread | × conv×1 | ms, two | × conv×1 |\n"
          "|---|---|---|---|---|---|---|---|")
    for slot in slots:
        place = run.space.slots.index(slot)
        genotypes = [tuple(index if position == place else 0 for position in range(len(run.space.slots)))
                     for index in range(1, len(slot.choices))]
        for genotype, measured in zip(genotypes, run.evaluator.evaluate(genotypes), strict=True):
            label, values = slot.choices[genotype[place]].label, measured.values
            times = [cell for table in tables for ms in [table.slots[slot.name][label].ms]
                     for cell in (f"{ms:.1f}", f"{table.slots[slot.name]['conv×1'].ms / ms:.2f}")]
            error = run.library.surrogates[f"{slot.name}/{label}"].alignment_error
            print(f"| {slot.name} | {label} | {error:.3f} | {values['psnr_drop_db']:.3f} ± "
                  f"{values['psnr_drop_se_db']:.3f} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()
