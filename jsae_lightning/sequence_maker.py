"""From an opened source to the sequences that are trained and validated on.

    rows of text or tokens --encode, pack, hold out--> sequences to train on | sequences to validate on

Three ways, by what the source is: documents in memory, a table on disk, a stream that is read in its own order.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jsae_lightning.config_schema import DataConfig
from jsae_lightning.errors import UserError
from jsae_lightning.language_model import load_tokenizer, read_architecture
from jsae_lightning.packing import (
    ArrayRows,
    Encoder,
    PackedSequences,
    Packing,
    PositionMask,
    encode_until,
    make_packing,
    make_position_mask,
)
from jsae_lightning.sequence_sources import (
    EndOfStreamError,
    PackedStream,
    SequenceSource,
    ShuffledSequences,
    first_sequences,
    probe_stream,
    rows_to_skip,
)
from jsae_lightning.token_sources import Rows, Source, document_digest
from jsae_lightning.token_tables import pack_table

MAX_CONTEXT_LENGTH = 2048
_PROBED_SEQUENCES = 256
_MIN_TOKENS_IN_MEMORY = 2**20


@dataclass(frozen=True)
class Sequences:
    """What a source became."""

    make_train: Callable[[], SequenceSource]
    """Opens the sequences to train on, at their beginning."""
    probe: Tensor
    """Some of them, (sequences, context_length)."""
    num: int | None
    """How many there are; None for a stream."""
    val_tokens: Tensor
    is_val_contiguous: bool
    """Whether each sequence to validate on goes on where the one before it stopped."""
    note: str = ""


class SequenceMaker:
    """Makes sequences of one source for one model's vocabulary and context."""

    tokenizer: Any
    """The model's; None only for pre-tokenised data and a model folder without tokenizer files."""
    encoder: Encoder
    context_length: int
    included: PositionMask
    """Mask of the positions that are served."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        *,
        model: Mapping[str, Any],
        seed: int,
        needed: Callable[[Tensor], int],
        trained_with: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the model's tokenizer and sizes; try the source's first rows.

        Args:
            config: every key of `conf/data/base.yaml`.
            source: what `open_source` returned for it.
            model: arguments of `LanguageModel.load`; where `synthetic` is set there is no tokenizer.
            seed: of the order of sequences that need not be read in the source's.
            needed: how many sequences the training takes, if they are like the given ones.
            trained_with: `data` of the training whose stream this is: of its rows no more are held out than there.

        Raises:
            UserError: a context longer than the model's, no tokenizer for text, another vocabulary's tokens.
        """
        self._config, self._source, self._seed = config, source, seed
        self._needed, self._trained_with = needed, trained_with
        self._read_model(model)
        self.encoder.encode(list(source.train.head))  # a vocabulary that does not match shows in the first rows
        self.included = make_position_mask(
            self.tokenizer, exclude_first=config.exclude_first_position, exclude_special=config.exclude_special_tokens
        )

    @property
    def where(self) -> str:
        """What was opened, for messages."""
        return self._source.train.where

    def make(self) -> Sequences:
        """Return the sequences.

        Raises:
            UserError: there is not one to train on, or not one to validate on.
        """
        source = self._source
        make = {"memory": self._from_memory, "table": self._from_table, "stream": self._from_stream}[source.kind]
        sequences = make(source)
        if not len(sequences.val_tokens):
            raise UserError(self._nothing_held_out(source))
        return sequences

    def _nothing_held_out(self, source: Source) -> str:
        if self._trained_with is not None:
            return (
                f"data.context_length: {self.context_length}, but none of the rows that training held out at the "
                "start of this stream gives a sequence so long: lower it"
            )
        if source.val is not None and self._config.val_split is not None:
            return (
                f"data.val_split: {source.val.where} has not one sequence of {self.context_length} tokens to "
                "validate on: choose a larger split, leave data.val_split null, or lower data.context_length"
            )
        return (
            f"data.val_fraction: {self._config.val_fraction} leaves not one sequence of {self.context_length} "
            f"tokens to validate on, in {source.val.where if source.val else self.where}: raise it, give more "
            "documents (data.document_separator splits text files), or lower data.context_length"
        )

    def _read_model(self, model: Mapping[str, Any]) -> None:
        rows, synthetic = self._source.train, model.get("synthetic")
        name, revision = model["name_or_path"], model.get("revision")
        architecture = read_architecture(name, revision=revision, synthetic=synthetic)
        self._longest = min(architecture.context_length, MAX_CONTEXT_LENGTH)
        self.context_length = length = self._config.context_length or self._longest
        if length > architecture.context_length:
            raise UserError(
                f"data.context_length: {length} is more than the model's {architecture.context_length}: lower it"
            )
        self.tokenizer = None
        try:
            if synthetic is None:
                self.tokenizer = load_tokenizer(name, revision=revision)
        except UserError:
            if not rows.holds_tokens:
                raise
        packing = make_packing(self._config.bos, self.tokenizer, length, holds_tokens=rows.holds_tokens)
        self.encoder = Encoder(packing, self.tokenizer, architecture.vocab_size, rows.where, rows.holds_tokens)

    # Documents in memory, tables

    def _from_memory(self, source: Source) -> Sequences:
        """Tokenise as many documents as training asks for (by powers of two, so that small changes change nothing)."""
        assert source.val is not None
        num_tokens = max(_MIN_TOKENS_IN_MEMORY, 2 ** math.ceil(math.log2(2 * self._config.train_tokens)))
        while True:
            arrays, is_all = encode_until(self.encoder, source.train.data, num_tokens)
            packed = PackedSequences(ArrayRows(arrays), self.encoder.packing)
            if is_all or len(packed) >= self._needed(packed.spread(_PROBED_SEQUENCES)):
                break
            num_tokens *= 2
        wanted = self._config.val_sequences * self.context_length
        # Documents come in the order of a hash: sixteen times what is needed, to choose sequences from many of them.
        val_arrays, _ = encode_until(self.encoder, source.val.data, 16 * wanted)
        val = PackedSequences(ArrayRows(val_arrays), self.encoder.packing)
        note = "" if is_all else ", of as many documents as training needs"
        return self._random_access(packed, *self._spread(val), note)

    def _from_table(self, source: Source) -> Sequences:
        fraction = self._config.val_fraction if source.val is None else None
        packed, val, left_out = pack_table(source.train, self.encoder, val_fraction=fraction)
        if val is not None:
            val_tokens, is_contiguous = self._spread(val)
        else:
            assert source.val is not None
            val_tokens, _ = first_sequences(source.val, self._cutting(source.val), self._config.val_sequences)
            is_contiguous = True
        note = f", {left_out:,} rows next to held-out ones left out" if left_out else ""
        return self._random_access(packed, val_tokens, is_contiguous, note)

    def _spread(self, val: PackedSequences) -> tuple[Tensor, bool]:
        """The held-out sequences that are used, and whether each goes on where the one before it stopped."""
        return val.spread(self._config.val_sequences), len(val) <= self._config.val_sequences

    def _random_access(self, packed: PackedSequences, val_tokens: Tensor, is_contiguous: bool, note: str) -> Sequences:
        if not len(packed):
            raise UserError(
                f"data.context_length: {self.context_length}, but the training documents of {self.where} hold only "
                f"{packed.num_tokens:,} tokens, not one sequence: give more data, or lower data.context_length or "
                "data.val_fraction"
            )

        def make_train() -> ShuffledSequences:
            return ShuffledSequences(packed, self._seed)

        return Sequences(make_train, packed.spread(_PROBED_SEQUENCES), len(packed), val_tokens, is_contiguous, note)

    # Streams

    def _from_stream(self, source: Source) -> Sequences:
        encoder, wanted = self._cutting(source.train), self._config.val_sequences
        skip_rows, skip_digests = 0, frozenset[bytes]()
        if source.val is not None:
            val_tokens, _ = first_sequences(source.val, self._cutting(source.val), wanted)
        else:
            val_tokens, held_out = first_sequences(source.train, encoder, wanted, self._rows_held_out(source.train))
            skip_rows = rows_to_skip(source.train, held_out, getattr(self.tokenizer, "eos_token_id", None))
            skip_digests = frozenset(map(document_digest, held_out))

        def make_train(repeat: bool = self._config.repeat) -> PackedStream:
            return PackedStream(source.train, encoder, skip_rows=skip_rows, skip_digests=skip_digests, repeat=repeat)

        try:
            probe = probe_stream(make_train(repeat=False), _PROBED_SEQUENCES)
        except EndOfStreamError as error:
            raise UserError(
                f"data.val_sequences: {wanted} sequences of {self.context_length} tokens are held out at the start of "
                f"{self.where}, and not one is left to train on: lower it, give more data or a data.val_split"
            ) from error
        note = f", its first {skip_rows:,} rows held out" if skip_rows else ""
        return Sequences(make_train, probe, None, val_tokens, True, note)

    def _rows_held_out(self, rows: Rows) -> int | None:
        """Return how many rows training held out, whose sequences may have had another length; None: any number."""
        if self._trained_with is None:
            return None
        length = self._trained_with["context_length"] or self._longest
        packing = make_packing(self._trained_with["bos"], self.tokenizer, length, holds_tokens=rows.holds_tokens)
        encoder = self._cutting(rows, packing)
        return len(first_sequences(rows, encoder, self._trained_with["val_sequences"])[1])

    def _cutting(self, rows: Rows, packing: Packing | None = None) -> Encoder:
        """The encoder for rows that are read in order: the first ones tell whether rows are cut or joined."""
        packing = packing or self.encoder.packing
        cut = rows.holds_tokens and all(len(value) >= packing.context_length for value in rows.head)
        return dataclasses.replace(self.encoder, packing=packing, where=rows.where, cut=cut)
