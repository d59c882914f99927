"""The callback that `jsae-bench --train` adds to a training: when the language model and the steps run."""

import json
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.benchmarking.machine import machine
from jsae_lightning.callbacks.throughput import Throughput
from jsae_lightning.versions import package_versions

Interval = tuple[float, float]


def union_length(intervals: Iterable[Interval]) -> float:
    """Return how long at least one of the intervals (start, end) lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def loop_seconds(wall: Interval, parts: dict[str, list[Interval]]) -> dict[str, float]:
    """Return the seconds of each part, and what was lost.

    Args:
        wall: first and last moment.
        parts: intervals of `language_model`, `forward`, `backward`, `step` (all of an optimizer step, or of what of it
            lies beside the other two), `between` (from the end of a batch to the beginning of the next) and `paused`.
            The language model may run beside all others; what of it lies in `paused` is an evaluation's and does not
            count.
    """
    paused = union_length(parts["paused"])

    def running(*names: str) -> float:
        return union_length([i for name in (*names, "paused") for i in parts[name]]) - paused

    length = wall[1] - wall[0] - paused
    whole_step = ("forward", "backward", "step")
    model, step, busy = running("language_model"), running(*whole_step), running("language_model", *whole_step)
    forward, backward = (sum(end - start for start, end in parts[name]) for name in ("forward", "backward"))
    lost_between = running("language_model", *whole_step, "between") - busy
    return {
        "wall": length,
        "language_model": model,
        "forward": forward,
        "backward": backward,
        "optimizer": step - forward - backward,
        "step": step,
        "overlap": model + step - busy,
        "lost": length - busy,
        "lost_between": lost_between,
        "lost_around": length - busy - lost_between,
        "paused": paused,
    }


class _Clock:
    """Moments on one axis: of the processor, or of the CUDA device's own work, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._zero = self.now()

    def now(self) -> Any:
        """Return this moment; `seconds` tells when it was."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: Any) -> float:
        """Return the seconds from the clock's beginning to a moment, once the device has reached it."""
        return self._zero.elapsed_time(moment) / 1000 if self.is_cuda else moment - self._zero


class LoopTimes(Callback):
    """Writes to `path`, as JSON, what `loop_seconds` returns, with the steps, tokens and versions it belongs to."""

    def __init__(self, path: str) -> None:
        """Note nothing before training."""
        self.path = Path(path)
        self._moments: dict[str, list[tuple[Any, Any]]] = {
            name: [] for name in ("language_model", "forward", "backward", "step", "between")
        }
        self._paused: list[tuple[Any, float]] = []  # its end, its length
        self._backward_began: Any = None
        self._tokens = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure around the language model's forward, before the loader takes hold of it, and around the step."""
        data, module, device = trainer.datamodule, pl_module, trainer.strategy.root_device  # type: ignore[attr-defined]
        self._clock = _Clock(device)
        data.language_model.mlp_in = self._timed("language_model", data.language_model.mlp_in)
        module.training_step = self._timed("forward", module.training_step)  # type: ignore[method-assign]
        module.optimizer_step = self._timed("step", module.optimizer_step)  # type: ignore[method-assign]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.pause = self._noting_pauses(callback.pause)  # type: ignore[method-assign, assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, and be the first to hear of a batch's beginning and of the end."""
        trainer.callbacks = [_Herald(self), *trainer.callbacks]  # type: ignore[attr-defined]
        self._first_step = trainer.global_step
        self._began = self._batch_ended = self._clock.now()

    def batch_begins(self) -> None:
        """Note what passed since the last batch, before the other callbacks hear of this one."""
        self._moments["between"].append((self._batch_ended, self._clock.now()))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Note the moment."""
        self._backward_began = self._clock.now()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the moment."""
        self._moments["backward"].append((self._backward_began, self._clock.now()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the moment, after the other callbacks."""
        self._tokens += len(batch) * trainer.world_size
        self._batch_ended = self._clock.now()

    def training_ends(self, trainer: Trainer) -> None:
        """Write the file, before the other callbacks do what they do at the end."""
        ended = self._clock.now()
        if self._clock.is_cuda:
            torch.cuda.synchronize()
        at = self._clock.seconds
        parts = {name: [(at(start), at(end)) for start, end in found] for name, found in self._moments.items()}
        parts["paused"] = [(at(end) - length, at(end)) for end, length in self._paused]
        seconds = loop_seconds((at(self._began), at(ended)), parts)
        if trainer.is_global_zero:
            geometry = trainer.datamodule.geometry  # type: ignore[attr-defined]
            record = {
                "seconds": seconds,
                "steps": trainer.global_step - self._first_step,
                "tokens_per_second": self._tokens / seconds["wall"],
                "batch_tokens": geometry.batch_tokens,
                "buffer_batches": geometry.buffer_batches,
                "versions": package_versions() | machine(trainer.strategy.root_device),
            }
            with atomic_file(self.path) as temporary:
                temporary.write_text(json.dumps(record), encoding="utf-8")

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # Lightning looks at the arguments' names
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._moments[name].append((began, self._clock.now()))

        return timed

    def _noting_pauses(self, pause: Callable[[float], None]) -> Callable[[float], None]:
        def noting(seconds: float) -> None:
            self._paused.append((self._clock.now(), seconds))
            pause(seconds)

        return noting


class _Herald(Callback):
    """Stands first among the callbacks, where `LoopTimes` stands last."""

    def __init__(self, times: LoopTimes) -> None:
        self._times = times

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Pass it on."""
        self._times.batch_begins()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass it on."""
        self._times.training_ends(trainer)
