"""The base of callbacks that act once per optimizer step, however many micro-batches make one."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepCallback(Callback):
    """Calls `on_step_end` after each completed optimizer step.

    Lightning's `on_train_batch_end` comes after every micro-batch, and with gradient accumulation several of them see
    the same `global_step`.
    """

    _completed_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step that a resumed run starts from, so that it is not taken for a new one."""
        self._completed_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `on_step_end` if this micro-batch completed an optimizer step."""
        if trainer.global_step > self._completed_step:
            self._completed_step = trainer.global_step
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Act after optimizer step number `step`, counted from 1."""
