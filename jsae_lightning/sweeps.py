"""Sweeps: every job is a process of its own that does a single run, and none stops or hangs the others.

Lightning's launcher restarts ranks with the arguments of rank 0: with `-m` in them each rank would replay the whole
sweep. So the process that Hydra gives a job to trains nothing; it starts

    python -m jsae_lightning.train OVERRIDES hydra.run.dir=JOB_FOLDER hydra.mode=RUN        > JOB_FOLDER/console.log

shows how far it is, and returns the objective, NaN for a job that failed. What failed is reported when all have ended.
"""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.devices import job_environment
from jsae_lightning.earlier_runs import check_sweep_folder, earlier_run
from jsae_lightning.errors import UserError
from jsae_lightning.launch import SWEEP_RECORD, config_flags, exit_codes, find_checkpoint, quoted
from jsae_lightning.processes import is_restarted
from jsae_lightning.run_status import add_ended_attempt
from jsae_lightning.slurm import end_lost_jobs, is_submitit_task
from jsae_lightning.sweep_progress import JobProgress, last_lines

JOB_NUMBER = "${hydra.job.num}"
"""The name of a job's folder, unless `hydra.sweep.subdir` is changed: then each job looks for itself what is there."""
FAILURES = ".failures.jsonl"
"""The file in a sweep's folder that lists the jobs that failed since the sweep was started, until it is reported."""
CONSOLE = "console.log"
"""The file in a job's folder that holds what its process printed."""
SWEEP_FOLDER = "JSAESWEEP_FOLDER"  # in the environment, as jobs may run in other processes of a launcher's


class SweepFolder(Callback):
    """Hydra callback: notes which jobs a sweep has, in `sweep.json` of its folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the record; sweepers other than Hydra's basic one choose their jobs on the way, so it has none.

        Ends the process, with nothing written, if the folder holds runs that the sweep may not touch.
        """
        folder = Path(config.hydra.sweep.dir).absolute()
        try:
            jobs = list_jobs(config) if "BasicSweeper" in config.hydra.sweeper._target_ else []
        except HydraException:  # glob(...) is known to the sweeper only
            jobs = []
        patterns = OmegaConf.to_container(config.hydra.sweep)
        assert isinstance(patterns, dict)
        if patterns["subdir"] == JOB_NUMBER:
            with exit_codes("jsae-train"):  # Hydra makes warnings of a callback's errors
                check_sweep_folder(folder, jobs, resume=config.sweep.resume)
        os.environ[SWEEP_FOLDER] = str(folder)
        launcher = config.hydra.launcher
        if "SlurmLauncher" in launcher._target_:
            end_lost_jobs(folder, launcher.nodes * launcher.tasks_per_node)
        (folder / FAILURES).unlink(missing_ok=True)
        with atomic_file(folder / SWEEP_RECORD) as temporary:
            temporary.write_text(json.dumps({"jobs": jobs}, indent=1) + "\n", encoding="utf-8")


def list_jobs(config: DictConfig) -> list[list[str]]:
    """Return the overrides of every job that Hydra's basic sweeper will run, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    assert isinstance(params, dict)
    arguments = [f"{key!s}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    parsed: list[Override] = OverridesParser.create().parse_overrides(arguments)
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def varying(jobs: list[list[str]]) -> list[list[str]]:
    """Return of each job's overrides those that are not the same in all jobs."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [[override for override in job if override not in common] for job in jobs]


@dataclass(frozen=True)
class SweepJob:
    """One job, as Hydra composed it: its number, the number of jobs (0: not known), folder and overrides."""

    num: int
    num_jobs: int
    folder: Path
    overrides: list[str]
    varying: list[str]

    @classmethod
    def from_hydra(cls) -> "SweepJob":
        """Read Hydra's configuration of the job."""
        hydra = HydraConfig.get()
        overrides = list(hydra.overrides.task)
        jobs = recorded_jobs(Path(os.environ[SWEEP_FOLDER])) if SWEEP_FOLDER in os.environ else []
        num = int(hydra.job.num)
        own = varying(jobs)[num] if num < len(jobs) else overrides
        return cls(num, len(jobs), Path(hydra.runtime.output_dir), overrides, own)

    @property
    def label(self) -> str:
        """`job 3 of 12 (sae.k=32)`, counted from 0 as the folders are."""
        return f"job {self.num}{f' of {self.num_jobs}' if self.num_jobs else ''} ({' '.join(self.varying)})"

    def command(self, *, resume: bool) -> list[str]:
        """Return what runs the job."""
        command = [sys.executable, "-m", "jsae_lightning.train", *config_flags(), *self.overrides]
        return command + ["ckpt_path=auto"] * resume + [f"hydra.run.dir={quoted(str(self.folder))}", "hydra.mode=RUN"]


def is_sweep_job() -> bool:
    """Whether Hydra gave this process a job of a sweep, which it must not train itself (a submitit task may)."""
    return HydraConfig.get().mode == RunMode.MULTIRUN and not is_submitit_task()


