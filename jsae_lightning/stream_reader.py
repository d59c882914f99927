"""Reads a stream whose server drops connections, answers 5xx or stalls: from the last good position, again and again.

The position lives in the dataset object, so a read that fails costs a copy of the dataset: a new one is made, told the
position before the rows that failed, and read after 1, 2, 4, ... seconds. Rows are neither lost nor repeated. Importing
this module loads neither torch nor `datasets`.
"""

import copy
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from jsae_lightning.errors import RunError
from jsae_lightning.model_files import within
from jsae_lightning.stream_errors import describe, is_network_error, is_refusal, shard_name

log = logging.getLogger(__name__)

MAX_WAIT_S = 120.0
"""Seconds between two tries, at most."""


@dataclass(frozen=True)
class Patience:
    """How long a stream is tried: tries after the first, seconds a read may take, and what waits between two tries."""

    retries: int = 0
    timeout_s: float = threading.TIMEOUT_MAX
    wait: Callable[[float], None] = time.sleep


class StreamReader:
    """The rows of a copy of a dataset in order, from a position on."""

    def __init__(self, data: Any, patience: Patience, where: str, state: dict[str, Any] | None = None) -> None:
        """Read a copy of `data` from `state` on (None: the beginning); `where` names the data in messages."""
        self._data, self._patience, self._where = data, patience, where
        self._open(state)

    def _open(self, state: dict[str, Any] | None) -> None:
        self._dataset = copy.deepcopy(self._data)
        if state is not None:
            self._dataset.load_state_dict(copy.deepcopy(state))
        self._rows, self._has_moved = iter(self._dataset), False
        self._opened_at = state

    def state_dict(self) -> dict[str, Any] | None:
        """The position behind the last row that was read; None at the beginning."""
        return self._dataset.state_dict() if self._has_moved else self._opened_at

    def read(self, count: int) -> list[Any]:
        """Return the next rows, at most `count`; none at the end of the stream.

        Raises:
            RunError: the server stays broken for all tries, or refuses the shard (404, 403).
        """
        state = self.state_dict() if self._patience.retries else None
        began = time.monotonic()
        for tries in range(1, self._patience.retries + 2):
            try:
                with tried_once(self._patience.timeout_s):
                    rows = within(self._patience.timeout_s, partial(_take, self._rows, count))
            except Exception as error:
                shard = shard_name(self._dataset)
                what = describe(error, self._patience.timeout_s)
                if not is_network_error(error, shard):
                    if is_refusal(error, shard):
                        raise RunError(self._farewell(shard, what, "which is no passing failure")) from error
                    raise
                if tries > self._patience.retries:
                    note = f"after {tries} tries in {time.monotonic() - began:.0f} s"
                    raise RunError(self._farewell(shard, what, note)) from error
                self._wait(tries, shard, what)
                self._open(state)
            else:
                self._has_moved = self._has_moved or bool(rows)
                return rows
        raise AssertionError("the last try returns or raises")

    def _wait(self, tries: int, shard: str, what: str) -> None:
        seconds = min(2.0 ** (tries - 1), MAX_WAIT_S)
        left = self._patience.retries - tries
        log.warning(f"{shard or self._where}: {what}: trying again in {seconds:.0f} s ({left} more tries after that)")
        self._patience.wait(seconds)

    def _farewell(self, shard: str, what: str, note: str) -> str:
        return (
            f"{self._where}: {shard or 'a shard'} cannot be read: {what}, {note} (data.stream_retries, "
            "data.stream_timeout_s): the last checkpoint is kept; once the server answers, go on with "
            "jsae-train ckpt_path=auto hydra.run.dir=DIR"
        )


def _take(rows: Iterator[Any], count: int) -> list[Any]:
    return list(islice(rows, count))


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
