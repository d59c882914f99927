"""Do again what a broken server made fail, a limited number of times, and end the process if a read never ends.

Importing this module loads neither torch nor `datasets`.
"""

import atexit
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jsae_lightning.errors import RunError, UserError
from jsae_lightning.model_files import is_waiting, within
from jsae_lightning.stream_errors import describe, is_network_error

log = logging.getLogger(__name__)

MAX_WAIT_S = 120.0
"""Seconds between two tries, at most."""
LEAVE_S = 15.0
"""Seconds that the process waits at its end for reads that were given up; `datasets` sleeps for 5 in a broken one."""


@dataclass(frozen=True)
class Patience:
    """How long a stream is tried: tries after the first, seconds without an answer, and what waits between two tries.

    What trickles in without an end is given up after twice `timeout_s`.
    """

    retries: int = 0
    timeout_s: float = threading.TIMEOUT_MAX
    wait: Callable[[float], None] = time.sleep

    @property
    def limit_s(self) -> float:
        """Seconds that one try may take in all."""
        return min(2 * self.timeout_s, threading.TIMEOUT_MAX)


def persist(
    attempt: Callable[[int], Callable[[], Any]], patience: Patience, where: str, shard: Callable[[], str]
) -> Any:
    """Return `attempt(1)()`; while it fails and may pass, `attempt(2)()` and so on, after 1, 2, 4, ... seconds.

    `attempt` is called on this thread, what it returns on another; `shard` names what fails.

    Raises:
        RunError: the failure stays for all tries.
    """
    began = time.monotonic()
    for tries in range(1, patience.retries + 2):
        try:
            with tried_once(patience.timeout_s):
                return within(patience.limit_s, attempt(tries))
        except (UserError, RunError):
            raise
        except Exception as error:
            name = shard()
            if not is_network_error(error, name):
                raise
            if type(error) is TimeoutError:
                _close_connections()
            what = describe(error, patience.timeout_s)
            if tries > patience.retries:
                _GAVE_UP.set()
                note = f"after {tries} tries in {time.monotonic() - began:.0f} s"
                raise RunError(farewell(where, name, what, note)) from error
            _wait(patience, tries, f"{name or where}: {what}")
    raise AssertionError("the last try returns or raises")


def _close_connections() -> None:
    """End the reads that were given up though something trickles in still: they fail at the next byte."""
    import huggingface_hub

    # Versions before 1.0 have no such function, and a connection for each thread.
    getattr(huggingface_hub, "close_session", lambda: None)()


def _wait(patience: Patience, tries: int, what: str) -> None:
    seconds, left = min(2.0 ** (tries - 1), MAX_WAIT_S), patience.retries - tries
    log.warning(f"{what}: trying again in {seconds:.0f} s ({left} more tries after that)")
    patience.wait(seconds)


def farewell(where: str, shard: str, what: str, note: str) -> str:
    """The one line that a run ends with: what could not be read, why, and how to go on."""
    return (
        f"{where}: {shard or 'a shard'} cannot be read: {what}, {note} (data.stream_retries, "
        "data.stream_timeout_s): the last checkpoint is kept; once the server answers, go on with "
        "jsae-train ckpt_path=auto hydra.run.dir=DIR"
    )


@contextmanager
def tried_once(timeout_s: float) -> Iterator[None]:
    """Let `datasets` and `huggingface_hub` try each request once, for `timeout_s`, and restore what they do otherwise.

    By themselves they try a read 20 times 5 s apart, and each of these 6 times: half an hour that nobody hears of.
    """
    import datasets
    import huggingface_hub.utils
    from huggingface_hub import constants

    changes: list[tuple[Any, str, Any]] = [(constants, "HF_HUB_DOWNLOAD_TIMEOUT", min(timeout_s, 1e6))]
    for action in ("READ", "OPEN"):
        changes.append((datasets.config, f"STREAMING_{action}_MAX_RETRIES", 1))
        changes.append((datasets.config, f"STREAMING_{action}_RETRY_INTERVAL", 0))
    for reason in ("SERVER_UNAVAILABLE", "RATE_LIMIT"):
        changes.append((datasets.config, f"STREAMING_READ_{reason}_RETRY_INTERVAL", 0))
    for name in ("http_backoff", "http_stream_backoff"):
        function = inspect.unwrap(getattr(huggingface_hub.utils, name, tried_once))
        if "max_retries" in (function.__kwdefaults__ or {}):
            # The default of an argument that no caller gives: there is no setting for it.
            changes.append((function, "__kwdefaults__", {**function.__kwdefaults__, "max_retries": 0}))
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in changes if hasattr(holder, name)]
    for holder, name, value in changes:
        if hasattr(holder, name):
            setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


_GAVE_UP = threading.Event()


@atexit.register
def _leave_stuck_reads() -> None:
    """Let reads that were given up end, or end the process with 1 at once if the whole stream was given up.

    Arrow reads on threads of its own: the interpreter aborts if one of them comes back while it ends.
    """
    latest = time.monotonic() + LEAVE_S
    while is_waiting() and not _GAVE_UP.is_set() and time.monotonic() < latest:
        time.sleep(0.1)
    if is_waiting() and _GAVE_UP.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
