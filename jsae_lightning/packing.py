"""From documents to sequences of one length: tokens, BOS and EOS, packing, and the positions that SAEs see.

Documents are joined by the tokenizer's EOS token, where it has one, and cut into sequences of `context_length` tokens;
the last, partial one is dropped. Pre-tokenised rows get no EOS: they are taken to hold their own separators.

`bos` says where BOS tokens are added:
    never       nowhere
    document    before each document (in place of the EOS between documents where the two are the same token)
    sequence    at position 0 of each sequence, so that a sequence holds context_length - 1 tokens of the data
    auto        (default) `sequence` if the tokenizer adds BOS by itself when it encodes, else `never`;
                always `never` for pre-tokenised data, to which nothing is ever added unasked
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from jsae_lightning.errors import UserError

Array = np.ndarray
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Packing:
    """The resolved packing rules: `bos` is never, document or sequence; ids are None where nothing is added."""

    context_length: int
    bos: str
    bos_id: int | None
    eos_id: int | None
    """Appended to every raw document; None for pre-tokenised rows."""

    @property
    def chunk(self) -> int:
        """Tokens of the data in one sequence."""
        return self.context_length - (self.bos == "sequence")

    def wrap(self, ids: Array) -> Array:
        """Add BOS and EOS to the token ids of one document; int32, empty for an empty document."""
        if not len(ids):
            return ids
        before = [self.bos_id] if self.bos == "document" else []
        after = [self.eos_id] if self.eos_id is not None and [self.eos_id] != before else []
        return np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)]) if before or after else ids

    def sequences(self, chunks: Array) -> Int64[Tensor, "sequences context_length"]:
        """Turn (sequences, chunk) tokens of the data into sequences, with BOS at position 0 under that rule."""
        tokens = torch.from_numpy(chunks.astype(np.int64))
        if self.bos != "sequence" or self.bos_id is None:
            return tokens
        return torch.cat([torch.full((len(tokens), 1), self.bos_id, dtype=torch.int64), tokens], dim=1)


def make_packing(bos: str, tokenizer: Any, context_length: int, *, holds_tokens: bool) -> Packing:
    """Resolve `bos` (auto, never, document, sequence) for a tokenizer (None: only for pre-tokenised data).

    Raises:
        UserError: a BOS token is asked for and the tokenizer has none, or a context of fewer than 2 tokens.
    """
    if context_length < 2:
        raise UserError(f"data.context_length: {context_length} is too short: give at least 2 tokens")
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos == "auto":
        bos = "sequence" if not holds_tokens and adds_bos(tokenizer) else "never"
    if bos != "never" and bos_id is None:
        raise UserError(f"data.bos: {bos}, but the model's tokenizer has no BOS token: set data.bos=never")
    eos_id = None if holds_tokens else tokenizer.eos_token_id
    return Packing(context_length, bos, None if bos == "never" else bos_id, eos_id)


def adds_bos(tokenizer: Any) -> bool:
    """Say whether the tokenizer starts what it encodes with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def tokenize(tokenizer: Any, texts: list[str]) -> list[Array]:
    """Return the int32 token ids of each text, without special tokens and without any limit on the length."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    else:  # the Rust tokenizer itself, without the lists that the wrapper makes: 1.6 times as fast
        backend.no_truncation()
        backend.no_padding()
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def check_vocabulary(ids: Array, vocab_size: int, where: str, *, holds_tokens: bool = True) -> None:
    """Raise UserError if an id is none of the model's (negative, or >= vocab_size); `holds_tokens`: pre-tokenised."""
    if not len(ids) or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    outside = ids[(ids < 0) | (ids >= vocab_size)][0]
    if holds_tokens:
        raise UserError(
            f"data.token_column: {where} holds token id {outside}, but the model's vocabulary ends at "
            f"{vocab_size - 1}: the tokenizer of the dataset does not match the model; use data tokenised for this "
            "model, or raw text"
        )
    raise UserError(
        f"model: its tokenizer gives token id {outside} for a text of {where}, but its vocabulary ends at "
        f"{vocab_size - 1}: the tokenizer does not match the model; use the one that the model was trained with"
    )