def enter_slurm_job(cfg: DictConfig) -> float | None:
    """Prepare this process, in a job of Slurm's, to train a job of a sweep; return its objective if it is finished.

    After a requeue, and with `sweep.resume`, the run goes on from its last checkpoint.

    Raises:
        UserError: the folder holds another run.
    """
    job = SweepJob.from_hydra()
    own_job = None if is_restarted() else os.environ.get("SLURM_JOB_ID")
    resume = cfg.sweep.resume or is_restarted()
    found = earlier_run(job.folder, job.overrides, resume=resume, own_job=own_job)
    if found == "finished":
        return read_objective(job.folder / "metrics.json", cfg.objective)
    # Not by `found`, which rank 0 may have noted just now: all ranks must agree. Checkpoints come later.
    if resume and (cfg.ckpt_path is None or find_checkpoint(job.folder)):
        cfg.ckpt_path = "auto"
    return None


def run_sweep_job(cfg: DictConfig) -> float:
    """Run one job of a sweep and return its objective, NaN if it failed; with `sweep.resume` skip or resume it.

    Raises:
        UserError: this process is one of several ranks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
        raise UserError(
            "-m: a sweep starts the ranks of its jobs itself, but here every rank would run all of it: start "
            "jsae-train -m without torchrun or srun, with trainer=ddp, or with hydra/launcher=slurm_gpu"
        )
    job = SweepJob.from_hydra()
    progress = JobProgress(job.label, job.folder / CONSOLE)
    try:
        if found := earlier_run(job.folder, job.overrides, resume=cfg.sweep.resume):
            if found == "finished":
                objective = read_objective(job.folder / "metrics.json", cfg.objective)
                progress.say(f"finished earlier, {cfg.objective} {objective:.6g}")
                return objective
            has_saved = find_checkpoint(job.folder) is not None
            progress.say(
                "goes on from its last checkpoint" if has_saved else "begins again: it had not saved a checkpoint yet"
            )
        code = _run(job, cfg, progress, resume=bool(found))
        if code:
            return math.nan
        objective = read_objective(job.folder / "metrics.json", cfg.objective)
        progress.say(f"finished in {progress.elapsed}, {cfg.objective} {objective:.6g}")
        return objective
    except (UserError, OSError, ValueError, TypeError) as error:  # a damaged folder, a full disk: of this job only
        progress.say(f"failed: {error}")
        code = 2 if isinstance(error, UserError) else 1
        with suppress(Exception):
            add_ended_attempt(job.folder, pid=os.getpid(), seconds=0.0, exit_code=code, message=str(error))
        _note_failure(job, code, str(error))
        return math.nan


def _run(job: SweepJob, cfg: DictConfig, progress: JobProgress, *, resume: bool) -> int:
    """Run the job's process to its end and return its exit code; note one that it could not note itself."""
    with job_environment(cfg) as environment, (job.folder / CONSOLE).open("ab") as console:
        progress.say("starts")
        began = time.monotonic()
        process = subprocess.Popen(
            job.command(resume=resume), stdout=console, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        try:
            code = progress.follow(process)
        except BaseException:  # Ctrl-C, which the job gets too
            _stop(process)
            raise
    if code:
        reason = exit_reason(code, job.folder / CONSOLE)
        progress.say(f"failed after {progress.elapsed}: {reason}")
        seconds = time.monotonic() - began
        add_ended_attempt(job.folder, pid=process.pid, seconds=seconds, exit_code=code, message=reason)
    return code


def _note_failure(job: SweepJob, code: int, message: str) -> None:
    """Tell the sweep's report: the status of a run that was finished before does not."""
    line = json.dumps({"job": str(job.folder), "exit_code": code, "message": message})
    with suppress(OSError, KeyError), (Path(os.environ[SWEEP_FOLDER]) / FAILURES).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def noted_failures(sweep: Path) -> dict[Path, tuple[int, str]]:
    """Return exit code and message of each job that failed in this sweep without a process of its own."""
    try:
        lines = [json.loads(line) for line in (sweep / FAILURES).read_text(encoding="utf-8").splitlines()]
        return {Path(line["job"]): (int(line["exit_code"]), str(line["message"])) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _stop(process: subprocess.Popen) -> None:
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def exit_reason(code: int, console: Path) -> str:
    """Say in words how a process ended: the signal, or the last line that it printed."""
    if code < 0:
        hint = ": killed, perhaps for want of memory" if code == -9 else ""
        return f"ended by signal {-code}{hint}"
    lines = last_lines(console, 1)
    said = lines[0].removeprefix("jsae-train: error: ") if lines else "it printed nothing"
    return f"exit code {code}: {said}"


def read_objective(path: Path, name: str) -> float:
    """Return one figure of a run's `metrics.json`; NaN where the run recorded it as null."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if name not in metrics:
        raise UserError(f"objective: '{name}' is not in {path}: choose one of {', '.join(sorted(metrics))}")
    return math.nan if metrics[name] is None else float(metrics[name])


def recorded_jobs(folder: Path) -> list[list[str]]:
    """Return the overrides of a sweep's jobs, as its folder's record has them; none if there is no such record."""
    try:
        return json.loads((folder / SWEEP_RECORD).read_text(encoding="utf-8"))["jobs"]
    except (OSError, ValueError, KeyError):
        return []
