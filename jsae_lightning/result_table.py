"""The table of a sweep's results: its rows and columns. Imports neither torch nor lightning."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jsae_lightning.job_records import JobRecord
from jsae_lightning.override_values import Cell
from jsae_lightning.sweep_folders import natural_key

Row = dict[str, Cell]

BASE = ("job", "status", "wall_seconds", "attempts", "step", "message")


@dataclass(frozen=True)
class ResultTable:
    """A row for each job, and the names of the columns: BASE, the overrides that vary, the final metrics."""

    rows: list[Row]
    varying: list[str]
    metrics: list[str]

    @property
    def columns(self) -> list[str]:
        """All columns in order."""
        return [*BASE, *self.varying, *self.metrics]


def build_table(records: Sequence[JobRecord]) -> ResultTable:
    """Return the table of the jobs, in their order.

    A name that two kinds of columns have stands with its kind: `override:status`, `metric:seed`.
    """
    varying = _labels(varying_keys(records), BASE, "override")
    tags = sorted({tag for record in records for tag in record.metrics})
    metrics = _labels(tags, [*BASE, *varying.values()], "metric")
    rows = []
    for record in records:
        row: Row = {name: getattr(record, name) for name in BASE}
        row |= {label: record.overrides.get(key) for key, label in varying.items()}
        rows.append(row | {label: record.metrics.get(tag) for tag, label in metrics.items()})
    return ResultTable(rows, list(varying.values()), list(metrics.values()))


def varying_keys(records: Sequence[JobRecord]) -> list[str]:
    """Return the override keys whose value is not the same in all jobs, in the order in which they were given.

    Not to have a key is a value too, where a job's own folder tells what it has.
    """
    keys = dict.fromkeys(key for record in records for key in record.overrides)
    return [
        key
        for key in keys
        if len({_identity(r.overrides.get(key)) for r in records if r.place.complete or key in r.overrides}) > 1
    ]


def sorted_rows(rows: Iterable[Row], key: str) -> list[Row]:
    """Return the rows by the column `key`: numbers, then text in natural order, then those without a value."""

    def rank(row: Row) -> tuple[int, Any]:
        value = row.get(key)
        if value is None:
            return 2, 0
        return (1, natural_key(value)) if isinstance(value, str) else (0, value)

    return sorted(rows, key=rank)


def _labels(names: Iterable[str], taken: Collection[str], kind: str) -> dict[str, str]:
    return {name: f"{kind}:{name}" if name in taken else name for name in names}


def _identity(value: Cell) -> tuple[type, Cell]:
    """Tell True from 1 and "1" from 1, but not 1.0 from 1."""
    return (float if isinstance(value, int) and not isinstance(value, bool) else type(value)), value
