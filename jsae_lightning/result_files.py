"""The files of a sweep's results: CSV, Parquet, Markdown. Imports pyarrow only when it writes."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.errors import UserError
from jsae_lightning.override_values import Cell
from jsae_lightning.result_table import ResultTable

if TYPE_CHECKING:
    import pyarrow

_TEXT, _FLOAT, _INTEGER, _BOOLEAN = "string", "float64", "int64", "bool"
_BASE_TYPES = {
    "job": _TEXT,
    "status": _TEXT,
    "wall_seconds": _FLOAT,
    "attempts": _INTEGER,
    "step": _INTEGER,
    "message": _TEXT,
}
_MARKDOWN_ESCAPES = str.maketrans({character: f"\\{character}" for character in "\\|`*<"})


def write_results(table: ResultTable, markdown: str, folder: Path) -> None:
    """Write `results.csv`, `results.md` and `results.parquet` to `folder`, each whole or not at all.

    Raises UserError where that cannot be done.
    """
    try:
        with atomic_file(folder / "results.csv") as temporary:
            _write_csv(table, temporary)
        with atomic_file(folder / "results.md") as temporary:
            temporary.write_text(markdown + "\n", encoding="utf-8")
        with atomic_file(folder / "results.parquet") as temporary:
            _write_parquet(table, temporary)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}): choose another folder with --output DIR"
        ) from error


def cell_text(value: Cell) -> str:
    """Return a value as it stands in the CSV: numbers so that reading them gives the same bits, None as nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Return a table in GitHub's Markdown whose columns are aligned also where it is read as text.

    Args:
        names: of the columns.
        rows: the cells' texts, each row as long as `names`.
        numeric: which columns are aligned to the right.
    """
    cells = [[text.translate(_MARKDOWN_ESCAPES) for text in row] for row in (names, *rows)]
    widths = [max(3, *(cell_len(row[column]) for row in cells)) for column in range(len(names))]
    rule = [f"{'-' * (width - 1)}{':' if right else '-'}" for width, right in zip(widths, numeric, strict=True)]
    lines = [[_padded(*cell) for cell in zip(row, widths, numeric, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _write_csv(table: ResultTable, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows([cell_text(row[name]) for name in table.columns] for row in table.rows)


def _write_parquet(table: ResultTable, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = [_array([row[name] for row in table.rows], _BASE_TYPES.get(name)) for name in table.columns]
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=table.columns), path)


def _array(values: list[Cell], kind: str | None) -> "pyarrow.Array":
    import pyarrow

    kind = kind or column_type(values)
    if kind == _TEXT:
        values = [None if value is None else cell_text(value) for value in values]
    return pyarrow.array(values, type=pyarrow.type_for_alias(kind))


def column_type(values: Sequence[Cell]) -> str:
    """Return the narrowest Arrow type that holds all values of a column as they are; numbers where there are none."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return _BOOLEAN
    if any(isinstance(value, (bool, str)) or not -(2**63) <= value < 2**63 for value in known):
        return _TEXT
    return _INTEGER if known and all(isinstance(value, int) for value in known) else _FLOAT
