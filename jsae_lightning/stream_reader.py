"""Reads a stream whose server drops connections, answers 5xx or stalls: from the last good position, again and again.

The position lives in the dataset object, so a read that fails costs a copy of the dataset: a new one is made, told the
position before the rows that failed, and read. Rows are neither lost nor repeated. Importing this module loads neither
torch nor `datasets`.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jsae_lightning.errors import RunError
from jsae_lightning.model_files import first_line
from jsae_lightning.persistence import Patience, farewell, persist
from jsae_lightning.stream_errors import (
    DamagedShardError,
    describe,
    is_damaged_data,
    is_refusal,
    shard_name,
    shard_names,
)


class StreamReader:
    """The rows of a copy of a dataset in order, from a position on."""

    def __init__(self, data: Any, patience: Patience, where: str, state: dict[str, Any] | None = None) -> None:
        """Read a copy of `data` from `state` on (None: the beginning); `where` names the data in messages."""
        self._data, self._patience, self._where = data, patience, where
        self._open(state)

    def _open(self, state: dict[str, Any] | None) -> None:
        self._dataset = _copy(self._data)
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
            DamagedShardError: what a shard holds cannot be read.
        """
        state = self.state_dict() if self._patience.retries else None

        def attempt(tries: int) -> Callable[[], list[Any]]:
            if tries > 1:
                self._open(state)
            return partial(_take, self._rows, count)

        try:
            rows: list[Any] = persist(attempt, self._patience, self._where, self._shard)
        except RunError:
            raise
        except Exception as error:
            if is_damaged_data(error) and not is_refusal(error, self._shard()):
                shard = self._shard() or self._where
                raise DamagedShardError(
                    f"{shard}: cannot be read ({first_line(error)}): correct or remove what is damaged"
                ) from error
            if not is_refusal(error, self._shard()):
                raise
            what = describe(error, self._patience.timeout_s)
            raise RunError(farewell(self._where, self._shard(), what, "which is no passing failure")) from error
        self._has_moved = self._has_moved or bool(rows)
        return rows

    def _shard(self) -> str:
        return shard_name(self._dataset)


def shards_digest(data: Any) -> tuple[int, str]:
    """Return how many files a stream reads, and a hash of their names, in order, and of the sizes of local ones.

    Names of local files are relative to the folder that all lie in, those of the hub without its revision: a copy
    elsewhere is the same.
    """
    names = shard_names(data)
    sizes = [Path(name).stat().st_size if Path(name).is_file() else None for name in names]
    plain = [re.sub(r"@[0-9a-f]{40}/", "/", name) for name in names]
    folder = _common_folder(plain)
    shards = [[name.removeprefix(folder), size] for name, size in zip(plain, sizes, strict=True)]
    return len(names), hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _common_folder(names: list[str]) -> str:
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names])  # noqa: PTH120 - URLs too
    except ValueError:  # there is none: no name, or a file here and one elsewhere
        return ""


def _copy(data: Any) -> Any:
    """Copy a dataset, but share the table of connections that it holds on to.

    That is one for the whole process, and copying it adds an entry for a thread that has none, which ends the copying.
    """
    from huggingface_hub import HfFileSystem

    connections = HfFileSystem._cache
    return copy.deepcopy(data, {id(connections): connections})


def _take(rows: Iterator[Any], count: int) -> list[Any]:
    return list(islice(rows, count))
