"""ActivationDataModule: the frozen language model, its tokens, and the shuffled activations that SAEs are trained on.

    tokens --language model up to the layer--> mlp_in --block buffer--> micro-batches (tokens, d_model)

`token_sources` opens the data, `packing`, `token_tables` and `sequence_sources` make sequences of them, and
`activation_buffer` serves their activations.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from lightning import LightningDataModule
from torch import Tensor

from jsae_lightning.activation_buffer import ActivationLoader
from jsae_lightning.activation_cache import ActivationCache, check_cache_dir, open_cache
from jsae_lightning.block_maker import BlockGeometry, sequences_per_shard
from jsae_lightning.config_schema import make_data_config
from jsae_lightning.documents import document_ids, find_separators
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.language_model import Architecture, LanguageModel, load_tokenizer, read_architecture
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
from jsae_lightning.sharding import choose_num_shards
from jsae_lightning.token_sources import Rows, Source, document_digest, open_source
from jsae_lightning.token_tables import pack_table

log = logging.getLogger(__name__)

MAX_CONTEXT_LENGTH = 2048
POSITION_KEYS = ("exclude_first_position", "exclude_special_tokens")
"""Settings that decide which positions are served."""
_PROBED_SEQUENCES = 256
_MIN_TOKENS_IN_MEMORY = 2**20


@dataclass(frozen=True)
class _Sequences:
    """What the source became: sequences to train on (`num` of them, None for a stream) and to validate on."""

    make_train: Callable[[], SequenceSource]
    probe: Tensor
    num: int | None
    val_tokens: Tensor
    is_val_contiguous: bool
    note: str = ""


class ActivationDataModule(LightningDataModule):
    """Owns the frozen language model and serves activations of its MLP's input.

    The language model is no submodule of anything and in no checkpoint. Training data are sharded over the ranks
    without overlap or loss; every rank gets the same number of micro-batches and the same `val_tokens`. The state of
    training lives in the loader (`ActivationLoader`), which Lightning saves.
    """

    language_model: LanguageModel
    tokenizer: Any
    """The model's tokenizer; None only for pre-tokenised data and a model folder without tokenizer files."""
    val_tokens: Int64[Tensor, "sequences context_length"]
    """Held-out sequences, at most `val_sequences`: a fixed choice that depends on no seed."""

    def __init__(
        self,
        *,
        model: dict[str, Any],
        data: dict[str, Any],
        seed: int,
        num_batches: int,
        micro_batches: int,
        device: torch.device | str = "cpu",
        trained_with: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the settings; nothing is read before `setup`.

        Args:
            model: arguments of `LanguageModel.load`, all but the device.
            data: every key of `DataConfig`; see `conf/data/base.yaml` for meanings, units and defaults.
            seed: of the order of the sequences and the shuffling of activations.
            num_batches: batches (optimizer steps) in all, of `data["batch_tokens"]` tokens over all ranks.
            micro_batches: micro-batches that make one batch on each rank.
            device: of the language model where there is no trainer, whose own device counts.
            trained_with: `data` of the training whose stream this is: of its rows no more are held out than there.

        Raises:
            UserError: a key of `data` is missing or unknown.
        """
        super().__init__()
        self._model, self._config = dict(model), make_data_config(data)
        self._seed, self._num_batches, self._micro_batches = seed, num_batches, micro_batches
        self._rank, self._world_size, self._device = 0, 1, device
        self._trained_with = trained_with
        self._sequences: _Sequences | None = None
        self._cache: ActivationCache | None = None
        self._loader: ActivationLoader | None = None

    @property
    def frozen_mlp(self) -> FrozenMLP:
        """The MLP of the language model's layer."""
        return self.language_model.frozen_mlp

    @property
    def where(self) -> str:
        """What was opened, for messages."""
        return self._where

    def prepare_data(self) -> None:
        """Tokenise a table of raw text into the cache on disk: once a node, before the other ranks read it there."""
        if self._config.source in ("jsonl", "parquet", "arrow", "hub") and not self._config.streaming:
            source = open_source(self._config)
            if not source.train.holds_tokens:
                self._make_sequences(source)

    def setup(self, stage: str | None = None) -> None:
        """Open the data, pack them, then load the language model on the trainer's device (without one: `device`).

        May be called again, which does nothing.

        Raises:
            UserError: everything that is wrong with the data or the model, before weights are loaded where possible.
        """
        if self._sequences is not None:
            return
        device = self._device
        if self.trainer is not None:
            self._rank, self._world_size = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
        sequences = self._make_sequences(open_source(self._config, self._synthetic))
        self.geometry = self._block_geometry(sequences.probe)
        self._check_amount(sequences)
        check_cache_dir(self._config.cache_dir)
        self.val_tokens = sequences.val_tokens
        self.language_model = LanguageModel.load(**self._model, device=device)
        self._sequences = sequences
        if self._rank == 0:
            for line in self.describe().splitlines():
                log.info(line)

    def train_dataloader(self) -> ActivationLoader:
        """A new loader that stands at the beginning; its state says where to go on.

        Raises:
            UserError: the activations do not fit on the disk of `cache_dir`.
        """
        assert self._sequences is not None, "setup() comes first"
        sequences = self._sequences.make_train()
        own = {"fingerprint": sequences.fingerprint, "context_length": self._context_length, "seed": self._seed}
        self._cache = open_cache(
            self._config, self.language_model, self._mask, self.geometry, own, blocks=self._blocks(), rank=self._rank
        )
        self._loader = ActivationLoader(
            sequences,
            self.language_model.mlp_in,
            self.included,
            d_model=self.language_model.architecture.d_model,
            device=self.language_model.device,
            geometry=self.geometry,
            num_batches=self._num_batches,
            micro_batches=self._micro_batches,
            lm_batch_sequences=self._config.lm_batch_sequences,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
            positions={key: getattr(self._config, key) for key in POSITION_KEYS},
            cache=self._cache,
            prefetch=self.prefetch,
        )
        return self._loader

    @property
    def block_bytes(self) -> int:
        """Bytes of this rank's part of one block of activations."""
        return self.geometry.tokens // self._world_size * self.language_model.architecture.d_model * 4

    @property
    def prefetch(self) -> bool:
        """Whether the next block is made while one is served; `auto`: where the device works beside the processor."""
        wanted = self._config.prefetch
        is_wanted = self.language_model.device.type == "cuda" if wanted == "auto" else bool(wanted)
        return is_wanted and self._blocks() > 1

    def on_exception(self, exception: BaseException) -> None:
        """Let no block be made any more."""
        if self._loader is not None:
            self._loader.close()

    def teardown(self, stage: str | None = None) -> None:
        """Say what this rank read from the cache and wrote to it."""
        if self._loader is not None:
            self._loader.close()
        if self._cache is not None and self._rank == 0:
            log.info(self._cache.report())

    def included(self, tokens: Int64[Tensor, "sequences context_length"]) -> Bool[Tensor, "sequences context_length"]:
        """Mask of the positions that SAEs are trained on and judged at."""
        return self._mask(tokens)

    def val_documents(self) -> Int64[Tensor, "sequences context_length"]:
        """Return the document that each position of `val_tokens` belongs to; see `documents` for what is assumed."""
        assert self._sequences is not None, "setup() comes first"
        holds_tokens = self._encoder.holds_tokens
        separators = find_separators(self._encoder.packing, self.tokenizer, holds_tokens=holds_tokens)
        # Rows of tokens may be held out from anywhere, cut, and without separators.
        contiguous = self._sequences.is_val_contiguous and not holds_tokens
        return document_ids(self.val_tokens, separators, contiguous=contiguous)

    def describe(self) -> str:
        """Two lines: the data and how often training goes through them; the buffer's memory."""
        assert self._sequences is not None, "setup() comes first"
        length, geometry = self.val_tokens.shape[1], self.geometry
        tokens = self._num_batches * self._config.batch_tokens
        amount, epochs = "a stream, in its own order", ""
        if (num := self._sequences.num) is not None:
            amount = f"{num:,} sequences of {length} tokens ({num * length / 1e6:.2f} M tokens)"
            epochs = f" in {self._needed_sequences() / num:.2f} epochs"
        wanted = self._config.val_sequences
        fewer = f" ({wanted} asked for, no more are held out)" if len(self.val_tokens) < wanted else ""
        blocks = 2 if self.prefetch else 1
        megabytes = self.block_bytes * blocks / 1e6
        next_block = ", with the next block, which is made in the background" if blocks == 2 else ""
        return (
            f"data: {self._where}: {amount}{self._sequences.note}; bos={self._encoder.packing.bos}; training takes "
            f"{tokens / 1e6:.2f} M tokens{epochs}; validation on {len(self.val_tokens)} sequences{fewer}\n"
            f"activation buffer: {geometry.buffer_batches} batches of {geometry.batch_tokens:,} tokens = "
            f"{geometry.tokens:,} tokens of {geometry.sequences:,} sequences, "
            f"shuffled in {geometry.num_shards} shards; "
            f"{megabytes:.1f} MB on each of {self._world_size} rank(s){next_block}"
        )

    # Sequences

    @property
    def _synthetic(self) -> dict[str, Any] | None:
        """The keys of `model.synthetic`, where the model is a synthetic one (which has no tokenizer)."""
        return self._model.get("synthetic")

    def _make_sequences(self, source: Source) -> _Sequences:
        architecture = read_architecture(
            self._model["name_or_path"], revision=self._model.get("revision"), synthetic=self._synthetic
        )
        self._where = source.train.where
        self._encoder = self._make_encoder(source.train, architecture)
        self._encoder.encode(list(source.train.head))  # a vocabulary that does not match shows in the first rows
        self._mask: PositionMask = make_position_mask(
            self.tokenizer,
            exclude_first=self._config.exclude_first_position,
            exclude_special=self._config.exclude_special_tokens,
        )
        make = {"memory": self._from_memory, "table": self._from_table, "stream": self._from_stream}[source.kind]
        sequences = make(source)
        if not len(sequences.val_tokens):
            if self._trained_with is not None:
                raise UserError(
                    f"data.context_length: {self._context_length}, but none of the rows that training held out at the "
                    "start of this stream gives a sequence so long: lower it"
                )
            if source.val is not None and self._config.val_split is not None:
                raise UserError(
                    f"data.val_split: {source.val.where} has not one sequence of {self._context_length} tokens to "
                    "validate on: choose a larger split, leave data.val_split null, or lower data.context_length"
                )
            raise UserError(
                f"data.val_fraction: {self._config.val_fraction} leaves not one sequence of {self._context_length} "
                f"tokens to validate on, in {source.val.where if source.val else self._where}: raise it, give more "
                "documents (data.document_separator splits text files), or lower data.context_length"
            )
        return sequences

    def _make_encoder(self, rows: Rows, architecture: Architecture) -> Encoder:
        self._longest = min(architecture.context_length, MAX_CONTEXT_LENGTH)
        length = self._config.context_length or self._longest
        if length > architecture.context_length:
            raise UserError(
                f"data.context_length: {length} is more than the model's {architecture.context_length}: lower it"
            )
        self._context_length = length
        self.tokenizer = None
        try:
            if self._synthetic is None:
                self.tokenizer = load_tokenizer(self._model["name_or_path"], revision=self._model.get("revision"))
        except UserError:
            if not rows.holds_tokens:
                raise
        packing = make_packing(self._config.bos, self.tokenizer, length, holds_tokens=rows.holds_tokens)
        return Encoder(packing, self.tokenizer, architecture.vocab_size, rows.where, rows.holds_tokens)

    def _from_memory(self, source: Source) -> _Sequences:
        """Tokenise as many documents as training asks for (by powers of two, so that small changes change nothing)."""
        assert source.val is not None
        num_tokens = max(_MIN_TOKENS_IN_MEMORY, 2 ** math.ceil(math.log2(2 * self._config.train_tokens)))
        while True:
            arrays, is_all = encode_until(self._encoder, source.train.data, num_tokens)
            packed = PackedSequences(ArrayRows(arrays), self._encoder.packing)
            if is_all or len(packed) >= self._needed_sequences(packed.spread(_PROBED_SEQUENCES)):
                break
            num_tokens *= 2
        wanted = self._config.val_sequences * self._context_length
        # Documents come in the order of a hash: sixteen times what is needed, to choose sequences from many of them.
        val_arrays, _ = encode_until(self._encoder, source.val.data, 16 * wanted)
        val = PackedSequences(ArrayRows(val_arrays), self._encoder.packing)
        note = "" if is_all else ", of as many documents as training needs"
        return self._random_access(packed, *self._spread(val), note)

    def _from_table(self, source: Source) -> _Sequences:
        fraction = self._config.val_fraction if source.val is None else None
        packed, val, left_out = pack_table(source.train, self._encoder, val_fraction=fraction)
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

    def _random_access(self, packed: PackedSequences, val_tokens: Tensor, is_contiguous: bool, note: str) -> _Sequences:
        if not len(packed):
            raise UserError(
                f"data.context_length: {self._context_length}, but the training documents of {self._where} hold only "
                f"{packed.num_tokens:,} tokens, not one sequence: give more data, or lower data.context_length or "
                "data.val_fraction"
            )

        def make_train() -> ShuffledSequences:
            return ShuffledSequences(packed, self._seed)

        return _Sequences(make_train, packed.spread(_PROBED_SEQUENCES), len(packed), val_tokens, is_contiguous, note)

    def _from_stream(self, source: Source) -> _Sequences:
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
                f"data.val_sequences: {wanted} sequences of {self._context_length} tokens are held out at the start of "
                f"{self._where}, and not one is left to train on: lower it, give more data or a data.val_split"
            ) from error
        note = f", its first {skip_rows:,} rows held out" if skip_rows else ""
        return _Sequences(make_train, probe, None, val_tokens, True, note)

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
        packing = packing or self._encoder.packing
        cut = rows.holds_tokens and all(len(value) >= packing.context_length for value in rows.head)
        return dataclasses.replace(self._encoder, packing=packing, where=rows.where, cut=cut)

    # Amounts

    def _block_geometry(self, probe: Tensor) -> BlockGeometry:
        config = self._config
        shards = choose_num_shards(config.num_shards, config.batch_tokens, self._world_size)
        shard_tokens = config.buffer_batches * config.batch_tokens // shards
        count = sequences_per_shard(shard_tokens, self.included(probe).sum(dim=1))
        return BlockGeometry(config.batch_tokens, config.buffer_batches, shards, count)

    def _needed_sequences(self, probe: Tensor | None = None) -> int:
        """Sequences that all ranks read in the whole training: whole blocks."""
        geometry = self.geometry if probe is None else self._block_geometry(probe)
        return self._blocks() * geometry.sequences

    def _blocks(self) -> int:
        """Blocks of the whole training."""
        return math.ceil(self._num_batches / self._config.buffer_batches)

    def _check_amount(self, sequences: _Sequences) -> None:
        """Refuse data that would have to be repeated and must not (a stream tells only when it ends)."""
        if self._config.repeat or sequences.num is None or sequences.num >= (needed := self._needed_sequences()):
            return
        geometry = self.geometry
        possible = sequences.num // geometry.sequences * geometry.tokens
        raise UserError(
            f"data.train_tokens: {self._config.train_tokens:,} tokens take {needed:,} sequences of "
            f"{self._context_length} tokens in whole blocks, and {self._where} has {sequences.num:,}: set "
            "data.repeat=true, give more data, or "
            + (f"lower data.train_tokens to {possible:,}" if possible else "lower data.buffer_batches")
        )
