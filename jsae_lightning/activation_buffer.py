"""The block buffer: activations of many sequences, shuffled token by token and served in micro-batches.

A block is `buffer_batches` micro-batches of a rank, made from a fixed number of sequences:

    sequences_per_block = ceil(buffer_batches * micro_batch_tokens / usable positions of a sequence)
    start of block b    = b * sequences_per_block * world_size           (in the global order of the sequences)

so micro-batch n is a pure function of (seed, n, rank, world size), and a resume re-runs the language model on one
block. Tokens of a block beyond its micro-batches (less than one sequence's, unless special tokens are excluded) are
dropped.
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
    """Sizes of a block on one rank, in tokens, micro-batches and sequences."""

    micro_batch_tokens: int
    buffer_batches: int
    sequences_per_block: int

    @property
    def tokens(self) -> int:
        """Tokens that a block serves."""
        return self.micro_batch_tokens * self.buffer_batches


def sequences_per_block(num_tokens: int, usable_positions: Int64[Tensor, " probed"]) -> int:
    """Sequences that hold `num_tokens` usable positions: ceil(num_tokens / positions) where all hold equally many.

    Otherwise the smallest S with S m - 3 s sqrt(S) >= num_tokens, m and s being mean and standard deviation over the
    probed sequences: a block then falls short about once in a thousand, if sequences are independent.

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

    Yields float32 (micro_batch_tokens, d_model) tensors on `device`, `num_micro_batches` of them. Nothing is fetched
    ahead: after n micro-batches the state says n, and iterating again goes on from there (a finished loader starts
    over). Memory: one block and one micro-batch.

    State (`state_dict`, primitives and tensors, the same on every rank):
        micro_batch         micro-batches served so far
        block_start         micro-batch with which the current block begins
        sequence_position   global position of the current block's first sequence
        source              state of the stream at the block's start, {} for random access
        seed, fingerprint   must be equal on loading
        world_size, micro_batch_tokens, buffer_batches, sequences_per_block
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
        num_micro_batches: int,
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
            geometry: sizes of a block.
            num_micro_batches: length of the loader.
            lm_batch_sequences: sequences of one forward pass of the language model.
            seed: of the shuffling within blocks.
            rank: this process.
            world_size: number of processes.
        """
        self.geometry, self.num_micro_batches = geometry, num_micro_batches
        self.redrawn_tokens = 0
        self._sequences, self._mlp_in, self._included = sequences, mlp_in, included
        self._d_model, self._device, self._lm_batch = d_model, torch.device(device), lm_batch_sequences
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._block: Float[Tensor, "tokens d_model"] | None = None
        self._go_to(micro_batch=0, block_start=0, position=0, source_state={})

    def __len__(self) -> int:
        return self.num_micro_batches

    def __iter__(self) -> Iterator[Float[Tensor, "tokens d_model"]]:
        if self._served >= self.num_micro_batches:
            self._go_to(micro_batch=0, block_start=0, position=0, source_state={})
        while self._served < self.num_micro_batches:
            batch = self._micro_batch()
            self._served += 1
            yield batch

    def _go_to(self, *, micro_batch: int, block_start: int, position: int, source_state: dict[str, Any]) -> None:
        self._served, self._block_start, self._position = micro_batch, block_start, position
        self._source_state, self._is_filled = source_state, False
        self._sequences.load_state_dict(source_state)

    def _enter_next_block(self) -> None:
        self._block_start += self.geometry.buffer_batches
        self._position += self.geometry.sequences_per_block * self._world_size
        self._source_state, self._is_filled = self._sequences.state_dict(), False

    def _micro_batch(self) -> Float[Tensor, "tokens d_model"]:
        if self._is_filled and self._served == self._block_start + self.geometry.buffer_batches:
            self._enter_next_block()
        if not self._is_filled:
            self._fill()
        first = (self._served - self._block_start) * self.geometry.micro_batch_tokens
        assert self._block is not None
        # A copy, because the block's memory is used again for the next one.
        return self._block[first : first + self.geometry.micro_batch_tokens].clone()

    @torch.no_grad()
    def _fill(self) -> None:
        """Run the language model on the block's sequences; write each token at its place in the shuffled block."""
        count = self.geometry.sequences_per_block
        tokens = self._sequences.read(self._position, count, self._rank, self._world_size)
        generator = seeded_generator("block", self._seed, self._position, self._rank, self._world_size)
        slots, copies = assign_slots(self._included(tokens), self.geometry.tokens, generator)
        if self._block is None:
            self._block = torch.empty(self.geometry.tokens, self._d_model, device=self._device)
        for batch, batch_slots in zip(tokens.split(self._lm_batch), slots.split(self._lm_batch), strict=True):
            activations = self._mlp_in(batch.to(self._device)).flatten(0, 1)
            batch_slots = batch_slots.flatten().to(self._device)
            kept = batch_slots >= 0
            self._block[batch_slots[kept]] = activations[kept].float()
        if copies.shape[1]:
            self._block[copies[0].to(self._device)] = self._block[copies[1].to(self._device)]
            self.redrawn_tokens += copies.shape[1]
            log.info(
                f"rank {self._rank}: {copies.shape[1]} of {self.geometry.tokens} tokens of the block at sequence "
                f"{self._position} were drawn twice, as special tokens left too few"
            )
        self._is_filled = True

    def state_dict(self) -> dict[str, Any]:
        """Return the state described above, without moving anything."""
        if self._is_filled and self._served == self._block_start + self.geometry.buffer_batches:
            self._enter_next_block()  # the block is used up: a resume need not fill it again
        return {
            "micro_batch": self._served,
            "block_start": self._block_start,
            "sequence_position": self._position,
            "source": self._source_state,
            "seed": self._seed,
            "fingerprint": self._sequences.fingerprint,
            "world_size": self._world_size,
            **asdict(self.geometry),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the micro-batch at which `state` was saved.

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
        own = {"world_size": self._world_size, **asdict(self.geometry)}
        changed = [f"{key} {state[key]} -> {value}" for key, value in own.items() if state[key] != value]
        block_start = state["block_start"]
        if changed:
            block_start = state["micro_batch"]
            log.warning(
                f"the data go on at sequence {state['sequence_position']} of the global order, from the start of the "
                f"checkpoint's block ({', '.join(changed)})"
            )
        self._go_to(
            micro_batch=state["micro_batch"],
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
