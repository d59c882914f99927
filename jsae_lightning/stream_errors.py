"""What an error of a stream means (a failure that may pass, a refusal, or neither), and of which shard it is."""

import re
from collections.abc import Iterator
from typing import Any

from jsae_lightning.errors import UserError
from jsae_lightning.model_files import first_line

_PASSING_STATUS = (408, 429)
_NETWORK_PACKAGES = ("aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")
_READERS = ("pyarrow", "datasets", "json", "pandas", "zlib", "gzip")
_TRUNCATED = re.compile(r"truncat|unexpected end|end of (file|stream)|end-of-stream|magic bytes|tried reading", re.I)


class DamagedShardError(UserError):
    """What a shard holds cannot be read."""


def is_network_error(error: BaseException, shard: str) -> bool:
    """Say whether reading again may help: no answer, a broken connection, a passing HTTP status, a short read.

    A local file is read again only where it did not answer (a network disk).
    """
    if _status(error) is not None:
        return is_passing_status(error)
    chain = list(_chain(error))
    if any(isinstance(e, ConnectionError | TimeoutError) for e in chain):
        return True
    if any(isinstance(e, FileNotFoundError | PermissionError) for e in chain) or _is_local(shard):
        return False
    return any(_is_transport(e) or _is_short_read(e) for e in chain)


def is_passing_status(error: BaseException) -> bool:
    """Say whether a server answered that it is out of order, or asked too much, for now."""
    status = _status(error)
    return status is not None and (status >= 500 or status in _PASSING_STATUS)


def is_refusal(error: BaseException, shard: str) -> bool:
    """Say whether a server answered that it will not hand out the shard: any other HTTP status, no such file."""
    missing = any(isinstance(e, FileNotFoundError | PermissionError) for e in _chain(error)) and not _is_local(shard)
    return missing or _status(error) is not None


def describe(error: BaseException, timeout_s: float) -> str:
    """What happened, in a few words: `HTTP 503`, `no answer for 300 s`, or the broken connection's own words."""
    if (status := _status(error)) is not None:
        return f"HTTP {status}"
    chain = list(_chain(error))
    if type(error) is TimeoutError:  # the whole read took too long, or a local file's disk did not answer
        return str(error)
    if any(isinstance(e, TimeoutError) or "Timeout" in type(e).__name__ for e in chain):
        return f"no answer for {timeout_s:g} s"
    if any(isinstance(e, FileNotFoundError) for e in chain):
        return "no such file"
    # The innermost says most: `datasets` calls everything "Server Disconnected".
    cause = next((e for e in reversed(chain) if _is_transport(e) or _is_short_read(e)), chain[0])
    return f"{'short read' if _is_short_read(cause) else 'connection broken'} ({first_line(cause)})"


def shard_name(dataset: Any) -> str:
    """The file or URL of the shard at which a `datasets.IterableDataset` stands; empty where it does not tell.

    The innermost iterable's own state is asked: the dataset's copies of it are out of date after a position was loaded.
    """
    index = (getattr(_innermost(dataset), "_state_dict", None) or {}).get("shard_idx", 0)
    names = shard_names(dataset)
    return names[index] if index < len(names) else ""


def shard_names(dataset: Any) -> list[str]:
    """The files or URLs that a `datasets.IterableDataset` reads one after the other; none where it does not tell."""
    for values in getattr(_innermost(dataset), "kwargs", {}).values():
        if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            return values
    return []


def is_damaged_data(error: BaseException) -> bool:
    """Say whether a file's content could not be read: by its reader's own error, or as it is no UTF-8."""
    if any(isinstance(e, MemoryError) or type(e).__name__ == "ArrowCancelled" for e in _chain(error)):
        return False
    packages = {cls.__module__.split(".")[0] for each in _chain(error) for cls in type(each).__mro__}
    return not packages.isdisjoint(_READERS) or any(isinstance(e, UnicodeDecodeError) for e in _chain(error))


def _innermost(dataset: Any) -> Any:
    iterable = getattr(dataset, "_ex_iterable", None)
    while (inner := getattr(iterable, "ex_iterable", None)) is not None:
        iterable = inner
    return iterable


def _is_local(shard: str) -> bool:
    return bool(shard) and "://" not in shard


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause's cause and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the first error of a chain that has one (aiohttp: `status`; the others: of the response)."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None) or getattr(each, "status", None)
        if isinstance(status, int) and status >= 400:
            return status
    return None


def _is_transport(error: BaseException) -> bool:
    packages = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(_NETWORK_PACKAGES)


def _is_short_read(error: BaseException) -> bool:
    return isinstance(error, EOFError) or (
        type(error).__module__.startswith(("pyarrow", "zlib", "gzip")) and bool(_TRUNCATED.search(str(error)))
    )
