"""One table of a sweep's jobs: overrides that vary, status, wall time, final metrics.

jsae-collect logs/sweeps/DATE                                  # results.csv, results.md, results.parquet in it
jsae-collect logs/runs --output tables --sort val/loss
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from jsae_lightning.errors import UserError
from jsae_lightning.job_records import STATUSES, JobRecord, last_log_line, read_job
from jsae_lightning.launch import command_to_go_on, exit_codes
from jsae_lightning.override_values import Cell
from jsae_lightning.result_files import cell_text, markdown_table, write_results
from jsae_lightning.result_table import BASE, ResultTable, Row, build_table, sorted_rows
from jsae_lightning.sweep_folders import find_jobs

PROGRAM = "jsae-collect"
HEADLINE = (
    "val/explained_variance_input",
    "val/explained_variance_output",
    "val/ce_score_both",
    "jacobian/share_above_0.01",
    "jacobian/effective_edges",
)
_NAMES_SHOWN = 8


def main() -> None:
    """Console script `jsae-collect`."""
    with exit_codes(PROGRAM):
        given = _arguments()
        records = read_jobs(given.folder)
        table = build_table(records)
        _check_names("--metric", given.metric, table.metrics, table)
        _check_names("--sort", given.sort, table.columns, table)
        rows = sorted_rows(table.rows, given.sort[0]) if given.sort else table.rows
        table = ResultTable(rows, table.varying, table.metrics)
        headline = headline_table(table, given.metric or [name for name in HEADLINE if name in table.metrics])
        output = given.output or given.folder
        write_results(table, headline, output)
        where = f"results: {output / 'results'}.csv, .md, .parquet"
        _print([headline, "", *_failure_lines(records), count_line(records), where])


def collect(folder: str | Path) -> list[Row]:
    """Return a row for each job of a sweep's folder (or a folder of runs): what `results.csv` holds, typed.

    Raises UserError if there is no such folder, or nothing in it looks like a job.
    """
    return build_table(read_jobs(folder)).rows


def read_jobs(folder: str | Path) -> list[JobRecord]:
    """Return what is known of each job in `folder`, in natural order of their names; raise UserError if none is."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: give that of a sweep, or one that holds runs")
    jobs = find_jobs(folder)
    if not jobs:
        raise UserError(
            f"{folder}: nothing in it looks like a job (a folder with .hydra/overrides.yaml, arguments.json or "
            "status.json): give the folder of a sweep, or one that holds runs"
        )
    return [read_job(job) for job in jobs]


def headline_table(table: ResultTable, metrics: Sequence[str]) -> str:
    """Return job, status, time, the overrides that vary and some metrics as a table in Markdown."""
    names = ["job", "status", "wall time", *table.varying, *metrics]
    rows = [
        [
            cell_text(row["job"]),
            cell_text(row["status"]),
            duration(row["wall_seconds"]),
            *(cell_text(row[name]) for name in table.varying),
            *(_figure(row.get(name)) for name in metrics),
        ]
        for row in table.rows
    ]
    numeric = [name == "wall time" or _all_numbers(row.get(name) for row in table.rows) for name in names]
    return markdown_table(names, rows, numeric)


def duration(seconds: Cell) -> str:
    """Return seconds as h:mm:ss; nothing where they are not known."""
    if not isinstance(seconds, (int, float)):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def count_line(records: Sequence[JobRecord]) -> str:
    """Return how many jobs there are of each status, as in `3 jobs: 2 finished, 1 not started`."""
    found = [record.status for record in records]
    counts = ", ".join(f"{found.count(status)} {status}" for status in STATUSES if status in found)
    return f"{len(found)} {'job' if len(found) == 1 else 'jobs'}: {counts}"


def resume_command(record: JobRecord) -> str | None:
    """Return the command that goes on with a job; None if nothing tells what it was started with.

    A job that ended before it had recorded its arguments needs its overrides again.
    """
    place = record.place
    overrides = [] if place.resumable else place.overrides
    if overrides is None:
        return None
    own = [text for text in overrides if not re.match(r"\+*(ckpt_path=|hydra[./])", text)]
    alone = [] if place.resumable else ["hydra.mode=RUN"]  # its experiment may say that it is a sweep
    return command_to_go_on(place.folder, [*own, *alone])


def _failure_lines(records: Iterable[JobRecord]) -> list[str]:
    lines = []
    for record in records:
        if record.status in ("failed", "killed"):
            reason = record.message or last_log_line(record.place.folder) or "nothing tells why"
            command = resume_command(record) or "repeat its overrides: none are recorded"
            lines.append(f"job {record.job} {record.status}: {reason}; go on with: {command}")
    return lines


def _figure(value: Cell) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell_text(value)


def _all_numbers(values: Iterable[Cell]) -> bool:
    return all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values)


def _check_names(option: str, names: Sequence[str], known: Sequence[str], table: ResultTable) -> None:
    """Refuse a name that no column has; a metric's (`group/name`) may be yet to come while no job has any."""
    for name in names:
        if name in known or ("/" in name and not table.metrics):
            continue
        near = difflib.get_close_matches(name, known, _NAMES_SHOWN, cutoff=0.3)
        shown = list(dict.fromkeys([*near, *known]))[:_NAMES_SHOWN]
        more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
        raise UserError(f"{option}: there is no '{name}': choose one of {', '.join(shown) or 'those to come'}{more}")


def _print(lines: Iterable[str]) -> None:
    """Print on a terminal of any encoding, or as much as a reader such as `head` wants."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: give {PROGRAM} SWEEP_DIR first, then options; see {PROGRAM} --help")


def _arguments() -> argparse.Namespace:
    parser = _Parser(
        prog=PROGRAM,
        description="One table of a sweep's jobs, finished or not: the overrides that vary, status, wall time and "
        "final metrics, as results.csv, results.md and results.parquet, and in short on the terminal.",
        epilog=f"Columns beside overrides and metrics: {', '.join(BASE)}. Exit codes: 0 done, also when jobs failed; "
        "2 a mistake in the arguments; 1 anything else.",
    )
    parser.add_argument("folder", metavar="SWEEP_DIR", type=Path, help="folder of a sweep, or one that holds runs")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write the files there (default: SWEEP_DIR)")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="metrics of the short table (the files hold all); default: " + ", ".join(HEADLINE),
    )
    parser.add_argument("--sort", metavar="KEY", nargs=1, default=[], help="sort by this column (default: job)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
