"""Tables that outgrow the memory: sorted runs on disk, merged back in pieces of a bounded size.

A block is a table with an int64 `key` column, ascending, and further columns of the same length. An external merge sort
(Knuth, The Art of Computer Programming, vol. 3, section 5.4), with a search for the next piece's last key in place of a
tournament of rows, so that all the work on rows is done by tensor operations.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Block = dict[str, Tensor]
"""Columns of one length by name; `key` is int64."""

KEY = "key"


def sort_block(block: Block) -> Block:
    """Return the rows by ascending key, rows with the same key in their old order."""
    order = block[KEY].argsort(stable=True)
    return {name: column[order] for name, column in block.items()}


def combine(block: Block) -> Block:
    """Return one row for each key, ascending: the other columns' sums over the rows with that key."""
    block = sort_block(block)
    keys = block[KEY]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    unique = keys[first]
    row = first.cumsum(0) - 1
    sums = {
        name: column.new_zeros(len(unique)).index_add_(0, row, column) for name, column in block.items() if name != KEY
    }
    return {KEY: unique} | sums


def concatenate(blocks: list[Block]) -> Block:
    """Return the rows of several blocks with the same columns, one after the other."""
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


class SortedRuns:
    """Sorted blocks: one of them in memory, more of them as files, read back in the order of their keys.

    At most `max_rows` rows are in memory at any time, beside the block that `add` is given.
    """

    def __init__(self, folder: Path, max_rows: int) -> None:
        """Write to `folder` (made when needed) once there is more than one block or more than `max_rows` rows."""
        self.folder, self.max_rows = folder, max_rows
        self.num_rows = 0
        self._memory: Block | None = None
        self._files: list[Path] = []

    @property
    def num_files(self) -> int:
        """How many runs lie on disk."""
        return len(self._files)

    def add(self, block: Block) -> None:
        """Take a sorted block; the caller must not change it afterwards. An empty one is left out."""
        rows = len(block[KEY])
        if not rows:
            return
        first = not self.num_rows
        self.num_rows += rows
        if first and rows <= self.max_rows:
            self._memory = block
            return
        self.flush()
        self._write(block)

    def flush(self) -> None:
        """Put everything on disk, for another process to `adopt`."""
        if self._memory is not None:
            self._write(self._memory)
            self._memory = None

    def adopt(self, folder: Path) -> None:
        """Add the runs that another process wrote to `folder`."""
        for path in sorted(folder.glob("run-*"), key=lambda path: int(path.name.removeprefix("run-"))):
            self.num_rows += len(_open(path)[KEY])
            self._files.append(path)

    def _write(self, block: Block) -> None:
        path = self.folder / f"run-{len(self._files)}"
        path.mkdir(parents=True)
        for name, column in block.items():
            np.save(path / f"{name}.npy", column.cpu().numpy())
        self._files.append(path)

    def merged(self) -> Iterator[Block]:
        """Yield all rows by ascending key, in blocks of at most `max_rows`; rows with one key are in one block.

        (If more than `max_rows` runs share a key, its block has as many rows as runs.)
        """
        if self._files:
            self.flush()
        elif self._memory is not None:
            yield self._memory
        at, rows = [0] * len(self._files), self.num_rows if self._files else 0
        while rows:
            # Opened anew for each piece: pages of a mapped file count as this process's memory until it is closed.
            runs = [_open(path) for path in self._files]
            end = self._ends(runs, at)
            pieces = [
                {name: torch.from_numpy(np.array(column[a:b])) for name, column in run.items()}
                for run, a, b in zip(runs, at, end, strict=True)
                if b > a
            ]
            del runs
            rows -= sum(end) - sum(at)
            at = end
            yield sort_block(concatenate(pieces))

    def _ends(self, runs: list[dict[str, np.ndarray]], at: list[int]) -> list[int]:
        """Return where each run's next piece ends: the most whole keys whose rows fit into `max_rows`, at least one."""

        def ends(key: int) -> list[int]:
            return [
                position + int(np.searchsorted(run[KEY][position:], key, side="right"))
                for position, run in zip(at, runs, strict=True)
            ]

        low = min(int(run[KEY][position]) for position, run in zip(at, runs, strict=True) if position < len(run[KEY]))
        high = max(int(run[KEY][-1]) for run in runs)
        while low < high:  # the largest key that fits; `low` is taken whether it does or not
            middle = low + (high - low + 1) // 2
            if sum(ends(middle)) - sum(at) <= self.max_rows:
                low = middle
            else:
                high = middle - 1
        return ends(low)


def _open(path: Path) -> dict[str, np.ndarray]:
    return {file.stem: np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))}
