"""How fast training is, in tokens of all ranks per second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from jsae_lightning.callbacks.steps import StepCallback
from jsae_lightning.loggers import log_metrics


class Throughput(StepCallback):
    """Logs the speed of training every `log_every_n_steps` optimizer steps of the trainer.

    * `time/tokens_per_second`: tokens of all ranks over the seconds since it was last logged, with filling the
      activation buffer (the language model's work), without what ran inside `paused` (evaluations, figures, saves; a
      block that is made in the background meanwhile counts as free);
    * `time/seconds`: wall-clock seconds of training so far, everything included, over all parts of a resumed run.

    `final_metrics` has both for the whole run, and the seconds spent inside `paused`.
    """

    def __init__(self) -> None:
        """Start at zero; a resumed run goes on from its checkpoint's figures."""
        super().__init__()
        self._earlier = {"tokens": 0, "seconds": 0.0, "paused_seconds": 0.0}  # of the parts before a resume
        self._tokens = 0
        self._started_at: float | None = None
        self._stopped_at: float | None = None
        self._paused_seconds = 0.0
        self._interval_tokens = 0
        self._interval_began = 0.0
        self.tokens_per_second = float("nan")
        """Of the interval that was logged last."""

    def state_dict(self) -> dict[str, Any]:
        """Return the totals up to now."""
        return {
            "tokens": self._earlier["tokens"] + self._tokens,
            "seconds": self.seconds,
            "paused_seconds": self._earlier["paused_seconds"] + self._paused_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the totals of the earlier parts of the run."""
        self._earlier = dict(state_dict)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training so far, over all parts of the run."""
        if self._started_at is None:
            return self._earlier["seconds"]
        end = self._stopped_at if self._stopped_at is not None else time.monotonic()
        return self._earlier["seconds"] + end - self._started_at

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started_at, self._stopped_at = time.monotonic(), None
        self._tokens, self._paused_seconds = 0, 0.0
        self._interval_tokens, self._interval_began = 0, self._running_seconds()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch (tokens, d_model) on every rank; ranks have equal numbers of tokens."""
        tokens = len(batch) * trainer.world_size
        self._tokens += tokens
        self._interval_tokens += tokens
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Log the interval if its end has come."""
        if step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = self._running_seconds()
        self.tokens_per_second = self._interval_tokens / max(now - self._interval_began, 1e-9)
        self._interval_tokens, self._interval_began = 0, now
        metrics = {"time/tokens_per_second": self.tokens_per_second, "time/seconds": self.seconds}
        log_metrics(trainer, metrics, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stopped_at = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Take `seconds` that have just passed out of the throughput, if training is going on."""
        if self._started_at is not None and self._stopped_at is None:
            self._paused_seconds += seconds

    def final_metrics(self) -> dict[str, float]:
        """Return `time/tokens_per_second`, `time/seconds`, `time/paused_seconds` of the whole run."""
        totals = self.state_dict()
        running = totals["seconds"] - totals["paused_seconds"]
        return {
            "time/tokens_per_second": totals["tokens"] / running if running > 0 else float("nan"),
            "time/seconds": totals["seconds"],
            "time/paused_seconds": totals["paused_seconds"],
        }

    def _running_seconds(self) -> float:
        return time.monotonic() - self._paused_seconds


@contextmanager
def paused(trainer: Trainer) -> Iterator[None]:
    """Leave what runs inside out of `time/tokens_per_second`."""
    began = time.monotonic()
    try:
        yield
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.pause(time.monotonic() - began)
