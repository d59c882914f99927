"""Runs on a Slurm cluster: the tasks that submitit's launcher starts, and what Slurm and the trainer must agree on.

Imports neither torch nor lightning.
"""

import atexit
import getpass
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig

from jsae_lightning.config import world_size
from jsae_lightning.errors import UserError
from jsae_lightning.processes import is_rank_zero
from jsae_lightning.run_status import add_ended_attempt

_OWN_CODES = (1, 2)
_SECONDS_BETWEEN_LOOKS = 5.0
_LOOKS_UNTIL_LOST = 6  # half a minute, in which a result is on its way through a file system
_INTERACTIVE = ("bash", "interactive")  # names of jobs in which Lightning takes no notice of Slurm


def is_submitit_task() -> bool:
    """Whether submitit has started this process, as a task of a sweep's job."""
    return "SUBMITIT_EXECUTOR" in os.environ


@contextmanager
def noted_end(folder: Path) -> Iterator[None]:
    """Around a run: note in `status.json` why a task of submitit's failed, and go on after the block.

    A task that ended here would leave the sweep's process waiting for its result: so the task returns to submitit, and
    its process ends with the run's exit code after that. What ends for another reason (requeued, cancelled) has no
    result yet, and a run outside submitit is none of ours: their SystemExit passes.
    """
    began = time.monotonic()
    try:
        yield
    except SystemExit as error:
        if not is_submitit_task() or error.code not in _OWN_CODES:
            raise
        if is_rank_zero():
            seconds, reason = time.monotonic() - began, str(error.__context__)
            add_ended_attempt(folder, pid=os.getpid(), seconds=seconds, exit_code=int(error.code), message=reason)
        atexit.register(_exit, int(error.code))


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_tasks(cfg: DictConfig) -> None:
    """Check that Slurm started as many tasks as the trainer has devices; raise UserError with the keys to change."""
    tasks = os.environ.get("SLURM_NTASKS")
    if tasks is None or os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE:
        if "SLURMEnvironment" in str(cfg.trainer.get("plugins")):
            raise UserError(
                "trainer=slurm: this process is no task of Slurm's: start it by hydra/launcher=slurm_gpu, "
                "slurm_multi_gpu or slurm_multi_node with -m, by sbatch conf/slurm/train.sbatch, or use trainer=ddp"
            )
    elif int(tasks) != world_size(cfg) and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UserError(
            f"trainer.devices: {cfg.trainer.devices} on trainer.num_nodes={cfg.trainer.num_nodes}, but Slurm started "
            f"{tasks} tasks: make --nodes (hydra.launcher.nodes) equal to trainer.num_nodes and --ntasks-per-node "
            "(hydra.launcher.tasks_per_node) to trainer.devices, and start with srun"
        )


def end_lost_jobs(sweep: Path, num_tasks: int) -> None:
    """In the background, give every job of the sweep that is gone from Slurm's queue without a result an error as such.

    The launcher waits for a job's results, or for the word of `sacct`, which not every cluster keeps: without either
    it would wait for a job that was killed for ever.
    """
    threading.Thread(target=_end_lost_jobs, args=(sweep, num_tasks), daemon=True, name="slurm-watch").start()


def _end_lost_jobs(sweep: Path, num_tasks: int) -> None:
    looks: Counter[str] = Counter()
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        queued = _queued()
        if queued is None:
            continue
        gone = [path.name for path in _job_folders(sweep) if path.name not in queued]
        looks = Counter({job: looks[job] + 1 for job in gone})
        for job in [job for job, count in looks.items() if count == _LOOKS_UNTIL_LOST]:
            for task in range(num_tasks):
                _write_error(sweep / ".submitit" / job / f"{job}_{task}_result.pkl", job)


def _write_error(result: Path, job: str) -> None:
    """Write what submitit writes for a task that failed; never over a result that has come after all."""
    draft = result.with_name(f".{result.name}.lost")
    draft.write_bytes(pickle.dumps(("error", f"job {job} left Slurm's queue without a result")))
    with suppress(FileExistsError):
        os.link(draft, result)
    draft.unlink()


def wait_for_jobs(sweep: Path) -> None:
    """Wait until none of the sweep's jobs is in Slurm's queue, or Slurm has not answered for half a minute.

    The launcher stops waiting at the first job that failed; the others go on all the same.
    """
    failures = 0
    while failures < _LOOKS_UNTIL_LOST:
        queued = _queued()
        failures = failures + 1 if queued is None else 0
        if queued is not None and queued.isdisjoint(path.name for path in _job_folders(sweep)):
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _job_folders(sweep: Path) -> list[Path]:
    """The launcher's folders of single jobs, named by Slurm's numbers: 17, or 17_3 in an array."""
    return [path.parent for path in (sweep / ".submitit").glob("*/*_submitted.pkl")]


def _queued() -> set[str] | None:
    """Return the numbers of the jobs that are running or waiting; None if Slurm does not answer now."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(asked.stdout.split()) if asked.returncode == 0 else None
