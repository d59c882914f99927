"""Sequences in one global order, handed out to the ranks: shuffled random access, or a stream with a saved position.

Of the sequences at positions [p, p + count * world_size), rank r is handed p + r, p + r + world_size, ...: over all
ranks none is lost and none comes twice, whatever the number of ranks.
"""

import hashlib
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.packing import Array, Encoder, PackedSequences
from jsae_lightning.seeding import seeded_generator
from jsae_lightning.stream_reader import shards_digest
from jsae_lightning.token_sources import BATCH_ROWS, Rows, document_digest, quiet_datasets

MAX_ROWS_OF_A_DOCUMENT = 64
"""A document that runs over the ends of pre-packed rows is followed over at most so many rows."""


@runtime_checkable
class SequenceSource(Protocol):
    """Sequences in one global order."""

    fingerprint: str
    """Hash that tells other data, or the same data packed otherwise, from these."""

    def read(self, position: int, count: int, rank: int, world_size: int) -> Int64[Tensor, "sequences context_length"]:
        """Return sequences position + rank + i * world_size, i < count."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on behind the last sequence that any rank was handed; primitives and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; an empty state stands for the beginning."""


class ShuffledSequences:
    """Packed sequences in a random order: one permutation of all of them an epoch, drawn from (seed, epoch).

    A pure function of (seed, position), so without state. Holds one permutation, 4 bytes a sequence.
    """

    def __init__(self, packed: PackedSequences, seed: int) -> None:
        """Order `packed`, which must hold at least one sequence, by `seed`."""
        self._packed, self._seed = packed, seed
        self.fingerprint = packed.fingerprint()
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int32)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = seeded_generator("epoch", self._seed, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._packed), generator=generator, dtype=torch.int32)
        return self._order

    def read(self, position: int, count: int, rank: int, world_size: int) -> Int64[Tensor, "sequences context_length"]:
        """Return sequences position + rank + i * world_size, i < count; epochs follow each other without a gap."""
        positions = position + rank + torch.arange(count) * world_size
        epochs = positions // len(self._packed)
        indices = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            inside = epochs == epoch
            indices[inside] = self._permutation(epoch)[positions[inside] % len(self._packed)].long()
        return self._packed.read(indices)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: any position can be read at any time."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class EndOfStreamError(UserError):
    """A stream that must not repeat holds fewer sequences than were asked for."""


