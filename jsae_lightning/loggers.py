"""Logging at once to every logger, and loggers that survive a kill.

A run that is killed has logged steps which its last checkpoint does not know. `truncate_after(step)` removes them, so
that the files of a resumed run hold every step once, as those of an uninterrupted run do. Steps are completed optimizer
steps, counted from 1.
"""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.errors import UserError
from jsae_lightning.tensorboard_logger import ResumableTensorBoardLogger

__all__ = ["ResumableCSVLogger", "ResumableTensorBoardLogger", "log_metrics"]


def log_metrics(trainer: Trainer, metrics: Mapping[str, Any], step: int) -> None:
    """Give `metrics` to every logger of the trainer at once; on other ranks than 0 do nothing.

    `metrics` maps tags to numbers or one-element tensors; `step` is the number of completed optimizer steps, from 1.
    Nothing is deferred: a checkpoint that is saved after this call knows that its step has been logged.
    """
    if not trainer.is_global_zero:
        return
    numbers = {tag: _number(value) for tag, value in metrics.items()}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step)


class ResumableCSVLogger(Logger):
    """One wide table, `save_dir/metrics.csv`: a row for each step, a column for each tag, columns added as tags appear.

    Calls that follow each other with the same step share its row. Numbers are written so that reading them gives the
    same bits; a NaN is `nan` and a value that was not logged is empty. The latest row is written when the next step
    begins, on `flush` and at the end. An existing file is continued.
    """

    def __init__(self, save_dir: str | Path) -> None:
        """Write to the folder `save_dir`, which is made when the first row is written."""
        super().__init__()
        self._path = Path(save_dir) / "metrics.csv"
        self._columns = ["step"]
        self._row: dict[str, str] = {}  # the latest row, in the file or not
        self._row_in_file = self._row_changed = self._loaded = False

    @property
    def name(self) -> str:
        """The logger's name."""
        return "csv"

    @property
    def version(self) -> str:
        """Empty: the run's folder is the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of `metrics.csv`."""
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's folder holds the configuration already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add `metrics` to the row of `step`, or begin a new row if the latest row has another step."""
        if step is None:
            raise ValueError(f"{self._path}: metrics {sorted(metrics)} were logged without a step")
        self._load()
        if self._row.get("step") != str(step):
            self.flush()
            self._row, self._row_in_file = {"step": str(step)}, False
        self._row |= {tag: repr(_number(value)) for tag, value in metrics.items()}
        self._row_changed = True

    @rank_zero_only
    def flush(self) -> None:
        """Bring the latest row to the file."""
        if not self._row_changed:
            return
        new_columns = [tag for tag in self._row if tag not in self._columns]
        if new_columns or self._row_in_file or not self._path.exists():
            rows = self._read()
            if self._row_in_file:
                rows.pop()
            self._columns += new_columns
            self._rewrite([*rows, self._row])
        else:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(self._row)
        self._row_in_file, self._row_changed = True, False

    @rank_zero_only
    def save(self) -> None:
        """The same as `flush`."""
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring everything to the file, whatever the status."""
        self.flush()

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Remove the rows of every step > `step`, and the columns that no remaining row uses. Raise UserError if the
        file is damaged.
        """  # noqa: D205
        self._load()
        self.flush()
        rows = self._read()
        kept = [row for row in rows if int(row["step"]) <= step]
        used = set().union(*kept)
        if len(kept) < len(rows) or not used.issuperset(self._columns):
            self._columns = ["step", *(tag for tag in self._columns[1:] if tag in used)]
            self._rewrite(kept)
        self._row, self._row_in_file = (kept[-1], True) if kept else ({}, False)

    def _load(self) -> None:
        """Take over an existing file, once; a last line that a kill has cut short is dropped."""
        if self._loaded:
            return
        self._loaded = True
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        if text and not text.endswith("\n"):
            with atomic_file(self._path) as temporary:
                temporary.write_text(text[: text.rfind("\n") + 1], encoding="utf-8", newline="")
        rows = self._read()
        if rows:
            self._row, self._row_in_file = rows[-1], True

    def _read(self) -> list[dict[str, str]]:
        """Read the rows in the file without their empty cells, and take over its columns."""
        if not self._path.exists():
            return []
        with self._path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or ["step"])
            rows = [{tag: cell for tag, cell in row.items() if cell} for row in reader]
        for number, row in enumerate(rows, start=2):
            if not row.get("step", "").isdecimal():
                raise UserError(f"{self._path}: line {number} has no step: repair the file or move it away")
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic_file(self._path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _number(value: Any) -> int | float:
    """Turn a one-element tensor, a NumPy scalar or a number into a Python number with the same value."""
    return value.item() if hasattr(value, "item") else value
