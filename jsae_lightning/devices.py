"""Which devices a job of a sweep gets when several run at the same time on one machine."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from jsae_lightning.errors import UserError

_SECONDS_BETWEEN_TRIES = 0.5


@contextmanager
def job_environment(cfg: DictConfig) -> Iterator[dict[str, str]]:
    """Yield the environment variables that pin a job to devices of its own while the context lasts.

    One job at a time (Hydra's basic launcher) may use everything: no variables. With a launcher of `n_jobs` jobs, on
    GPUs: `CUDA_VISIBLE_DEVICES`, as many as `trainer.devices`, which no other job has; a job waits until some are
    free. On CPUs: an equal share of the cores as threads (unless `num_threads` is set).

    Raises:
        UserError: a job wants more GPUs than there are.
    """
    num_jobs = _jobs_at_a_time()
    if num_jobs == 1:
        yield {}
    elif gpus := _visible_gpus(cfg):
        with ExitStack() as stack:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(_free_group(_groups(gpus, cfg.trainer.devices), stack))}
    else:
        yield {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_jobs))}


def _jobs_at_a_time() -> int:
    num_jobs = int(HydraConfig.get().launcher.get("n_jobs", 1))
    return (os.cpu_count() or 1) if num_jobs < 0 else num_jobs


def _visible_gpus(cfg: DictConfig) -> list[str]:
    """Return the names of the CUDA devices that this process sees; none for a run on the CPU."""
    if cfg.trainer.accelerator == "cpu":
        return []
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names if names != [""] else [str(index) for index in range(torch.cuda.device_count())]


def _groups(gpus: list[str], size: int) -> list[list[str]]:
    groups = [gpus[start : start + size] for start in range(0, len(gpus) - size + 1, size)]
    if not groups:
        raise UserError(f"trainer.devices: {size}, but this machine shows {len(gpus)} GPU(s): lower it")
    return groups


def _free_group(groups: list[list[str]], stack: ExitStack) -> list[str]:
    """Wait for a group that no job of the sweep holds; the lock goes when `stack` closes, or with the process."""
    folder = Path(HydraConfig.get().sweep.dir)
    while True:
        for number, group in enumerate(groups):
            slot = (folder / f".devices_{number}").open("w")
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                slot.close()
                continue
            stack.callback(slot.close)
            return group
        time.sleep(_SECONDS_BETWEEN_TRIES)
