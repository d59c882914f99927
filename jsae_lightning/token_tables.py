"""Random-access datasets on disk: tokenised once into a cache, split by document, and read row by row.

Texts are tokenised by `datasets.map` in batches, into `jsae_lightning/` of the `datasets` cache; pre-tokenised rows
are read where they are. Held-out documents are chosen by a hash of their content (`token_sources.is_held_out`).
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jsae_lightning.errors import UserError
from jsae_lightning.packing import Array, Encoder, PackedSequences
from jsae_lightning.sequence_sources import MAX_ROWS_OF_A_DOCUMENT
from jsae_lightning.token_sources import Rows, document_digest, is_held_out, quiet_datasets


class TableRows:
    """Rows `index` of a column of token lists (a pyarrow ChunkedArray, memory-mapped); see `packing.TokenRows`.

    `encoder` adds, cuts and checks what pre-tokenised rows need; None for rows that `tokenize_table` wrote.
    """

    def __init__(self, column: Any, index: Array, encoder: Encoder | None) -> None:
        """Compute the rows' lengths; tokens are read when asked for."""
        self._column, self._index, self._encoder = column, index, encoder
        self.lengths = row_lengths(column)[index]
        if encoder is not None:
            extra = int(encoder.packing.bos == "document")
            self.lengths = encoder.usable(np.where(self.lengths > 0, self.lengths + extra, 0))

    def row(self, index: int) -> Array:
        """Token ids of a row; UserError for ids outside the model's vocabulary."""
        ids = row_tokens(self._column, int(self._index[index]))
        return ids if self._encoder is None else self._encoder.encode([ids])[0]


def row_lengths(column: Any) -> Array:
    """Tokens of each row of a pyarrow column of lists, int64; 0 for null."""
    import pyarrow.compute as pc

    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def row_tokens(column: Any, row: int) -> Array:
    """Token ids of one row of a pyarrow column of lists."""
    values = column[row].values
    return np.empty(0, np.int32) if values is None else values.to_numpy(zero_copy_only=False)


def whole_column(dataset: Any, name: str) -> Any:
    """A column of a `datasets.Dataset` as a pyarrow ChunkedArray, memory-mapped where the dataset is."""
    return dataset.with_format("arrow")[:].column(name)


def tokenize_table(rows: Rows, encoder: Encoder, val_fraction: float) -> Any:
    """Tokenise a text column; return a `datasets.Dataset` of columns `tokens` (int32 lists) and `held_out`.

    Cached on disk by the dataset's fingerprint, the tokenizer and the packing rules. Several processes may do it at
    the same time (each moves a finished file into place).

    Raises:
        UserError: the cache cannot be written.
    """
    import datasets

    parts = (rows.data._fingerprint, rows.column, val_fraction, tokenizer_hash(encoder.tokenizer), encoder.packing)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "jsae_lightning" / f"{key}.arrow"

    def tokenize_batch(texts: list[str | None]) -> dict[str, list]:
        documents = [text or "" for text in texts]
        held_out = [is_held_out(document_digest(document), val_fraction) for document in documents]
        return {"tokens": encoder.encode(documents), "held_out": held_out}

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with quiet_datasets():
            return rows.data.with_format(None).map(
                tokenize_batch,
                batched=True,
                input_columns=[rows.column],
                remove_columns=rows.data.column_names,
                features=datasets.Features(
                    {"tokens": datasets.List(datasets.Value("int32")), "held_out": datasets.Value("bool")}
                ),
                cache_file_name=str(cache),
                new_fingerprint=key,
            )
    except PermissionError as error:
        raise UserError(
            f"HF_DATASETS_CACHE: '{cache.parent}' cannot be written ({error.strerror}): set it to a writable folder"
        ) from error


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that decides how a tokenizer encodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend else f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"
    return hashlib.sha256(described.encode()).hexdigest()


def pack_table(
    rows: Rows, encoder: Encoder, *, val_fraction: float | None
) -> tuple[PackedSequences, PackedSequences | None, int]:
    """Pack a table into (training sequences, held-out sequences, rows that belong to neither).

    `val_fraction` None keeps every row for training and returns None for the held-out sequences. Pre-tokenised rows
    that all hold a whole sequence are cut, so that no sequence runs over a row's end; otherwise they are joined.
    """
    if rows.holds_tokens:
        column = whole_column(rows.data, rows.column)
        encoder = dataclasses.replace(encoder, cut=all_hold_a_sequence(row_lengths(column), encoder))
        held_out = np.zeros(len(column), dtype=bool)
        train = ~held_out
        if val_fraction is not None:
            held_out, train = split_token_rows(column, val_fraction, getattr(encoder.tokenizer, "eos_token_id", None))
        row_encoder: Encoder | None = encoder
    else:
        table = tokenize_table(rows, encoder, val_fraction or 0.0)
        column = whole_column(table, "tokens")
        held_out = whole_column(table, "held_out").to_numpy()
        train, row_encoder = ~held_out, None

    def packed(mask: Array) -> PackedSequences:
        return PackedSequences(TableRows(column, np.flatnonzero(mask), row_encoder), encoder.packing)

    left_out = len(held_out) - int(held_out.sum()) - int(train.sum())
    return packed(train), packed(held_out) if val_fraction is not None else None, left_out


def all_hold_a_sequence(lengths: Array, encoder: Encoder) -> bool:
    """Say whether every pre-tokenised row has at least context_length tokens."""
    return bool((lengths >= encoder.packing.context_length).all())


def split_token_rows(
    column: Any, val_fraction: float, eos_id: int | None
) -> tuple[Bool[Array, " rows"], Bool[Array, " rows"]]:
    """Return the masks (held out, to train on) of pre-tokenised rows; one pass over all tokens."""
    held_out, has_eos, ends_with_eos = (np.zeros(len(column), dtype=bool) for _ in range(3))
    for index in range(len(column)):
        ids = row_tokens(column, index)
        held_out[index] = is_held_out(document_digest(ids), val_fraction)
        if eos_id is not None and len(ids):
            has_eos[index] = (ids == eos_id).any()
            ends_with_eos[index] = ids[-1] == eos_id
    return held_out, rows_without_shared_documents(held_out, has_eos, ends_with_eos)


def rows_without_shared_documents(
    held_out: Bool[Array, " rows"], has_eos: Bool[Array, " rows"], ends_with_eos: Bool[Array, " rows"]
) -> Bool[Array, " rows"]:
    """Mask of the rows that can share no document with a held-out row.

    In pre-packed data a document may run over the ends of rows. The document that a held-out row begins with reaches
    back to the last row that contains EOS, the one it ends with reaches on to the next row that does (each at most
    MAX_ROWS_OF_A_DOCUMENT rows away); all of these are left out of training. Where no row contains EOS, each row is
    taken for a document.
    """
    train = ~held_out
    if not has_eos.any():
        return train
    for row in np.flatnonzero(held_out).tolist():
        for before in range(row - 1, max(-1, row - 1 - MAX_ROWS_OF_A_DOCUMENT), -1):
            if ends_with_eos[before]:
                break
            train[before] = False
            if has_eos[before]:
                break
        for after in range(row + 1, min(len(train), row + 1 + MAX_ROWS_OF_A_DOCUMENT)):
            if ends_with_eos[after - 1]:
                break
            train[after] = False
            if has_eos[after]:
                break
    return train
