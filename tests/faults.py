"""A callback that ends or watches a run from inside, for runs that are started as real commands."""

import json
import os
import signal
from pathlib import Path

from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch import Callback

KILL = "JSAE_TEST_KILL"
"""Environment variable "RANK:STEP": that rank kills itself when that optimizer step has been made; "all": each one."""


class KillSelf(Callback):
    """SIGKILL as `kill` or the environment says, but not in a run that was resumed."""

    def __init__(self, kill=""):
        self.kill = kill

    def on_train_start(self, trainer, pl_module):
        self.is_resumed = trainer.global_step > 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rank, _, step = (self.kill or os.environ.get(KILL, "")).partition(":")
        is_chosen = rank in (str(trainer.global_rank), "all")
        if is_chosen and not self.is_resumed and trainer.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)


class RecordReturns(HydraCallback):
    """Writes what each job of a sweep returned to its sweeper, a line each."""

    def __init__(self, path):
        self.path = Path(path)

    def on_job_end(self, config, job_return, **kwargs):
        with self.path.open("a") as file:
            file.write(f"{config.hydra.job.num} {job_return.return_value!r}\n")


class RecordBuckets(Callback):
    """Writes what DDP reduces and broadcasts to `ddp_<rank>.json` in `folder`."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        ddp = trainer.model
        found = {
            "class": type(ddp).__name__,
            "parameters": [name for name, _ in ddp.module.named_parameters()],
            "bucket_bytes": ddp._get_ddp_logging_data()["bucket_sizes"],
            "broadcast_buffers": ddp.broadcast_buffers,
        }
        (self.folder / f"ddp_{trainer.global_rank}.json").write_text(json.dumps(found))
