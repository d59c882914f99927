"""The progress of training: a bar on a terminal, plain lines anywhere else."""

import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from jsae_lightning.callbacks.steps import StepCallback
from jsae_lightning.callbacks.throughput import Throughput
from jsae_lightning.errors import UserError

log = logging.getLogger(__name__)

STYLES = ("auto", "bar", "lines")
_SHOWN = (
    ("loss", "train/loss"),
    ("EV in", "train/explained_variance_input"),
    ("out", "train/explained_variance_output"),
)
_SECONDS_BETWEEN_REFRESHES = 0.2


class TrainingProgress(StepCallback, ProgressBar):
    """Shows step, loss, explained variance of both SAEs, tokens per second and the time left.

    On a terminal as a bar; elsewhere, and so in `train.log`, as one line of the logging module every `every_n_steps`
    optimizer steps or `every_seconds` seconds, whichever comes first, and at the last step. Takes the place of
    Lightning's own bar. Losses are those that the module logged last, tokens per second those of `Throughput`, with
    the step if that was an earlier one; the time left is reckoned from the steps of this process, evaluations included.
    Rank 0 only.
    """

    def __init__(self, every_n_steps: int | None, every_seconds: float | None, style: str) -> None:
        """Set the intervals of the lines (None: not by that) and the style; `auto`: a bar if stdout is a terminal.

        Raises UserError for another style, and for an interval that is not above zero.
        """
        super().__init__()
        if style not in STYLES:
            raise UserError(f"callbacks.progress.style: '{style}' is not known: choose one of {', '.join(STYLES)}")
        for key, value in (("every_n_steps", every_n_steps), ("every_seconds", every_seconds)):
            if value is not None and value <= 0:
                raise UserError(f"callbacks.progress.{key}: {value} is not above zero: give a positive number or null")
        self.every_n_steps, self.every_seconds, self.style = every_n_steps, every_seconds, style
        self._enabled = True
        self._bar: _Bar | None = None
        self._first_step, self._began_at, self._shown_at = 0, 0.0, 0.0

    def disable(self) -> None:
        """Show nothing from now on; Lightning calls it on other ranks than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and the bar if there is a terminal."""
        super().on_train_start(trainer, pl_module)
        self._first_step, self._began_at, self._shown_at = trainer.global_step, time.monotonic(), time.monotonic()
        on_terminal = sys.stdout.isatty() if self.style == "auto" else self.style == "bar"
        if self._enabled and on_terminal:
            self._bar = _Bar(trainer.global_step, trainer.max_steps)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Show the step if it is time."""
        if not self._enabled:
            return
        waited = time.monotonic() - self._shown_at
        is_last = step == trainer.max_steps
        if self._bar is not None:
            if waited >= _SECONDS_BETWEEN_REFRESHES or is_last:
                self._bar.update(step, self._figures(trainer, step), self._seconds_left(trainer, step))
                self._shown_at = time.monotonic()
            return
        by_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        by_time = self.every_seconds is not None and waited >= self.every_seconds
        if by_step or by_time or is_last:
            left = _duration(self._seconds_left(trainer, step))
            log.info("step %d/%d  %s  left %s", step, trainer.max_steps, self._figures(trainer, step), left)
            self._shown_at = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the bar as it is."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, trainer: Trainer, step: int) -> str:
        metrics = trainer.callback_metrics
        shown = [f"{name} {float(metrics[tag]):.4g}" for name, tag in _SHOWN if tag in metrics]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and math.isfinite(callback.tokens_per_second):
                shown.append(f"{callback.tokens_per_second:,.0f} tok/s")
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged = max(1, step // every * every)
        if shown and logged != step:
            shown.append(f"(of step {logged:,})")
        return "  ".join(shown)

    def _seconds_left(self, trainer: Trainer, step: int) -> float:
        seconds_per_step = (time.monotonic() - self._began_at) / max(1, step - self._first_step)
        return max(0, trainer.max_steps - step) * seconds_per_step


class _Bar:
    """A rich progress bar; while it lives, log lines on the terminal are printed above it."""

    def __init__(self, step: int, total: int) -> None:
        real_streams = (sys.stdout, sys.stderr)
        columns = [
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}"),
        ]
        # Where stderr goes to a file it stays there.
        self._progress = Progress(
            *columns, console=Console(file=sys.stdout), auto_refresh=False, redirect_stderr=sys.stderr.isatty()
        )
        self._task: TaskID = self._progress.add_task("", total=total, completed=step, text="")
        self._progress.start()
        # rich has now replaced sys.stdout by a stream that prints above the bar; logging still holds the real one.
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                for real, replaced in zip(real_streams, (sys.stdout, sys.stderr), strict=True):
                    if handler.stream is real and replaced is not real:
                        self._handlers.append((handler, real))
                        handler.setStream(replaced)
                        break

    def update(self, step: int, figures: str, seconds_left: float) -> None:
        text = f"{figures}  left {_duration(seconds_left)}"
        self._progress.update(self._task, completed=step, text=text, refresh=True)

    def stop(self) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._progress.stop()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
