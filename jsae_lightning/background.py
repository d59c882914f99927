"""Work on a thread of its own while training goes on: a task, and the stream of the device that it runs on.

Several threads of Python take turns, but torch's kernels, reads of files and of the network, and the wait for a device
let the others run.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LEAVE_S = 15.0
"""Seconds that the process waits at its end for tasks that were told to stop, in all."""


class StoppedError(Exception):
    """Raised in a task that was told to stop, where it asks."""


class Task:
    """One call of a function on a thread of its own; a process never ends in the middle of torch's work on it.

    The function is given `pause_point`, to be called wherever it may be left off: it raises StoppedError once `stop`
    has been called.
    """

    def __init__(self, function: Callable[[Callable[[], None]], Any]) -> None:
        """Begin the call."""
        self._error: BaseException | None = None
        self._is_stopped = threading.Event()
        # A daemon, so that the end of the process can tell it to stop before it is waited for; see `_stop_tasks`.
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True, name="background-task")
        _TASKS.add(self)
        self._thread.start()

    def _run(self, function: Callable[[Callable[[], None]], Any]) -> None:
        try:
            function(self._pause_point)
        except BaseException as error:
            self._error = error

    def _pause_point(self) -> None:
        if self._is_stopped.is_set():
            raise StoppedError

    def wait(self) -> None:
        """Wait for the end of the call, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self, timeout_s: float | None = None) -> None:
        """Tell the call to stop, and wait at most `timeout_s` seconds (None: any time) for its end."""
        self._is_stopped.set()
        self._thread.join(timeout_s)


_TASKS: "weakref.WeakSet[Task]" = weakref.WeakSet()


@atexit.register
def _stop_tasks() -> None:
    """Leave no task in torch's code when the interpreter ends, which would abort the process."""
    latest = time.monotonic() + LEAVE_S
    for task in list(_TASKS):
        task.stop(max(0.0, latest - time.monotonic()))


class SideStream:
    """What a background thread does on a device: on CUDA on a stream of its own, elsewhere in the order of its calls.

    Values do not depend on it: cuBLAS has a handle and a workspace for each thread and stream.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream, where `device` has streams."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """On the caller's thread: let the side stream wait for everything that was asked of the device so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def use(self) -> Iterator[None]:
        """On the background thread: run inside on the side stream, and leave when the device has done it."""
        if self._stream is None:
            yield
            return
        # A new thread's device is GPU 0: to come back to it would make this process a context there, of 0.5 GB.
        torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()
