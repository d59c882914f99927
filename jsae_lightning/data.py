"""ActivationDataModule: the frozen language model, its tokens, and the shuffled activations that SAEs are trained on.

    tokens --language model up to the layer--> mlp_in --block buffer--> micro-batches (tokens, d_model)

`token_sources` opens the data, `sequence_maker` makes sequences of them, `activation_buffer` serves their activations.
"""

import logging
import math
from collections.abc import Mapping
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
from jsae_lightning.language_model import LanguageModel
from jsae_lightning.sequence_maker import SequenceMaker, Sequences
from jsae_lightning.sharding import choose_num_shards
from jsae_lightning.token_sources import Source, open_source

log = logging.getLogger(__name__)

POSITION_KEYS = ("exclude_first_position", "exclude_special_tokens")
"""Settings that decide which positions are served."""


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
        self._sequences: Sequences | None = None
        self._cache: ActivationCache | None = None
        self._loader: ActivationLoader | None = None

    @property
    def frozen_mlp(self) -> FrozenMLP:
        """The MLP of the language model's layer."""
        return self.language_model.frozen_mlp

    @property
    def where(self) -> str:
        """What was opened, for messages."""
        return self._maker.where

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
        sequences = self._make_sequences(open_source(self._config, self._model.get("synthetic")))
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
        own = {
            "fingerprint": sequences.fingerprint,
            "context_length": self._maker.context_length,
            "seed": self._seed,
        }
        self._cache = open_cache(
            self._config,
            self.language_model,
            self._maker.included,
            self.geometry,
            own,
            blocks=self._blocks(),
            rank=self._rank,
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
        return self._maker.included(tokens)

    def val_documents(self) -> Int64[Tensor, "sequences context_length"]:
        """Return the document that each position of `val_tokens` belongs to; see `documents` for what is assumed."""
        assert self._sequences is not None, "setup() comes first"
        holds_tokens = self._maker.encoder.holds_tokens
        separators = find_separators(self._maker.encoder.packing, self.tokenizer, holds_tokens=holds_tokens)
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
            f"data: {self.where}: {amount}{self._sequences.note}; bos={self._maker.encoder.packing.bos}; "
            f"training takes {tokens / 1e6:.2f} M tokens{epochs}; "
            f"validation on {len(self.val_tokens)} sequences{fewer}\n"
            f"activation buffer: {geometry.buffer_batches} batches of {geometry.batch_tokens:,} tokens = "
            f"{geometry.tokens:,} tokens of {geometry.sequences:,} sequences, "
            f"shuffled in {geometry.num_shards} shards; "
            f"{megabytes:.1f} MB on each of {self._world_size} rank(s){next_block}"
        )

    def _make_sequences(self, source: Source) -> Sequences:
        self._maker = SequenceMaker(
            self._config,
            source,
            model=self._model,
            seed=self._seed,
            needed=self._needed_sequences,
            trained_with=self._trained_with,
        )
        self.tokenizer = self._maker.tokenizer
        return self._maker.make()

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

    def _check_amount(self, sequences: Sequences) -> None:
        """Refuse data that would have to be repeated and must not (a stream tells only when it ends)."""
        if self._config.repeat or sequences.num is None or sequences.num >= (needed := self._needed_sequences()):
            return
        geometry = self.geometry
        possible = sequences.num // geometry.sequences * geometry.tokens
        raise UserError(
            f"data.train_tokens: {self._config.train_tokens:,} tokens take {needed:,} sequences of "
            f"{self._maker.context_length} tokens in whole blocks, and {self.where} has {sequences.num:,}: set "
            "data.repeat=true, give more data, or "
            + (f"lower data.train_tokens to {possible:,}" if possible else "lower data.buffer_batches")
        )
