"""Which jobs a sweep's folder holds, those included that have not begun. Imports neither torch nor lightning.

`sweep.json`, if the sweep wrote one, lists the overrides of each job in order: `{"jobs": [["sae.k=16"], ...]}`. A
sweeper that chooses its jobs on the way leaves it empty.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jsae_lightning.launch import RECORD, SWEEP_MARKS, SWEEP_RECORD
from jsae_lightning.run_status import STATUS

METRICS = "metrics.json"
HYDRA_OVERRIDES = ".hydra/overrides.yaml"
_MARKS = (HYDRA_OVERRIDES, RECORD, STATUS, METRICS)


@dataclass(frozen=True)
class JobFolder:
    """A job: its name (the folder relative to the sweep's), its folder, which need not exist, and its overrides."""

    name: str
    folder: Path
    overrides: list[str] | None = None
    """None: nothing readable says what they are."""
    complete: bool = False
    """The overrides come from the job's own folder, so they are all that it has."""
    resumable: bool = False
    """The folder remembers its overrides: `ckpt_path=auto hydra.run.dir=FOLDER` is enough to go on."""


def find_jobs(folder: Path) -> list[JobFolder]:
    """Return the jobs in `folder`, in natural order: those found in folders, and those that `sweep.json` lists.

    `folder` may be a sweep's, one that holds runs, or a single run's: its job is then called ".".
    """
    found = [_job_folder(folder, path) for path in _job_paths(folder)]
    jobs = _with_listed(folder, found, _listed(folder / SWEEP_RECORD))
    if not jobs and _looks_like_a_job(folder):
        jobs = [_job_folder(folder, folder)]
    return sorted(jobs, key=lambda job: natural_key(job.name))


def natural_key(text: str) -> list[Any]:
    """Return a sorting key by which 2 comes before 10."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if position % 2 else part for position, part in enumerate(parts)]


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _job_paths(root: Path) -> list[Path]:
    """Folders below `root` that look like a job's; in a sweep's folder, also those named by a number."""
    paths: list[Path] = []
    direct: list[Path] = []
    for place, names, _ in os.walk(root):
        folder = Path(place)
        if folder == root:
            direct = [root / name for name in names]
        elif _looks_like_a_job(folder):
            paths.append(folder)
            names.clear()  # a job's folder is large and holds no other job
        names[:] = [name for name in names if not name.startswith(".")]
    if any((root / mark).exists() for mark in SWEEP_MARKS):
        begun = {path.relative_to(root).parts[0] for path in paths}
        paths += [path for path in direct if path.name.isdecimal() and path.name not in begun]
    return paths


def _looks_like_a_job(folder: Path) -> bool:
    return any(os.path.lexists(folder / mark) for mark in _MARKS)


def _job_folder(root: Path, path: Path) -> JobFolder:
    record = read_json(path / RECORD)
    overrides = _strings(record.get("overrides")) if isinstance(record, dict) else None
    resumable = overrides is not None and isinstance(record.get("flags"), list)
    if overrides is None:
        overrides = _strings(_read_yaml(path / HYDRA_OVERRIDES))
    return JobFolder(path.relative_to(root).as_posix(), path, overrides, overrides is not None, resumable)


def _strings(value: Any) -> list[str] | None:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else None


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None  # garbage makes PyYAML raise more than its own errors


def _listed(path: Path) -> list[list[str]]:
    """Return the overrides of each job that `sweep.json` lists; none if it is missing or damaged."""
    content = read_json(path)
    jobs = content.get("jobs") if isinstance(content, dict) else None
    return [_strings(job) or [] for job in jobs] if isinstance(jobs, list) else []


def _with_listed(root: Path, found: list[JobFolder], listed: list[list[str]]) -> list[JobFolder]:
    """Add the listed jobs that have no folder, and tell the listed overrides to folders that have lost their own.

    A folder belongs to a listed job by its number together with the overrides, by the overrides alone
    (`hydra.sweep.subdir` may name it), or by the number alone (it was resumed with others), in this order.
    """
    left = {job.name: job for job in found}
    rows: dict[int, JobFolder] = {}
    matches: list[Callable[[int, JobFolder], bool]] = [
        lambda number, job: job.name == str(number) and (not job.complete or _covers(job, listed[number])),
        lambda number, job: job.complete and _covers(job, listed[number]),
        lambda number, job: job.name == str(number),
    ]
    for matches_job in matches:
        for number in range(len(listed)):
            if number not in rows:
                match = next((job for job in left.values() if matches_job(number, job)), None)
                if match is not None:
                    rows[number] = left.pop(match.name)
    jobs = list(left.values())
    for number, overrides in enumerate(listed):
        job = rows.get(number, JobFolder(str(number), root / str(number)))
        jobs.append(job if job.complete else JobFolder(job.name, job.folder, overrides))
    return jobs


def _covers(job: JobFolder, overrides: list[str]) -> bool:
    return set(overrides) <= set(job.overrides or [])
