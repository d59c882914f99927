"""What the folders of a sweep's jobs hold already, and whether the sweep may touch it.

Imports neither torch nor lightning.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsae_lightning.errors import UserError
from jsae_lightning.launch import RECORD, is_recorded, with_absolute_paths

_NOT_OF_THE_RUN = (
    "hydra.", "ckpt_path=", "sweep.", "num_threads=", "trainer.devices=", "trainer.num_nodes=",
    "trainer.accelerator=", "trainer.strategy=", "trainer.accumulate_grad_batches=", "data.prefetch=",
    "data.cache_dir=", "logger", "paths.", "objective=", "checkpoint.",
)  # fmt: skip
"""Overrides that say how to go about a run, or where: it may have been continued alone with others. Not so `trainer=`,
which also chooses the precision."""


def earlier_run(folder: Path, overrides: Sequence[str], *, resume: bool, own_job: str | None = None) -> str:
    """Say what a job's folder holds: "", "finished" or "unfinished".

    "" stands for nothing yet, or for what another rank of Slurm's `own_job` has just noted.

    Raises:
        UserError: it holds a run and `resume` is false, or a run with other overrides; its record is damaged.
    """
    if not is_recorded(folder):
        return ""
    record = _read_record(folder)
    if own_job is not None and record.get("slurm_job_id") == own_job:
        return ""
    _check(folder, record, overrides, resume=resume)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return "finished" if metrics["run/status"] == "finished" else "unfinished"
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished"


def check_sweep_folder(sweep: Path, jobs: Sequence[Sequence[str]], *, resume: bool) -> None:
    """Check the folders of all jobs of a sweep, named by their numbers, before any of them is touched.

    Hydra rewrites `.hydra/` in a job's folder before the job itself can look at what is there. A damaged record is
    left to its job: the others are none the worse for it.

    Raises:
        UserError: a folder holds a run and `resume` is false, or a run with other overrides.
    """
    for number, overrides in enumerate(jobs):
        folder = sweep / str(number)
        if not is_recorded(folder):
            continue
        try:
            record = _read_record(folder)
        except UserError:
            continue
        _check(folder, record, overrides, resume=resume)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "overrides": list(content["overrides"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}): remove the folder to train the job again") from error


def _check(folder: Path, record: dict[str, Any], wanted: Sequence[str], *, resume: bool) -> None:
    if not resume:
        raise UserError(
            f"hydra.sweep.dir: {folder} holds a run already: go on with the sweep by sweep.resume=true, "
            "or choose another folder"
        )
    was = _of_the_run(record["overrides"], record.get("cwd"))
    if changed := was ^ _of_the_run(wanted, None):
        raise UserError(
            f"sweep.resume: {folder} holds a run with other overrides (differing in {', '.join(sorted(changed))}): "
            "repeat the sweep as it was, or choose another hydra.sweep.dir"
        )


def _of_the_run(overrides: Sequence[str], folder: str | None) -> set[str]:
    """Overrides that were given in `folder` (None: this one), so that they compare."""
    own = [override for override in overrides if not override.lstrip("+~").startswith(_NOT_OF_THE_RUN)]
    return set(with_absolute_paths(own, folder or Path.cwd()))
