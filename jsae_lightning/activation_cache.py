"""The activation cache: shuffled shards of activations on disk, made by the first job that needs them.

    CACHE_DIR/HASH_OF_KEY/key.json                                     everything that the activations depend on
                         /shard_03/sequence_000000001536.safetensors   shard 3 of the block at sequence 1536

What is kept is what a block of the buffer takes (`activation_buffer`), in the order of its slots, so that serving it
needs no language model. A file that is missing, damaged, or of other tokens is made again. Jobs and ranks that need the
same file at the same time wait for the one that makes it. Files do not depend on the number of ranks.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jsae_lightning.atomic_files import atomic_file, remove_leftovers
from jsae_lightning.cache_files import DamagedFileError, bytes_hash, locked, read_shard, write_shard
from jsae_lightning.config_schema import DataConfig
from jsae_lightning.errors import UserError

if TYPE_CHECKING:
    from jsae_lightning.block_maker import BlockGeometry
    from jsae_lightning.language_model import LanguageModel
    from jsae_lightning.packing import PositionMask

log = logging.getLogger(__name__)

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COMPUTED_BY = ("torch", "transformers", "transformer-lens")  # other versions may round otherwise


def check_cache_dir(cache_dir: str | None) -> Path | None:
    """Make the folder of all caches and return it, None for none; UserError if it cannot be made or written to."""
    if cache_dir is None:
        return None
    folder = Path(cache_dir).expanduser()
    with _clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def open_cache(
    config: DataConfig,
    language_model: "LanguageModel",
    mask: "PositionMask",
    geometry: "BlockGeometry",
    data: dict[str, Any],
    *,
    blocks: int,
    rank: int,
) -> "ActivationCache | None":
    """Open the cache of these activations and check that `blocks` blocks fit on its disk; None if there is to be none.

    `data` tell these sequences, in this order, from others: fingerprint, context length, seed.
    Raises UserError for a folder that cannot be written and for a disk that is too small.
    """
    if (cache_dir := check_cache_dir(config.cache_dir)) is None:
        return None
    key = {
        "format": FORMAT,
        "weights": language_model.weights_hash(),  # their dtype is a part of it
        "layer": language_model.layer,
        "device": language_model.device.type,
        "lm_batch_sequences": config.lm_batch_sequences,
        "versions": {name: version(name) for name in _COMPUTED_BY},
        "data": data,
        "mask": asdict(mask),
        "geometry": asdict(geometry),
    }
    d_model = language_model.architecture.d_model
    cache = ActivationCache(cache_dir, key, geometry=geometry, d_model=d_model, dtype=config.cache_dtype)
    about = cache.check_space(blocks)
    if rank == 0:
        log.info(about)
    return cache


class ActivationCache:
    """The shard files of one key: `get` reads one or makes it. Counts what it read and wrote (`read`, `written`)."""

    def __init__(self, cache_dir: Path, key: dict[str, Any], *, geometry: "BlockGeometry", d_model: int, dtype: str):
        """Make the key's folders and remove what killed processes left there.

        Args:
            cache_dir: the folder of all caches.
            key: what the activations depend on, as primitives; jobs with equal keys share their files.
            geometry: sizes of a block.
            d_model: width of the activations.
            dtype: what is stored, and what the served values are rounded to: a key of DTYPES.

        Raises:
            UserError: the folders cannot be made.
        """
        text = json.dumps(key | {"d_model": d_model, "dtype": dtype}, sort_keys=True, indent=1) + "\n"
        self._key = hashlib.sha256(text.encode()).hexdigest()
        self.folder, self.dtype = cache_dir / self._key[:16], dtype
        self.read = self.written = 0
        self._geometry, self._d_model, self._is_writable = geometry, d_model, True
        with _clear_errors(self.folder):
            self._make_folders(text)

    def _make_folders(self, key: str) -> None:
        for shard in range(self._geometry.num_shards):
            folder = self._shard_folder(shard)
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, wait=False) as is_alone:
                if is_alone:  # nobody is writing there
                    remove_leftovers(folder)
        path = self.folder / "key.json"
        if not path.is_file() or path.read_bytes() != key.encode():
            with atomic_file(path) as temporary:
                temporary.write_text(key, encoding="utf-8")

    def _shard_folder(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:02d}"

    def get(
        self,
        position: int,
        shard: int,
        tokens: Int64[Tensor, "sequences context_length"],
        make: Callable[[], Tensor],
    ) -> Float[Tensor, "shard_tokens d_model"]:
        """Return a shard of the block that begins at sequence `position`: from its file, or by `make` and kept there.

        `tokens` are the shard's own, and the file must be of the same ones. The values are float32, rounded to the
        cache's dtype whether they are read or made; on the CPU or on the device of what `make` returns.
        """
        path = self._shard_folder(shard) / _file_name(position)
        about = {"key": self._key, "position": str(position), "shard": str(shard), "tokens": bytes_hash(tokens)}
        with suppress(FileNotFoundError, DamagedFileError):
            return self._read(path, about)
        with locked(path.parent) if self._is_writable else nullcontext():
            return self._read_or_make(path, about, make)

    def _read(self, path: Path, about: dict[str, str]) -> Tensor:
        shape = (self._geometry.shard_tokens, self._d_model)
        stored = read_shard(path, shape=shape, dtype=DTYPES[self.dtype], about=about)
        self.read += 1
        return stored.float()

    def _read_or_make(self, path: Path, about: dict[str, str], make: Callable[[], Tensor]) -> Tensor:
        """Look again, as another job may have made the file while this one waited for the lock."""
        try:
            return self._read(path, about)
        except FileNotFoundError:
            pass
        except DamagedFileError as error:
            log.warning(f"activation cache: {path} {error}: it is made again")
        stored = make().to(DTYPES[self.dtype])
        if self._is_writable:
            self._write(path, stored, about)
        return stored.float()

    def _write(self, path: Path, stored: Tensor, about: dict[str, str]) -> None:
        """Write the file; a full disk or a folder that is gone ends the writing, not the run."""
        try:
            write_shard(path, stored, about)
            self.written += 1
        except (UserError, OSError) as error:
            self._is_writable = False
            log.warning(f"activation cache: {error}; training goes on, and this job writes no more of it")

    def check_space(self, blocks: int) -> str:
        """Return one line about the files that `blocks` blocks from the beginning need, and how many are there.

        Raises:
            UserError: those that are missing need more space than the disk has.
        """
        geometry = self._geometry
        names = {_file_name(block * geometry.sequences) for block in range(blocks)}
        folders = [self._shard_folder(shard) for shard in range(geometry.num_shards)]
        present = sum(len(names & {path.name for path in folder.iterdir()}) for folder in folders)
        file_bytes = geometry.shard_tokens * self._d_model * DTYPES[self.dtype].itemsize
        files = len(names) * geometry.num_shards
        needed, free = (files - present) * file_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            smaller = "set data.cache_dtype=bfloat16 for half the size, " if self.dtype == "float32" else ""
            raise UserError(
                f"data.cache_dir: {self.folder} needs {needed / 1e9:.2f} GB more for the activations of this run, and "
                f"{free / 1e9:.2f} GB are free: free some space, {smaller}choose another folder, or null for none"
            )
        return (
            f"activation cache: {self.folder}: {present:,} of the {files:,} shard files of this run are there; "
            f"{files * file_bytes / 1e6:,.1f} MB in all, in {self.dtype}"
        )

    def report(self) -> str:
        """One line: what was read and written."""
        return f"activation cache: {self.read:,} shard files read, {self.written:,} written"


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder} cannot be written ({error.strerror}): choose another folder, or null for none"
        ) from error


def _file_name(position: int) -> str:
    return f"sequence_{position:012d}.safetensors"
