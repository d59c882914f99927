"""What a job's folder says of the job: status, time, step, figures. Whatever is missing or damaged is None.

Imports neither torch nor lightning.
"""

import csv
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jsae_lightning.override_values import Cell, override_values, printable
from jsae_lightning.run_status import Attempt, RunStatus, is_locked, read_status
from jsae_lightning.sweep_folders import METRICS, JobFolder, read_json
from jsae_lightning.sweep_progress import last_lines
from jsae_lightning.sweeps import CONSOLE

STATUSES = ("finished", "running", "failed", "killed", "unfinished", "not started")

_TAIL_BYTES = 1 << 18  # of csv/metrics.csv: many of its rows, however long the run


@dataclass(frozen=True)
class JobRecord:
    """What is known of a job. `status` is one of STATUSES; `message` is of a failed attempt, in one line."""

    place: JobFolder
    status: str
    wall_seconds: float | None
    attempts: int | None
    step: int | None
    message: str | None
    overrides: dict[str, Cell]
    metrics: dict[str, Cell]

    @property
    def job(self) -> str:
        """The job's name: its folder, relative to the sweep's."""
        return printable(self.place.name)


def read_job(place: JobFolder) -> JobRecord:
    """Read a job's folder, in whatever state it is."""
    recorded = read_status(place.folder)
    metrics = read_metrics(place.folder / METRICS)
    status = _status(place.folder, recorded, metrics)
    last = recorded.attempts[-1] if recorded is not None and recorded.attempts else None
    message = str(last.message) if status == "failed" and last is not None and last.message else None
    steps = metrics.get("run/steps")
    return JobRecord(
        place=place,
        status=status,
        wall_seconds=_wall_seconds(place.folder, recorded, metrics),
        attempts=len(recorded.attempts) if recorded is not None else None,
        step=steps if isinstance(steps, int) else last_logged_step(place.folder / "csv" / "metrics.csv"),
        message=_one_line(message) if message is not None else None,
        overrides=override_values(place.overrides or []),
        metrics=metrics,
    )


def read_metrics(path: Path) -> dict[str, Cell]:
    """Return the figures of a `metrics.json`: numbers and strings; null, NaN and whatever is neither as None."""
    content = read_json(path)
    return {printable(tag): _cell(value) for tag, value in content.items()} if isinstance(content, dict) else {}


def last_logged_step(path: Path) -> int | None:
    """Return the step of the last whole row of a `csv/metrics.csv`: a kill may have cut the last line short."""
    lines = _tail(path).split("\n")[:-1]  # what comes after the last line's end is no whole line
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            columns = len(next(csv.reader([file.readline()]), []))
        for line in reversed(lines):
            row = next(csv.reader([line]), [])
            if len(row) == columns and re.fullmatch("[0-9]{1,18}", row[0]):
                return int(row[0])
    except (OSError, csv.Error):
        return None
    return None


def last_log_line(folder: Path) -> str | None:
    """Return the last line, not blank, that a job printed (a sweep keeps that), else that it logged."""
    lines = last_lines(folder / CONSOLE, 1) or last_lines(folder / "train.log", 1)
    return _one_line(lines[-1]) if lines else None


def _status(folder: Path, recorded: RunStatus | None, metrics: dict[str, Cell]) -> str:
    ended = metrics.get("run/status")
    if recorded is None:
        if is_locked(folder):
            return "running"
        if ended == "finished":
            return "finished"
        return "unfinished" if _files(folder) else "not started"
    if recorded.status == "finished" and ended == "stopped":
        return "unfinished"
    return recorded.status if recorded.status in STATUSES else "unfinished"


def _wall_seconds(folder: Path, recorded: RunStatus | None, metrics: dict[str, Cell]) -> float | None:
    """Sum the attempts' seconds, or take the last attempt's from the metrics where nothing tells of attempts."""
    attempts = recorded.attempts if recorded is not None else []
    known = [seconds for seconds in map(_seconds, attempts) if seconds is not None]
    known += _estimated_seconds(folder, attempts)
    if known:
        return round(sum(known), 3)
    seconds = metrics.get("time/seconds")
    return float(seconds) if isinstance(seconds, (int, float)) else None


def _seconds(attempt: Attempt) -> float | None:
    value = _cell(attempt.seconds)
    return float(value) if isinstance(value, (int, float)) else None


def _estimated_seconds(folder: Path, attempts: list[Attempt]) -> list[float]:
    """Estimate each attempt without an end: until the newest file that was written before the next attempt began."""
    if all(_seconds(attempt) is not None for attempt in attempts):
        return []
    times = _modification_times(folder)
    starts = [_timestamp(attempt.started_at) for attempt in attempts]
    estimates = []
    for attempt, start, following in zip(attempts, starts, [*starts[1:], None], strict=True):
        if _seconds(attempt) is None and start is not None:
            end = max((time for time in times if start <= time < (following or math.inf)), default=None)
            estimates += [end - start] if end is not None else []
    return estimates


def _modification_times(folder: Path) -> list[float]:
    times = []
    for path in _files(folder):
        with suppress(OSError):  # a job that runs replaces its files
            times.append(path.stat().st_mtime)
    return times


def _timestamp(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _files(folder: Path) -> list[Path]:
    """Every file of a job; a table of results, which may lie in a single run's folder, is not one."""
    return [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if not (Path(place) == folder and re.fullmatch(r"results\.(csv|md|parquet)", name))
    ]


def _cell(value: object) -> Cell:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int)) else None


def _tail(path: Path) -> str:
    """Return the end of a file; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
