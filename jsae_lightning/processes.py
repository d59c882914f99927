"""What the processes of one run owe each other: a child ends with its parent, and all ranks name one folder.

Imports torch only where `torchrun` has started this process.
"""

import fcntl
import os
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

from jsae_lightning.errors import RunError

_PARENT = "JSAE_PARENT"
_STARTED_AT = "JSAE_STARTED_AT"
_UNCLAIMED = "JSAE_UNCLAIMED"
_SECONDS_BETWEEN_LOOKS = 1.0
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")
_STORE_TIMEOUT_S = 60
_MAX_WAIT_S = 60
"""A start that claims to lie further in the future is of a clock that was wrong."""


def end_with_parent() -> None:
    """End this process when the one that started it is gone, if that was one of ours (a sweep, or rank 0).

    Such a parent that is killed leaves children that would wait for it, or train on unseen in a folder that the user
    means to resume. Between a sweep and its jobs there may be a worker of the launcher's, whose end counts as well.
    Processes that are started from here on will look after this one.
    """
    place, _, pid = os.environ.get(_PARENT, "").rpartition(":")
    os.environ[_PARENT] = f"{_place()}:{os.getpid()}"
    if place == _place():  # else there is none, or one that has only lent its environment, to a job of Slurm's
        threading.Thread(target=_watch, args=(int(pid), os.getppid()), daemon=True, name="parent-watch").start()


def _place() -> str:
    return f"{socket.gethostname()}:{os.environ.get('SLURM_JOB_ID', '')}"


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _watch(parent: int, starter: int) -> None:
    while is_alive(parent) and os.getppid() == starter:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    print(f"the process that started this one (pid {parent}) is gone: ending", file=sys.stderr, flush=True)
    os._exit(1)


def agree_on_start_time() -> None:
    """Give all ranks that `torchrun` has started the same time for the name of their folder: that of rank 0.

    Rank 0 publishes it in the store of torchrun's agent. Ranks that Lightning or a sweep starts inherit it, or are told
    their folder.
    """
    if _STARTED_AT in os.environ:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        is_first = os.environ.get("RANK") == "0"
        os.environ[_STARTED_AT] = _shared(repr(_claimed_time() if is_first else 0.0))
        return
    os.environ[_STARTED_AT] = repr(time.time())
    if is_rank_zero() and "SLURM_PROCID" not in os.environ:  # Slurm's other tasks could not know of a later second
        os.environ[_UNCLAIMED] = "1"


def start_time(pattern: str) -> str:
    """Return when this run was started, local time in the pattern of `strftime`.

    No two processes of a user on a machine are given the same second: their folders are named by it.
    """
    if os.environ.pop(_UNCLAIMED, None):
        os.environ[_STARTED_AT] = repr(_claimed_time())
    return time.strftime(pattern, time.localtime(float(os.environ.get(_STARTED_AT, time.time()))))


def _claimed_time() -> float:
    """Return the time, in a second that no other process has claimed: wait for the next if one has this."""
    path = Path(tempfile.gettempdir()) / f"jsae-lightning-last-start-{os.getuid()}"
    try:
        with path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            last = file.read().strip()
            now = time.time()
            if last.isdecimal() and 0 <= int(last) - int(now) < _MAX_WAIT_S:
                time.sleep(int(last) + 1 - now)
                now = time.time()
            file.truncate(0)
            file.write(str(int(now)))
            return now
    except OSError:  # no place for it: then one second may have two starts
        return time.time()


def is_rank_zero() -> bool:
    """Whether this process is, or will start, the ranks' first: by what torchrun, Lightning, Slurm or MPI has set."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # numbers the nodes itself, whatever Slurm does
        return os.environ.get("RANK", "0") == "0"
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def rank_suffix() -> str:
    """Return `_rank1` ... for the ranks that torchrun or Slurm numbers from 1, nothing for the first.

    For the names of files that every rank writes. Where both have set a number, torchrun has started the ranks.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return "" if rank == "0" else f"_rank{rank}"


def is_restarted() -> bool:
    """Whether Slurm has started this job again, after a requeue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _shared(value: str) -> str:
    from torch.distributed import DistError, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STORE_TIMEOUT_S))
        if os.environ.get("RANK") == "0":
            store.set("jsae_lightning/started_at", value)
            return value
        return store.get("jsae_lightning/started_at").decode()
    except DistError as error:
        raise RunError(
            f"torchrun: its store at {host}:{port} does not answer within {_STORE_TIMEOUT_S} s, so the ranks cannot "
            "agree on a folder: use torchrun --standalone on one machine, or give hydra.run.dir=DIR"
        ) from error
