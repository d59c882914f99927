"""Sums of the Jacobian over tokens for every pair of latents that were ever active together, in bounded memory.

    for each (i, j):   count = #{t : i and j active},   sum_abs = sum_t |J_ij(t)|,   sum = sum_t J_ij(t)
    for each latent:   count of tokens on which it is active, sum and maximum of its activation

Of 65,536 x 65,536 pairs a few 10^8 may turn up in 10^6 tokens: too many to keep in memory, and the rare ones cannot be
dropped without an error. So the pairs are kept exactly: a table of at most `max_pairs` rows in memory, which is written
to disk as a run sorted by key when it is full; the runs are merged at the end (see `sorted_runs`). A row takes 32 bytes
on disk; in memory, `combine` holds its copies and the order of rows too: at most about 100 bytes times `max_pairs` in
all, 2 GB for the default. Sums are float64 and do not depend on when runs were written, up to rounding.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.distributed import all_reduce_max, all_reduce_sum, rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.jacobians import Jacobian
from jsae_lightning.metrics import Sums
from jsae_lightning.sae import Latents
from jsae_lightning.sorted_runs import KEY, Block, SortedRuns, combine, concatenate

MAX_PAIRS = 20_000_000
"""Rows in memory by default."""


class EdgeAccumulator:
    """Adds up the Jacobians of batches of tokens by pair of latents; the key of (i, j) is i * d_in + j."""

    def __init__(self, d_in: int, d_out: int, folder: Path, *, max_pairs: int = MAX_PAIRS) -> None:
        """Count pairs of `d_out` output and `d_in` input latents; `folder` is for the runs, and empty or not there.

        Raises UserError if d_in * d_out does not fit into int64, or max_pairs < 4.
        """
        if d_in * d_out >= 2**63:
            raise UserError(f"sae: {d_out} x {d_in} pairs of latents are more than 64 bits can number: use fewer")
        if max_pairs < 4:
            raise UserError(f"max_pairs: {max_pairs} rows are too few to work with: give 4 or more")
        self.d_in, self.d_out, self.max_pairs = d_in, d_out, max_pairs
        self.folder = folder
        self.runs = SortedRuns(folder, max_pairs // 2)
        self.peak_rows = 0
        """The most rows that were in memory at the same time."""
        self._table: Block | None = None
        self._pending: list[Block] = []

    def add(self, jacobian: Jacobian) -> None:
        """Add a batch of tokens: every entry whose two latents are active, those with J = 0 too."""
        active = jacobian.active
        key = jacobian.indices_out[:, :, None] * self.d_in + jacobian.indices_in[:, None, :]
        self.add_entries(key[active], jacobian.values[active])

    def add_entries(self, key: Int[Tensor, " entries"], values: Float[Tensor, " entries"]) -> None:
        """Add single entries J_ij under their keys; a key may come more than once."""
        quarter = self.max_pairs // 4
        for keys, part in zip(key.split(quarter), values.split(quarter), strict=True):
            part = part.double()
            block = combine({KEY: keys, "count": torch.ones_like(keys), "sum_abs": part.abs(), "sum": part})
            self._add({name: column.cpu() for name, column in block.items()}, quarter)

    def _add(self, block: Block, quarter: int) -> None:
        if _rows(self._pending) + len(block[KEY]) > quarter:
            self._merge()
        self._pending.append(block)
        self.peak_rows = max(self.peak_rows, _rows(self._pending) + _rows([self._table]))

    def _merge(self) -> None:
        """Move the pending blocks into the table; write the table to disk if it fills half of the room."""
        blocks = [block for block in (self._table, *self._pending) if block is not None]
        if not blocks:
            return
        rows = concatenate(blocks)
        self._table, self._pending, blocks = None, [], []  # free them before the sort makes further copies
        table = combine(rows)
        if len(table[KEY]) > self.max_pairs // 2:
            self.runs.add(table)
            self.runs.flush()
        else:
            self._table = table

    def finish(self) -> SortedRuns:
        """Return the runs of everything that was added."""
        self._merge()
        if self._table is not None:
            self.runs.add(self._table)
            self._table = None
        return self.runs

    def pairs(self) -> Iterator[Block]:
        """Yield the pairs by ascending key, each once: blocks of `key`, `count`, `sum_abs`, `sum`."""
        for block in self.finish().merged():
            yield combine(block)


def gather_on_first_rank(accumulator: EdgeAccumulator, parts: Path) -> EdgeAccumulator:
    """Return, on rank 0, an accumulator of all ranks' pairs; with one rank, and on the others, `accumulator`.

    The ranks' runs lie in `parts/<rank>`, which must be on a file system that they share; call it on every rank.
    Raises UserError on rank 0 if the others' files are not there.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return accumulator
    accumulator.finish().flush()
    accumulator.folder.mkdir(parents=True, exist_ok=True)
    (accumulator.folder / "done").touch()
    device = _device_for_collectives()
    all_reduce_sum({"barrier": torch.zeros(1, device=device)})
    if rank:
        return accumulator
    whole = EdgeAccumulator(accumulator.d_in, accumulator.d_out, parts / "merged", max_pairs=accumulator.max_pairs)
    for other in range(world_size):
        if not (parts / str(other) / "done").is_file():
            raise UserError(
                f"{parts / str(other)}: rank {other}'s pairs are not there: write the evaluation to a folder that all "
                "ranks share, or evaluate with one rank"
            )
        whole.runs.adopt(parts / str(other))
    return whole


def _device_for_collectives() -> torch.device:
    import torch.distributed as dist

    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _rows(blocks: list[Block | None] | list[Block]) -> int:
    return sum(len(block[KEY]) for block in blocks if block is not None)


class LatentStatistics:
    """Counts, sums and maxima of one SAE's activations over the tokens on which a latent is active."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.count = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.max = torch.zeros(d_sae, dtype=torch.float32, device=device)

    def add(self, latents: Latents) -> None:
        """Add a batch of tokens."""
        indices, values = latents.indices[latents.active], latents.values[latents.active]
        self.count += torch.bincount(indices, minlength=len(self.count))
        self.sum.index_add_(0, indices, values.double())
        self.max.scatter_reduce_(0, indices, values.float(), reduce="amax")

    def reduced(self) -> Sums:
        """Return `count`, `sum` and `max` over all ranks, on the CPU; call it on every rank."""
        sums = all_reduce_sum({"count": self.count, "sum": self.sum})
        return {name: value.cpu() for name, value in (sums | {"max": all_reduce_max(self.max)}).items()}
