"""How far an evaluation is: a bar on a terminal, plain lines anywhere else, on rank 0 only."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jsae_lightning.distributed import rank_and_world_size

T = TypeVar("T")

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class EvaluationProgress:
    """Counts what is done of `total` and shows it: a context manager."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        """Name what is done and its unit, in the plural."""
        self._name, self._total, self._unit = name, total, unit
        self._done = 0
        self._began_at = self._shown_at = time.monotonic()
        self._is_shown = rank_and_world_size()[0] == 0
        self._bar: Progress | None = None

    def __enter__(self) -> "EvaluationProgress":
        if self._is_shown and sys.stdout.isatty():
            columns = [TextColumn(f"{self._name} {{task.completed}}/{{task.total}} {self._unit}"), BarColumn()]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stdout))
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Say that so many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._is_shown and (
            time.monotonic() - self._shown_at >= _SECONDS_BETWEEN_LINES or self._done == self._total
        ):
            self._shown_at = time.monotonic()
            seconds = (self._shown_at - self._began_at) / max(1, self._done) * (self._total - self._done)
            left = timedelta(seconds=round(seconds))
            log.info("%s: %d/%d %s  left %s", self._name, self._done, self._total, self._unit, left)


def followed(items: Iterable[T], name: str, total: int, unit: str) -> Iterator[T]:
    """Yield the items, `total` of them, and show how many the loop over them is done with."""
    with EvaluationProgress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.advance(1)
