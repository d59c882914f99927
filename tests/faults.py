"""A callback that ends or watches a run from inside, for runs that are started as real commands."""

import json
import os
import signal
from pathlib import Path

from lightning.pytorch import Callback

KILL = "JSAE_TEST_KILL"
"""Environment variable "RANK:STEP": that rank kills itself when that optimizer step has been made; "all": each one."""


class KillSelf(Callback):
    """SIGKILL, as KILL says; nothing without it."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rank, _, step = os.environ.get(KILL, "").partition(":")
        if step and trainer.global_step == int(step) and rank in (str(trainer.global_rank), "all"):
            os.kill(os.getpid(), signal.SIGKILL)


class KillFirstStart(KillSelf):
    """The same, but not when torchrun has started the ranks again."""

    def on_train_batch_end(self, trainer, *args):
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            super().on_train_batch_end(trainer, *args)


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
