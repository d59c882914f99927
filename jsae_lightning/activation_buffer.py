"""The block buffer: activations of many sequences, shuffled token by token and served in micro-batches.

A block is `buffer_batches` batches (a batch is what one optimizer step sees, over all ranks and micro-batches). It is
made and shuffled in `num_shards` parts, and every batch takes an equal share of each:

    shard_tokens        = buffer_batches * batch_tokens / num_shards
    sequences_per_shard = ceil(shard_tokens / usable positions of a sequence)
    shard v of block b  = sequences start(b) + v + i * num_shards, i < sequences_per_shard
    start(b)            = b * num_shards * sequences_per_shard       (in the global order of the sequences)

Rank r makes shards r, r + world_size, ... So batch n, as a set of tokens, is a pure function of (seed, n) whatever the
number of ranks that divides `num_shards`, and a resume re-runs the language model on one block. Tokens of a shard
beyond its share (less than one sequence's, unless special tokens are excluded) are dropped.

With `prefetch` the next block is made in the background while one is served. The sequences are read, the language model
run and the tokens shuffled in the same order as without, so neither the batches nor the state depend on it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jsae_lightning.activation_cache import ActivationCache
from jsae_lightning.background import LEAVE_S, SideStream, Task
from jsae_lightning.block_maker import Block, BlockGeometry, BlockMaker
from jsae_lightning.errors import UserError
from jsae_lightning.sequence_sources import SequenceSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _NextBlock:
    """A block that is being made, and the state of the stream at its start."""

    task: Task
    block: Block
    source_state: dict[str, Any]


class ActivationLoader:
    """A sized, stateful, iterable loader of shuffled MLP inputs.

    Yields float32 (batch_tokens / world_size / micro_batches, d_model) tensors on `device`, `num_batches` times
    `micro_batches` of them. Only blocks are made ahead: after n micro-batches the state says n, and iterating again
    goes on from there (a finished loader starts over). Memory: this rank's part of one block (with `prefetch` of two,
    of which one is being made), one shard and one micro-batch. What goes wrong with a block that is made ahead is
    raised when its first micro-batch is asked for, as without `prefetch`.

    State (`state_dict`, primitives and tensors, the same on every rank):
        batch               whole batches served so far
        block_start         batch with which the current block begins
        sequence_position   global position of the current block's first sequence
        source              state of the stream at the block's start, {} for random access
        seed, fingerprint, positions
                            must be equal on loading; the last says which positions are served
        dtype               what the activations were rounded to, by a cache; another one is warned of on loading
        batch_tokens, buffer_batches, num_shards, sequences_per_shard
                            if one differs on loading, training goes on from the block's start in the order of the
                            sequences (none left out, at most a block of them seen twice), which is logged
    """

    def __init__(
        self,
        sequences: SequenceSource,
        mlp_in: Callable[[Tensor], Tensor],
        included: Callable[[Tensor], Tensor],
        *,
        d_model: int,
        device: torch.device | str,
        geometry: BlockGeometry,
        num_batches: int,
        micro_batches: int,
        lm_batch_sequences: int,
        seed: int,
        rank: int,
        world_size: int,
        positions: Mapping[str, bool] | None = None,
        cache: ActivationCache | None = None,
        prefetch: bool = False,
    ) -> None:
        """Hold references only; the first block is filled when the first micro-batch is asked for.

        Args:
            sequences: the order of the data; a stream must not be shared with another loader.
            mlp_in: (sequences, context_length) int64 tokens to (sequences, context_length, d_model) float32.
            included: tokens to the mask of positions that are served.
            d_model: width of the activations.
            device: where the block is kept and the language model runs.
            geometry: sizes of a block; its `num_shards` divides by `world_size`.
            num_batches: batches (optimizer steps) in all.
            micro_batches: micro-batches that make one batch on each rank.
            lm_batch_sequences: sequences of one forward pass of the language model.
            seed: of the shuffling within blocks.
            rank: this process.
            world_size: number of processes.
            positions: the settings that `included` follows, by their keys in `data`.
            cache: where activations are kept and taken from; None: the language model always runs.
            prefetch: make the next block while one is served. `mlp_in` is then called on another thread, and what
                else runs the language model meanwhile must not disturb it.
        """
        self.geometry, self.num_batches, self.micro_batches = geometry, num_batches, micro_batches
        self._sequences, self._seed, self._cache = sequences, seed, cache
        self._positions = dict(positions or {})
        self._maker = BlockMaker(
            sequences,
            mlp_in,
            included,
            d_model=d_model,
            device=torch.device(device),
            geometry=geometry,
            lm_batch_sequences=lm_batch_sequences,
            seed=seed,
            rank=rank,
            world_size=world_size,
            cache=cache,
        )
        self._block: Block | None = None
        self._spare: Block | None = None  # the memory of the block before, for the next one
        self._next: _NextBlock | None = None
        self._side_stream = SideStream(torch.device(device)) if prefetch else None
        self._go_to(batch=0, block_start=0, position=0, source_state={})

    def __len__(self) -> int:
        return self.num_batches * self.micro_batches

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d_model"]]:
        if self._served >= len(self):
            self._go_to(batch=0, block_start=0, position=0, source_state={})
        while self._served < len(self):
            batch = self._micro_batch()
            self._served += 1
            yield batch

    @property
    def redrawn_tokens(self) -> int:
        """Tokens of all blocks made so far that were drawn twice, as special tokens left too few."""
        return self._maker.redrawn_tokens

    def close(self) -> None:
        """End what runs in the background; then only `load_state_dict` goes on."""
        if self._next is not None:
            self._next.task.stop(LEAVE_S)

    def _go_to(self, *, batch: int, block_start: int, position: int, source_state: dict[str, Any]) -> None:
        if self._next is not None:
            self._next.task.stop()
            self._next = None
        self._served, self._block_start, self._position = batch * self.micro_batches, block_start, position
        self._source_state, self._is_filled = source_state, False
        self._sequences.load_state_dict(source_state)

    def _enter_next_block_if_used_up(self) -> None:
        next_start = self._block_start + self.geometry.buffer_batches
        if self._is_filled and self._served == next_start * self.micro_batches:
            self._block_start, self._position = next_start, self._position + self.geometry.sequences
            self._source_state = self._next.source_state if self._next else self._sequences.state_dict()
            self._is_filled = False

    def _micro_batch(self) -> Float[Tensor, "tokens d_model"]:
        self._enter_next_block_if_used_up()
        if not self._is_filled:
            self._take_block()
        assert self._block is not None
        batch, part = divmod(self._served, self.micro_batches)
        tokens = self._block[batch - self._block_start].flatten(0, 1)
        # A copy, because the block's memory is used again for another one.
        return tokens.chunk(self.micro_batches)[part].clone()

    def _take_block(self) -> None:
        """Make the block that is due, or wait for it if it is being made; begin with the next one."""
        due, self._next = self._next, None
        if due is None:
            self._block = self._block if self._block is not None else self._maker.empty()
            self._maker.fill(self._block, self._position)
        else:
            due.task.wait()
            self._block, self._spare = due.block, self._block
        self._is_filled = True
        if self._side_stream is not None and self._block_start + self.geometry.buffer_batches < self.num_batches:
            self._begin_next_block(self._side_stream)

    def _begin_next_block(self, side_stream: SideStream) -> None:
        """Let another thread read the sequences and run the language model; this one reads no sequences meanwhile."""
        block, self._spare = self._spare if self._spare is not None else self._maker.empty(), None
        position = self._position + self.geometry.sequences
        source_state = self._sequences.state_dict()
        side_stream.follow()  # micro-batches may still be copied from the memory

        def fill(pause_point: Callable[[], None]) -> None:
            with side_stream.use():
                self._maker.fill(block, position, pause_point)

        self._next = _NextBlock(Task(fill), block, source_state)

    @property
    def _dtype(self) -> str:
        return "float32" if self._cache is None else self._cache.dtype

    def state_dict(self) -> dict[str, Any]:
        """Return the state described above, without moving anything.

        In the middle of a batch of several micro-batches (nothing is saved there) it is that of the batch's start.
        """
        self._enter_next_block_if_used_up()  # a block that is used up need not be filled again by a resume
        return {
            "batch": self._served // self.micro_batches,
            "block_start": self._block_start,
            "sequence_position": self._position,
            "source": self._source_state,
            "seed": self._seed,
            "fingerprint": self._sequences.fingerprint,
            "dtype": self._dtype,
            "positions": self._positions,
            **asdict(self.geometry),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state` was saved, on any number of ranks and micro-batches.

        Raises:
            UserError: the state was saved with another seed, other data or other positions.
        """
        if state["seed"] != self._seed:
            raise UserError(
                f"seed: {self._seed}, but the checkpoint was made with seed {state['seed']}, which orders the data: "
                f"resume with seed={state['seed']}"
            )
        if state["fingerprint"] != self._sequences.fingerprint:
            raise UserError(
                "data: the training sequences are not those of the checkpoint (other files, packing or tokenizer): "
                "resume with the data and data.* settings that it was made with"
            )
        for key, was in state.get("positions", self._positions).items():  # older checkpoints do not say
            if was != (own := self._positions.get(key)):
                raise UserError(
                    f"data.{key}: {str(own).lower()}, but the checkpoint was made with {str(was).lower()}: resume with "
                    f"data.{key}={str(was).lower()}"
                )
        if (dtype := state.get("dtype", self._dtype)) != self._dtype:
            log.warning(
                f"data.cache_dtype: the activations were rounded to {dtype} before the checkpoint, and are now to "
                f"{self._dtype}: the run does not equal one that was left alone"
            )
        changed = [f"{key} {state[key]} -> {own}" for key, own in asdict(self.geometry).items() if state[key] != own]
        block_start = state["block_start"]
        if changed:
            block_start = state["batch"]
            log.warning(
                f"the data go on at sequence {state['sequence_position']} of the global order, from the start of the "
                f"checkpoint's block ({', '.join(changed)})"
            )
        self._go_to(
            batch=state["batch"],
            block_start=block_start,
            position=state["sequence_position"],
            source_state=state["source"],
        )