@dataclass(frozen=True)
class Encoder:
    """Turns rows (texts or token ids) into int32 token arrays that are ready to be joined.

    `cut` (pre-tokenised rows that all hold at least a sequence) trims each row to whole sequences, so that no
    sequence runs over a row's end.
    """

    packing: Packing
    tokenizer: Any
    vocab_size: int
    where: str
    holds_tokens: bool
    cut: bool = False

    def encode(self, values: list[Any]) -> list[Array]:
        """Encode some rows; UserError for token ids outside the model's vocabulary."""
        if self.holds_tokens:
            return [self._encode_tokens(np.asarray(ids, dtype=np.int64)) for ids in values]
        tokenized = tokenize(self.tokenizer, values)
        for ids in tokenized:
            check_vocabulary(ids, self.vocab_size, self.where, holds_tokens=False)
        return [self.packing.wrap(ids) for ids in tokenized]

    def _encode_tokens(self, ids: Array) -> Array:
        check_vocabulary(ids, self.vocab_size, self.where)
        wrapped = self.packing.wrap(ids.astype(np.int32))
        return wrapped[: self.usable(len(wrapped))]

    def usable(self, length: int | Array) -> Any:
        """Tokens that are kept of a row of `length` tokens."""
        return length // self.packing.chunk * self.packing.chunk if self.cut else length


def encode_until(encoder: Encoder, documents: Iterable[Any], num_tokens: int) -> tuple[list[Array], bool]:
    """Encode documents in order until they hold `num_tokens` tokens; return (arrays, whether all were encoded)."""
    arrays: list[Array] = []
    total = 0
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
        if total >= num_tokens:
            return arrays, False
        encoded = encoder.encode(batch)
        total += sum(map(len, encoded))
        arrays += encoded
    return arrays, True


@runtime_checkable
class TokenRows(Protocol):
    """Rows of tokens with random access."""

    lengths: Array
    """Tokens of each row, int64."""

    def row(self, index: int) -> Array:
        """Token ids of a row."""


class ArrayRows:
    """Rows in memory: (rows,) of int32 arrays."""

    def __init__(self, arrays: list[Array]) -> None:
        """Keep `arrays` as one flat row, so that a million short documents cost no million objects."""
        self._tokens = np.concatenate([*arrays, np.empty(0, np.int32)])
        self.lengths = np.array([len(self._tokens)])

    def row(self, index: int) -> Array:
        """The flat tokens, whatever the index."""
        return self._tokens


class PackedSequences:
    """Random access to the sequences that rows of tokens are packed into.

    The rows are joined in order, and sequence i is tokens [i * chunk, (i + 1) * chunk) of the join.
    """

    def __init__(self, rows: TokenRows, packing: Packing) -> None:
        """Keep the rows where they are; only the rows' ends are held in memory (8 bytes a row)."""
        self._rows, self._packing = rows, packing
        self._ends = np.cumsum(rows.lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return self.num_tokens // self._packing.chunk

    def read(self, indices: Int64[Tensor, " sequences"]) -> Int64[Tensor, "sequences context_length"]:
        """Return the sequences with these indices."""
        chunks = [self._chunk(index) for index in indices.tolist()]
        return self._packing.sequences(np.stack(chunks) if chunks else np.empty((0, self._packing.chunk), np.int64))

    def _chunk(self, index: int) -> Array:
        start, stop = index * self._packing.chunk, (index + 1) * self._packing.chunk
        row = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            offset = start - (int(self._ends[row]) - int(self._rows.lengths[row]))
            part = self._rows.row(row)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
            row += 1
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def spread(self, num: int) -> Int64[Tensor, "sequences context_length"]:
        """Return at most `num` sequences, evenly spaced: a fixed choice that depends on no seed."""
        num = min(num, len(self))
        return self.read(torch.arange(num) * len(self) // max(1, num))

    def fingerprint(self) -> str:
        """Hash of the number of sequences, the rules, and 64 of the sequences: tells other data from the same."""
        header = f"{len(self)} {self.num_tokens} {self._packing}"
        return hashlib.sha256(header.encode() + self.spread(64).numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class PositionMask:
    """Which positions the SAEs see: not position 0 if `exclude_first`, not the ids in `special_ids`."""

    exclude_first: bool
    special_ids: tuple[int, ...]

    def __call__(self, tokens: Int64[Tensor, "sequences context_length"]) -> Bool[Tensor, "sequences context_length"]:
        """Return the mask of included positions, on the tokens' device."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if self.special_ids:
            mask &= ~torch.isin(tokens, torch.tensor(self.special_ids, device=tokens.device))
        if self.exclude_first:
            mask[:, 0] = False
        return mask


def make_position_mask(tokenizer: Any, *, exclude_first: bool, exclude_special: bool) -> PositionMask:
    """Build the mask's rule; special tokens are the tokenizer's BOS, EOS and padding; UserError without one."""
    if not exclude_special:
        return PositionMask(exclude_first, ())
    if tokenizer is None:
        raise UserError(
            "data.exclude_special_tokens: true, but the model has no tokenizer to tell which: set it to false"
        )
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return PositionMask(exclude_first, tuple(sorted(ids)))
