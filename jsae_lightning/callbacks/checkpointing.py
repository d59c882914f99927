"""Checkpoints by time and by steps, the best one, and logs that agree with them after a resume."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from jsae_lightning.atomic_files import atomic_file, remove_leftovers
from jsae_lightning.callbacks.throughput import paused
from jsae_lightning.checkpoint import read_checkpoint, write_checkpoint
from jsae_lightning.errors import UserError
from jsae_lightning.sequence_sources import EndOfStreamError


class AtomicCheckpointIO(CheckpointIO):
    """Reads and writes checkpoints through `checkpoint.py`: whole files only, `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary name, flush, rename."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read, refusing what is damaged or would execute code."""
        return read_checkpoint(Path(path), map_location=map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class Checkpointing(Checkpoint):
    """Keeps `last.ckpt` (the newest) and the best as `step_<optimizer step>.ckpt`.

    Saves at the end, every `every_minutes` of wall-clock time, every `every_n_steps` optimizer steps, and whenever
    `best_metric` of a new evaluation is better than before. The loggers are flushed before each save and cut back to
    the checkpoint's step on a resume, so that no step is logged twice or lost.
    """

    def __init__(
        self,
        dirpath: str,
        every_minutes: float | None,
        every_n_steps: int | None,
        best_metric: str | None,
        best_mode: str,
    ) -> None:
        self.dirpath = Path(dirpath)
        self.every_minutes, self.every_n_steps = every_minutes, every_n_steps
        self.best_metric, self.sign = best_metric, 1.0 if best_mode == "max" else -1.0
        self.best_score, self.best_step, self.saved_step = float("-inf"), -1, -1
        self._saved_at, self._saved_evaluation = time.monotonic(), -1

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and its step."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the folder in the state of the step from which this run goes on (0: a new run).

        Logs are cut back to it, the best checkpoint of a later step and what a killed save left behind are removed.
        """
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            remove_leftovers(self.dirpath)
            self._tidy_best(trainer.global_step)
            for logger in trainer.loggers:
                if hasattr(logger, "truncate_after"):
                    logger.truncate_after(trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if anything is due; once per optimizer step."""
        step = trainer.global_step
        if step == self.saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        is_best = self._is_best(trainer, step)
        if is_best or self._is_due(trainer, step):
            self._save(trainer, step, is_best)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the final state unless it is saved already; the last evaluation may make it the best."""
        step = trainer.global_step
        is_best = self._is_best(trainer, step)
        if is_best or (step, self._evaluated_step(trainer)) != (self.saved_step, self._saved_evaluation):
            self._save(trainer, step, is_best)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save what was trained when a stream ends too early, which all ranks notice at the same step."""
        if isinstance(exception, EndOfStreamError) and trainer.global_step != self.saved_step:
            self._save(trainer, trainer.global_step, is_best=False)

    def _tidy_best(self, step: int) -> None:
        best = self._best_path(self.best_step)
        if self.best_step == step and not best.exists() and (last := self.dirpath / "last.ckpt").exists():
            self._link_best(last)  # the kill came between the checkpoint and its second name
        for path in self.dirpath.glob("step_*.ckpt"):
            if path != best:
                path.unlink()

    def _link_best(self, last: Path) -> None:
        with atomic_file(self._best_path(self.best_step)) as temporary:
            _link_or_copy(last, temporary)

    def _is_due(self, trainer: lightning.Trainer, step: int) -> bool:
        if self.every_n_steps and step % self.every_n_steps == 0:
            return True
        if self.every_minutes is None:
            return False
        # The ranks' clocks differ: rank 0 decides for all, because saving is a collective operation.
        late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return bool(trainer.strategy.broadcast(late))

    def _is_best(self, trainer: lightning.Trainer, step: int) -> bool:
        if self.best_metric is None or self._evaluated_step(trainer) != step or self.best_step == step:
            return False
        if self.best_metric not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if not name.startswith("train/")))
            raise UserError(f"checkpoint.best_metric: '{self.best_metric}' is not evaluated: choose one of {known}")
        score = self.sign * float(trainer.callback_metrics[self.best_metric])
        if not score > self.best_score:
            return False
        self.best_score, self.best_step = score, step
        return True

    @staticmethod
    def _evaluated_step(trainer: lightning.Trainer) -> int:
        """Return the step of the last evaluation; -1: there was none."""
        return next((c.last_step for c in trainer.callbacks if hasattr(c, "last_step")), -1)  # type: ignore[attr-defined]

    def _save(self, trainer: lightning.Trainer, step: int, is_best: bool) -> None:
        trainer.lightning_module.check_finite()  # type: ignore[operator]
        _check_parameters(trainer.lightning_module, step)
        with paused(trainer):
            for logger in trainer.loggers:
                logger.save()
            last = self.dirpath / "last.ckpt"
            trainer.save_checkpoint(last)
            if is_best and trainer.is_global_zero:
                self._link_best(last)
                self._tidy_best(step)
        self._saved_at, self.saved_step = time.monotonic(), step
        self._saved_evaluation = self._evaluated_step(trainer)

    def _best_path(self, step: int) -> Path:
        return self.dirpath / f"step_{step:07d}.ckpt"


def _check_parameters(module: lightning.LightningModule, step: int) -> None:
    """Refuse to save weights that a step with a finite loss has made NaN or infinite."""
    bad = [name for name, parameter in module.named_parameters() if not torch.isfinite(parameter).all()]
    if bad:
        raise UserError(
            f"{bad[0]}: not finite after optimizer step {step}: lower optim.lr or jacobian.coef; the last "
            "checkpoint is kept"
        )


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same data where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
