"""How a run stands: `status.json` in its folder, and the lock that one training process holds on the folder.

    {"status": "finished", "attempts": [{"started_at": "2026-01-01T10:00:00+00:00", "ended_at": ..., "seconds": 12.3,
     "host": "n1", "pid": 4711, "slurm_job_id": "17", "exit_code": 0, "message": null}, ...]}

An attempt is one start of the run: the first, and one for each resume. What kills a process (SIGKILL, a power cut)
leaves its attempt without an end; the lock, which the operating system drops with the process, then tells that it is
over. Imports neither torch nor lightning.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.errors import RunError, UserError

STATUS = "status.json"
LOCK = ".lock"


@dataclass
class Attempt:
    """One start of a run: times in UTC (ISO 8601), the process, and how it ended (None: not yet, or it was killed)."""

    started_at: str
    host: str
    pid: int
    slurm_job_id: str | None = None
    ended_at: str | None = None
    seconds: float | None = None
    exit_code: int | None = None
    message: str | None = None


@dataclass
class RunStatus:
    """`status`: `running`, `finished`, `failed` (exit code not 0) or, found by `read_status` only, `killed`."""

    status: str
    attempts: list[Attempt]

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds of all attempts whose end is known; None if there is none."""
        known = [attempt.seconds for attempt in self.attempts if attempt.seconds is not None]
        return sum(known) if known else None


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder: one process at a time trains there, and its death frees the folder.

    An flock on the file `.lock`, which NFS clients share with each other, too; it is removed with the lock, but for a
    process that is killed. A file system without locks gives none. Raises RunError if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder / LOCK)
    if descriptor is None:
        raise RunError(
            f"{folder}: another process is training in this folder: wait for it, or choose another with "
            "hydra.run.dir=DIR"
        )
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Take the lock; try for a second, because `is_locked` holds it for an instant."""
    for _ in range(10):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _try_lock(descriptor) and _is_same_file(descriptor, path):
            return descriptor
        os.close(descriptor)
        time.sleep(0.1)
    return None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EBADF)
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the file has not been removed since it was opened, by the process that held the lock before."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def is_locked(folder: Path) -> bool:
    """Say whether a process trains in `folder` now (on this machine, or any that shares locks over the file system).

    A lock that may not even be opened is taken for one that is held.
    """
    for mode in (os.O_RDWR, os.O_RDONLY):  # NFS locks what can be written only; another user's can be read only
        try:
            descriptor = os.open(folder / LOCK, mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            continue
        try:
            return not _try_lock(descriptor)
        finally:
            os.close(descriptor)
    return True


class AttemptRecord:
    """The note of a running attempt in `status.json`; the first end that is given to it counts."""

    def __init__(self, folder: Path) -> None:
        """Note that an attempt begins, after those that the folder knows of."""
        self._folder, self._began = folder, time.monotonic()
        earlier = read_status(folder)
        self._was_finished, self._has_begun = earlier is not None and earlier.status == "finished", False
        self._attempt = Attempt(_now(), socket.gethostname(), os.getpid(), os.environ.get("SLURM_JOB_ID"))
        self._status = RunStatus("running", [*(earlier.attempts if earlier else []), self._attempt])
        write_status(folder, self._status)

    def begin(self) -> None:
        """Note that everything has been checked: from here on a failure is the run's, not that of a mistaken start."""
        self._has_begun = True

    def end(self, exit_code: int, message: str | None = None) -> None:
        """Note how the attempt ended; what ended it matters more than the note, so nothing is raised.

        A start that is refused leaves a finished run finished.
        """
        if self._attempt.ended_at is not None:
            return
        self._attempt.ended_at, self._attempt.seconds = _now(), round(time.monotonic() - self._began, 3)
        self._attempt.exit_code, self._attempt.message = exit_code, message
        was_refused = self._was_finished and not self._has_begun
        self._status.status = "finished" if exit_code == 0 or was_refused else "failed"
        try:
            write_status(self._folder, self._status)
        except Exception:  # most likely a full disk, which has no room for a second file
            with suppress(Exception):
                _overwrite(self._folder / STATUS, self._status)


@contextmanager
def recorded_attempt(folder: Path) -> Iterator[AttemptRecord]:
    """Note in `status.json` that an attempt begins and, whatever happens inside, how it ends."""
    record = AttemptRecord(folder)
    try:
        yield record
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        record.end(code, "interrupted" if code else None)
        raise
    except BaseException as error:
        record.end(2 if isinstance(error, UserError) else 1, f"{type(error).__name__}: {error}")
        raise
    record.end(0)


def add_ended_attempt(folder: Path, *, pid: int, seconds: float, exit_code: int, message: str) -> None:
    """Note the end of an attempt on behalf of a process `pid` that could not: it was killed, or never got so far.

    Does nothing while another process trains in the folder, whose status it is then, nor for a start that was refused
    in the folder of a finished run.
    """
    if is_locked(folder):
        return
    status = read_status(folder) or RunStatus("failed", [])
    last = status.attempts[-1] if status.attempts else None
    if last is None or last.pid != pid:
        if status.status == "finished":
            return
        last = Attempt(_now(), socket.gethostname(), pid)
        status.attempts.append(last)
    if last.exit_code is None:
        last.ended_at, last.seconds, last.exit_code, last.message = _now(), round(seconds, 3), exit_code, message
    status.status = "failed"
    write_status(folder, status)


def write_status(folder: Path, status: RunStatus) -> None:
    """Write `status.json`, whole or not at all."""
    with atomic_file(folder / STATUS) as temporary:
        temporary.write_text(_to_json(status), encoding="utf-8")


def _overwrite(path: Path, status: RunStatus) -> None:
    """Write to the place that the file has already; to be read at any moment is worth less than the note itself."""
    with path.open("r+", encoding="utf-8") as file:
        file.write(_to_json(status))
        file.truncate()


def _to_json(status: RunStatus) -> str:
    return json.dumps(asdict(status), indent=2) + "\n"


def read_status(folder: Path) -> RunStatus | None:
    """Return how the run in `folder` stands, None if nothing readable says so.

    A run that says `running` on this machine while nobody holds its folder's lock is `killed`; not every file system
    tells of the locks of others.
    """
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        status = RunStatus(str(content["status"]), [Attempt(**attempt) for attempt in content["attempts"]])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    hosts = [attempt.host for attempt in status.attempts[-1:]]
    if status.status == "running" and hosts in ([], [socket.gethostname()]) and not is_locked(folder):
        status.status = "killed"
    return status


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
