"""How much memory a contestant's step takes beyond what it starts with, and what happens where there is not enough.

On CUDA torch counts what is allocated. On a CPU the measure is the growth of the process's resident memory:

    peak = highest resident memory while the step runs - resident memory when it begins

Each contestant gets a process of its own, because memory that an earlier one gave back is often kept for the next and
would hide what that one needs. The process runs the step on a few tokens first (libraries, threads and their
workspaces are no part of the peak), builds the problem, has Linux reset the high-water mark, and runs one step. It may
not take more than what is free, and says so instead of being killed, or getting others killed.
"""

import ctypes
import gc
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from jsae_lightning.benchmarking.shapes import Settings, Shape
from jsae_lightning.errors import RunError

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
_KEPT_SHARE = 0.15
"""Of the machine's memory, what a measured process leaves free: with less, watchdogs begin to end processes."""
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Cannot allocate memory", "could not create a memory")


@dataclass(frozen=True)
class Peak:
    """What a step needed."""

    bytes: int | None
    """Growth at its highest; None where the system does not tell, or where the step did not fit."""
    started_with: int = 0
    """Bytes of what it works on."""
    fits: bool = True


def measure_apart(name: str, shape: Shape, settings: Settings) -> Peak:
    """Measure one step of a contestant on the CPU, in a process of its own.

    Raises RunError if that process fails for another reason than a lack of memory.
    """
    request = json.dumps({"name": name, "shape": asdict(shape), "settings": asdict(settings)})
    command = [sys.executable, "-m", "jsae_lightning.benchmarking.memory_process"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode in (-signal.SIGKILL, -signal.SIGTERM):  # by the kernel or a watchdog, for want of memory
        return Peak(None, fits=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"{name}: the process that measures its memory failed: {last}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def peak_growth(step: Callable[[], object]) -> int | None:
    """Run `step` and return by how many bytes this process's resident memory grew at most; None off Linux."""
    _give_back()
    try:
        _CLEAR.write_text("5", encoding="ascii")  # "5": reset the high-water mark to what is resident now
    except OSError:
        step()
        return None
    before = resident_bytes()
    step()
    return max(0, _kilobytes(_STATUS, "VmHWM") - before)


def resident_bytes() -> int:
    """Return the memory that this process has in use, 0 where the system does not tell."""
    return _kilobytes(_STATUS, "VmRSS") if _STATUS.exists() else 0


def peak_allocated(step: Callable[[], object]) -> int:
    """Run `step` and return by how many bytes torch's allocations on the CUDA device grew at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def limit_to_free_memory() -> None:
    """Let this process take what is free now and no more: allocations beyond it fail with an error."""
    free = free_bytes()
    if free is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_kilobytes(_STATUS, "VmData") + free,) * 2)


def free_bytes() -> int | None:
    """Return the bytes that may be taken without harm: of the machine, and of its control group; None off Linux."""
    if not _MEMINFO.exists():
        return None
    free = max(0, _kilobytes(_MEMINFO, "MemAvailable") - int(_KEPT_SHARE * _kilobytes(_MEMINFO, "MemTotal")))
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no group, another version of groups, or "max"
        return free
    return max(0, min(free, limit - used))


def _kilobytes(file: Path, key: str) -> int:
    """Return a size that a file of Linux gives in kB, in bytes."""
    lines = file.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _give_back() -> None:
    """Return freed memory to the system, so that it is not used again unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
