"""The whole road in Python: `ens.open_run`, and the verbs of `ens.pipeline` as methods of what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ens.pipeline as pipeline
from ens.config import StudyConfig
from ens.console import reporting
from ens.own_code import import_code
from ens.pareto.selection import Front
from ens.run_folder import RunFolder
from ens.space import Measurement, format_genotype

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """One run: a study and the folder of its files, which `folder` opens one by one (see RunFolder).

    Every verb does first what is missing before it, skips what is done and goes on with what was interrupted. Progress
    is shown on a terminal and in a notebook, elsewhere as a line every half minute. A `pick` is `knee`, `near 1`,
    `within 0.1`, `fastest-within=0.1`, `best-under=latency_ms:120`, or a genotype such as `0-2-1`.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def search(self, *, jobs: int = 1) -> list[Measurement]:
        """Bring the teacher and its library and measure genotypes until the budget is spent; returns all of them."""
        with reporting() as control:
            return pipeline.search(self.folder, control, jobs=jobs)

    def front(self, *objectives: str) -> Front:
        """The front of what was measured, in the search's objectives or in any two or three others."""
        return self.folder.front(objectives)

    def table(self, *objectives: str) -> pd.DataFrame:
        """The front as a table, one row a member, with what fills every slot."""
        from ens.pareto.tables import front_table

        return front_table(self.front(*objectives), space=self.folder.archive.space)

    def report(self, *objectives: str) -> Path:
        """Write the front as CSV, Markdown, PNG and one HTML page; returns the page."""
        with reporting() as control:
            pipeline.pareto(self.folder, control, objectives=objectives)
        return self.folder.path / "report.html"

    def finetune(self, pick: str = "knee") -> str:
        """Fine-tune a member of the front and, where the study says so, those nearest to it; returns the best one."""
        with reporting() as control:
            return format_genotype(pipeline.finetune(self.folder, pick, control))

    def export(self, pick: str = "knee", *, formats: Sequence[str] = ("onnx",)) -> list[Path]:
        """Write a hybrid, its fine-tuned weights where it has some, in one or several formats; returns the files."""
        with reporting() as control:
            return pipeline.export(self.folder, pick, control, formats=formats)


def open_run(path: str | Path, study: StudyConfig | None = None, *, imports: Sequence[str] = ()) -> Run:
    """Take a folder for a study, or go on where it ran before; without a study, open the run that is there.

    `imports` are files or modules with code of yours that the study names, as after `--import`. Raises ConfigError.
    """
    for code in imports:
        import_code(code)
    path = Path(path)
    return Run(RunFolder.start(study, path) if study else RunFolder.reopen(path))