class PackedStream:
    """Sequences packed from a stream of rows, in the stream's own order.

    Every rank reads every row, so that all agree on the packing. State: the dataset's position, the tokens that were
    read but not handed out (less than a document each of a few rows), and counts. The dataset's own shuffling is not
    used: its buffer would not survive a resume.
    """

    def __init__(
        self, rows: Rows, encoder: Encoder, *, skip_rows: int, skip_digests: frozenset[bytes], repeat: bool
    ) -> None:
        """Read `rows` from `skip_rows` on, leaving out documents whose digest is in `skip_digests`.

        `repeat` starts the stream again at its end; otherwise reading past it is a UserError.
        """
        self._rows, self._encoder = rows, encoder
        self._skip_rows, self._skip_digests, self._repeat = skip_rows, skip_digests, repeat
        self._chunk = encoder.packing.chunk
        self.fingerprint = self._fingerprint()
        self._shards = shards_digest(rows.data)
        self.load_state_dict({})

    def _fingerprint(self) -> str:
        header = f"{self._skip_rows} {self._encoder.packing} {self._encoder.cut}"
        digests = b"".join(document_digest(value) for value in self._rows.head)
        return hashlib.sha256(header.encode() + digests).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Position (sequences), epoch, rows read of it, tokens at hand (int32), the dataset's own state, its files."""
        return {
            "position": self._position,
            "epoch": self._epoch,
            "rows_read": self._rows_read,
            "pending": torch.from_numpy(self._pending),
            "dataset": self._reader.state_dict() if self._rows_read else None,
            "shards": list(self._shards),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position at which `state` was taken; an empty state is the beginning.

        Raises UserError where the stream's files are not those of then: the same position would be in another one.
        """
        number, digest = state.get("shards", self._shards)  # older checkpoints do not tell
        # Nor do all versions of `datasets`: 0 files.
        if number and self._shards[0] and (number, digest) != self._shards:
            raise UserError(
                f"data: the files of {self._rows.where} are not those of the checkpoint ({number:,} then, "
                f"{self._shards[0]:,} now; names, order, and sizes of local ones): put them back, or begin anew"
            )
        self._position: int = state.get("position", 0)
        self._pending: Array = state["pending"].numpy() if state else np.empty(0, np.int32)
        self._open(state.get("epoch", 0), state.get("rows_read", 0), state.get("dataset"))

    def _open(self, epoch: int, rows_read: int = 0, dataset_state: dict[str, Any] | None = None) -> None:
        self._epoch, self._rows_read = epoch, rows_read
        self._reader = self._rows.reader(dataset_state)

    def read(self, position: int, count: int, rank: int, world_size: int) -> Int64[Tensor, "sequences context_length"]:
        """Return sequences position + rank + i * world_size, i < count; `position` must be where the stream stands.

        Raises:
            EndOfStreamError: the stream ends before and must not repeat.
            UserError: a token id is outside the vocabulary.
            RunError: the server of the stream stays broken.
        """
        if position != self._position:
            raise ValueError(f"the stream stands at sequence {self._position}, not at {position}")
        num_tokens = count * world_size * self._chunk
        self._fill(num_tokens)
        chunks = self._pending[:num_tokens].reshape(count * world_size, self._chunk)[rank::world_size]
        self._pending = self._pending[num_tokens:].copy()
        self._position += count * world_size
        return self._encoder.packing.sequences(chunks)

    def _fill(self, num_tokens: int) -> None:
        parts, total = [self._pending], len(self._pending)
        while total < num_tokens:
            values = self._next_values()
            if values is None:
                if not self._repeat:
                    available = self._position + total // self._chunk
                    raise EndOfStreamError(
                        f"data.repeat: false, but {self._rows.where} ends after {available:,} sequences of "
                        f"{self._encoder.packing.context_length} tokens, and training, which reads whole blocks of "
                        f"{num_tokens // self._chunk:,}, needs more: go on from the last checkpoint with "
                        "ckpt_path=auto data.repeat=true, or begin anew with a lower data.train_tokens"
                    )
                # The partial sequence at the end of an epoch is dropped, as at the end of any data.
                whole = total // self._chunk * self._chunk
                parts, total = [np.concatenate(parts)[:whole]], whole
                self._open(self._epoch + 1)
                continue
            encoded = self._encoder.encode(values)
            parts += encoded
            total += sum(map(len, encoded))
        self._pending = np.concatenate(parts)

    def _next_values(self) -> list[Any] | None:
        """The next rows that are not held out (perhaps none of a batch), or None at the end of the stream."""
        with quiet_datasets():
            batch = [self._rows.value(row) for row in self._reader.read(BATCH_ROWS)]
        if not batch:
            return None
        values = batch[max(0, self._skip_rows - self._rows_read) :]
        self._rows_read += len(batch)
        return [value for value in values if document_digest(value) not in self._skip_digests]


def probe_stream(stream: PackedStream, num: int) -> Int64[Tensor, "sequences context_length"]:
    """Read at most `num` sequences off a stream that does not repeat."""
    sequences: list[Tensor] = []
    try:
        while len(sequences) < num:
            sequences.append(stream.read(len(sequences), 1, 0, 1)[0])
    except EndOfStreamError:
        if not sequences:
            raise
    return torch.stack(sequences)


def first_sequences(
    rows: Rows, encoder: Encoder, num: int, max_rows: int | None = None
) -> tuple[Int64[Tensor, "sequences context_length"], list[Any]]:
    """Pack the first rows, no more than `max_rows`, into at most `num` sequences; return them and the rows (values)
    that it took.
    """  # noqa: D205
    used: list[Any] = []
    parts = [np.empty(0, np.int32)]
    total, need = 0, num * encoder.packing.chunk
    values = islice(rows.values(), max_rows)
    with quiet_datasets():
        while total < need and (value := next(values, None)) is not None:
            parts += encoder.encode([value])
            total += len(parts[-1])
            used.append(value)
    usable = min(need, total // encoder.packing.chunk * encoder.packing.chunk)
    return encoder.packing.sequences(np.concatenate(parts)[:usable].reshape(-1, encoder.packing.chunk)), used


def rows_to_skip(rows: Rows, held_out: list[Any], eos_id: int | None) -> int:
    """Number of rows at the start of a stream that training must not read, when the first ones are held out.

    A document may run over the end of a pre-packed row: unless the last held-out row ends with EOS, the rows up to
    and with the first one that contains EOS are skipped too (at most MAX_ROWS_OF_A_DOCUMENT).
    """
    num = len(held_out)
    if not rows.holds_tokens or eos_id is None or not held_out or list(held_out[-1])[-1:] == [eos_id]:
        return num
    following = islice(rows.values(), num, num + MAX_ROWS_OF_A_DOCUMENT)
    for skipped, value in enumerate(following, start=1):
        if eos_id in value:
            return num + skipped
    return num + MAX_ROWS_OF_A_DOCUMENT
