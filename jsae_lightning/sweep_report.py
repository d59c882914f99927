"""What a sweep ends with: how its jobs ended, what failed and why, how to go on, and the exit code."""

import os
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsae_lightning.launch import quoted
from jsae_lightning.run_status import read_status
from jsae_lightning.slurm import wait_for_jobs
from jsae_lightning.sweep_progress import last_lines
from jsae_lightning.sweeps import CONSOLE, FAILURES, SWEEP_FOLDER, noted_failures, recorded_jobs


@dataclass
class SweepReport:
    """Around a sweep: prints how its jobs ended, and gives the exit code. Nothing of it shows for a single run."""

    exit_code: int = 0

    def __enter__(self) -> "SweepReport":
        os.environ.pop(SWEEP_FOLDER, None)  # of a sweep that started this process
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> bool:
        """Report; of a job that Slurm has ended nothing more is to be said than the report does."""
        folder = os.environ.pop(SWEEP_FOLDER, None)
        if folder is None:
            return False
        is_slurms = kind is not None and kind.__module__.startswith("submitit.")
        if is_slurms:
            wait_for_jobs(Path(folder))
        text, self.exit_code = report(Path(folder))
        (Path(folder) / FAILURES).unlink(missing_ok=True)
        print(text, flush=True)
        if is_slurms:
            self.exit_code = self.exit_code or 1
        return is_slurms


def report(folder: Path) -> tuple[str, int]:
    """Return the report on the sweep in `folder` and its exit code: 0 if all jobs have finished.

    Otherwise 1, or 2 if every job has started and each that failed did so by a mistake in the input.
    """
    statuses = {path.parent: read_status(path.parent) for path in sorted(folder.rglob("status.json"), key=_natural)}
    known = {job: status for job, status in statuses.items() if status is not None}
    for job, (code, message) in noted_failures(folder).items():
        status = known.get(job)
        if status is not None and status.status == "finished":  # before this sweep, which asks for something else
            last = replace(status.attempts[-1], exit_code=code, message=message)
            known[job] = replace(status, status="failed", attempts=[last])
    counts = {
        state: sum(s.status == state for s in known.values()) for state in ("finished", "running", "failed", "killed")
    }
    counts["not started"] = max(0, len(recorded_jobs(folder)) - len(known))
    lines = [f"sweep {folder}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n or state == "finished")]
    codes: list[int | None] = [None] * counts["not started"]
    for job, status in known.items():
        if status.status == "finished":
            continue
        if not status.attempts:
            codes.append(None)
            continue
        last = status.attempts[-1]
        codes.append(last.exit_code)
        seconds = timedelta(seconds=round(status.seconds or 0))
        lines.append(f"  {job.relative_to(folder)}: {status.status} after {seconds}: {last.message or 'no message'}")
        if last.exit_code != 2:  # then the message is the one line that there is
            lines += [f"    | {line}" for line in last_lines(job / CONSOLE, 5)]
    if codes:
        place = shlex.quote(f"hydra.sweep.dir={quoted(str(folder))}")
        lines.append(f"go on: the same command with sweep.resume=true {place}")
    lines.append(f"table: jsae-collect {shlex.quote(str(folder))}")
    return "\n".join(lines), 0 if not codes else (2 if set(codes) == {2} else 1)


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.parent.name), "") if path.parent.name.isdecimal() else (sys.maxsize, str(path))
