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
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.sequence_sources import SequenceSource, seeded_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockGeometry:
    """Sizes of a block over all ranks; see the module's docstring."""

    batch_tokens: int
    buffer_batches: int
    num_shards: int
    sequences_per_shard: int

    @property
    def tokens(self) -> int:
        """Tokens that a block serves, over all ranks."""
        return self.batch_tokens * self.buffer_batches

    @property
    def shard_tokens(self) -> int:
        """Tokens that a shard of a block serves."""
        return self.tokens // self.num_shards

    @property
    def sequences(self) -> int:
        """Sequences of a block, over all ranks."""
        return self.num_shards * self.sequences_per_shard


def sequences_per_shard(num_tokens: int, usable_positions: Int64[Tensor, " probed"]) -> int:
    """Sequences that hold `num_tokens` usable positions: ceil(num_tokens / positions) where all hold equally many.

    Otherwise the smallest S with S m - 3 s sqrt(S) >= num_tokens, m and s being mean and standard deviation over the
    probed sequences: a shard then falls short about once in a thousand, if sequences are independent.

    Raises:
        UserError: no position is usable.
    """
    counts = usable_positions.double()
    mean, deviation = counts.mean().item(), counts.std(correction=0).item()
    if mean == 0:
        raise UserError(
            "data.exclude_special_tokens: every position of the data is excluded: set it or "
            "data.exclude_first_position to false"
        )
    root = (3 * deviation + math.sqrt(9 * deviation**2 + 4 * mean * num_tokens)) / (2 * mean)
    return math.ceil(num_tokens / mean) if deviation == 0 else math.ceil(root**2)


class ActivationLoader:
    """A sized, stateful, iterable loader of shuffled MLP inputs.

    Yields float32 (batch_tokens / world_size / micro_batches, d_model) tensors on `device`, `num_batches` times
    `micro_batches` of them. Nothing is fetched ahead: after n micro-batches the state says n, and iterating again goes
    on from there (a finished loader starts over). Memory: this rank's part of one block and one micro-batch.

    State (`state_dict`, primitives and tensors, the same on every rank):
        batch               whole batches served so far
        block_start         batch with which the current block begins
        sequence_position   global position of the current block's first sequence
        source              state of the stream at the block's start, {} for random access
        seed, fingerprint   must be equal on loading
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
        """
        self.geometry, self.num_batches, self.micro_batches = geometry, num_batches, micro_batches
        self.redrawn_tokens = 0
        self._sequences, self._mlp_in, self._included = sequences, mlp_in, included
        self._d_model, self._device, self._lm_batch = d_model, torch.device(device), lm_batch_sequences
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._shards = list(range(rank, geometry.num_shards, world_size))
        self._block: Float[Tensor, "batches shards share d_model"] | None = None
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

    def _go_to(self, *, batch: int, block_start: int, position: int, source_state: dict[str, Any]) -> None:
        self._served, self._block_start, self._position = batch * self.micro_batches, block_start, position
        self._source_state, self._is_filled = source_state, False
        self._sequences.load_state_dict(source_state)

    def _enter_next_block_if_used_up(self) -> None:
        next_start = self._block_start + self.geometry.buffer_batches
        if self._is_filled and self._served == next_start * self.micro_batches:
            self._block_start, self._position = next_start, self._position + self.geometry.sequences
            self._source_state, self._is_filled = self._sequences.state_dict(), False

    def _micro_batch(self) -> Float[Tensor, "tokens d_model"]:
        self._enter_next_block_if_used_up()
        if not self._is_filled:
            self._fill()
        assert self._block is not None
        batch, part = divmod(self._served, self.micro_batches)
        tokens = self._block[batch - self._block_start].flatten(0, 1)
        # A copy, because the block's memory is used again for the next one.
        return tokens.chunk(self.micro_batches)[part].clone()

    @torch.no_grad()
    def _fill(self) -> None:
        """Make this rank's shards of the block."""
        geometry, shards = self.geometry, self._shards
        count = geometry.sequences_per_shard * len(shards)
        tokens = self._sequences.read(self._position, count, self._rank, self._world_size)
        if self._block is None:
            share = geometry.batch_tokens // geometry.num_shards
            self._block = torch.empty(geometry.buffer_batches, len(shards), share, self._d_model, device=self._device)
        for index, shard in enumerate(shards):
            # Of what this rank read, every len(shards)-th sequence belongs to the same shard.
            activations = self._shard_activations(tokens[index :: len(shards)], shard)
            self._block[:, index] = activations.view(geometry.buffer_batches, -1, self._d_model)
        self._is_filled = True

    def _shard_activations(
        self, tokens: Int64[Tensor, "sequences context_length"], shard: int
    ) -> Float[Tensor, "shard_tokens d_model"]:
        """Run the language model on a shard's sequences; put each token at its place in the shuffled shard.

        Never on sequences of several shards at once, so that the activations do not depend on the number of ranks.
        """
        generator = seeded_generator("block", self._seed, self._position, shard, self.geometry.num_shards)
        slots, copies = assign_slots(self._included(tokens), self.geometry.shard_tokens, generator)
        shuffled = torch.empty(self.geometry.shard_tokens, self._d_model, device=self._device)
        for batch, batch_slots in zip(tokens.split(self._lm_batch), slots.split(self._lm_batch), strict=True):
            activations = self._mlp_in(batch.to(self._device)).flatten(0, 1)
            batch_slots = batch_slots.flatten().to(self._device)
            kept = batch_slots >= 0
            shuffled[batch_slots[kept]] = activations[kept].float()
        if copies.shape[1]:
            shuffled[copies[0].to(self._device)] = shuffled[copies[1].to(self._device)]
            self.redrawn_tokens += copies.shape[1]
            log.info(
                f"{copies.shape[1]} of {self.geometry.shard_tokens} tokens of shard {shard} of the block at sequence "
                f"{self._position} were drawn twice, as special tokens left too few"
            )
        return shuffled

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
            **asdict(self.geometry),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state` was saved, on any number of ranks and micro-batches.

        Raises:
            UserError: the state was saved with another seed or other data.
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


def assign_slots(
    included: Bool[Tensor, "sequences context_length"], num_slots: int, generator: torch.Generator
) -> tuple[Int64[Tensor, "sequences context_length"], Int64[Tensor, "2 copies"]]:
    """Draw a random place in a block of `num_slots` tokens for every included token.

    Returns:
        The slot of each position, -1 for positions that are excluded or surplus; and, where there are too few tokens,
        the slots that are left and, for each, the slot of a token drawn at random to be copied there.
    """
    slots = torch.full(included.shape, -1, dtype=torch.int64)
    num_tokens = int(included.sum())
    if num_tokens == 0:
        raise UserError("data.exclude_special_tokens: a block of the data holds special tokens only: set it to false")
    order = torch.randperm(max(num_tokens, num_slots), generator=generator)
    slots[included] = torch.where(order[:num_tokens] < num_slots, order[:num_tokens], -1)
    left = order[num_tokens:]
    drawn = torch.randint(num_tokens, (len(left),), generator=generator)
    return slots, torch.stack([left, order[drawn]])
