"""A shard's activations as one file that is verified whenever it is read, and the lock under which it is made.

    FILE.safetensors    mlp_in (shard_tokens, d_model)
    its metadata        what the activations are of, as the caller says, and the checksum of the tensor's bytes

What reads as whole is whole: files appear by renaming, and damage of any kind shows on reading.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.model_files import first_line

_TENSOR, _CHECKSUM = "mlp_in", "checksum"


class DamagedFileError(Exception):
    """A file that is there and is not what was written, or not what is looked for; the message says why."""


def write_shard(path: Path, mlp_in: Shaped[Tensor, "tokens d_model"], about: dict[str, str]) -> None:
    """Write a shard in the tensor's own dtype, whole or not at all, with `about` in its metadata.

    Raises UserError or OSError if the disk is full or the folder cannot be written.
    """
    mlp_in = mlp_in.cpu().contiguous()
    content = save({_TENSOR: mlp_in}, metadata=about | {_CHECKSUM: bytes_hash(mlp_in)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def read_shard(
    path: Path, *, shape: tuple[int, int], dtype: torch.dtype, about: dict[str, str]
) -> Shaped[Tensor, "tokens d_model"]:
    """Return a shard as a memory-mapped tensor after comparing its shape, dtype, metadata and checksum.

    Raises FileNotFoundError, and DamagedFileError for everything that does not agree.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, mlp_in = file.metadata() or {}, file.get_tensor(_TENSOR)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"cannot be read ({first_line(error)})") from error
    if tuple(mlp_in.shape) != shape or mlp_in.dtype != dtype:
        raise DamagedFileError(f"holds {mlp_in.dtype} of shape {tuple(mlp_in.shape)}, not {dtype} of {shape}")
    for name, value in about.items():
        if metadata.get(name) != value:
            raise DamagedFileError(f"holds activations of {name} {metadata.get(name)}, not {value}")
    if metadata.get(_CHECKSUM) != bytes_hash(mlp_in):
        raise DamagedFileError("its bytes do not agree with its checksum")
    return mlp_in


def bytes_hash(tensor: Shaped[Tensor, "..."]) -> str:
    """XXH3 (128 bits, hex) of a tensor's bytes: finds damage at the speed of memory; no shield against malice."""
    return xxhash.xxh3_128_hexdigest(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder that is there (flock on itself, so nothing is left behind); yield whether it is held.

    It is not held where another process holds it and `wait` is false, and on file systems without such locks. The
    operating system drops it with the process.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True
