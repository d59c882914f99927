"""Makes the blocks of the activation buffer: reads sequences, runs the language model, shuffles token by token.

`activation_buffer` says which sequences a block consists of, and serves it.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from jsae_lightning.activation_cache import ActivationCache
from jsae_lightning.errors import UserError
from jsae_lightning.seeding import seeded_generator
from jsae_lightning.sequence_sources import SequenceSource

log = logging.getLogger(__name__)

Block = Float[Tensor, "batches shards share d_model"]


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


class BlockMaker:
    """Makes one rank's part of any block: a pure function of the block's position, but for a stream's place.

    Not for two threads at a time.
    """

    def __init__(
        self,
        sequences: SequenceSource,
        mlp_in: Callable[[Tensor], Tensor],
        included: Callable[[Tensor], Tensor],
        *,
        d_model: int,
        device: torch.device,
        geometry: BlockGeometry,
        lm_batch_sequences: int,
        seed: int,
        rank: int,
        world_size: int,
        cache: ActivationCache | None,
    ) -> None:
        """Hold references only; the arguments are those of `ActivationLoader`."""
        self.redrawn_tokens = 0
        self._sequences, self._mlp_in, self._included = sequences, mlp_in, included
        self._d_model, self._device, self._geometry, self._lm_batch = d_model, device, geometry, lm_batch_sequences
        self._seed, self._rank, self._world_size, self._cache = seed, rank, world_size, cache
        self._shards = list(range(rank, geometry.num_shards, world_size))

    def empty(self) -> Block:
        """Memory for one rank's part of a block."""
        geometry, shards = self._geometry, len(self._shards)
        share = geometry.batch_tokens // geometry.num_shards
        return torch.empty(geometry.buffer_batches, shards, share, self._d_model, device=self._device)

    @torch.no_grad()
    def fill(self, block: Block, position: int, pause_point: Callable[[], None] = lambda: None) -> None:
        """Make this rank's shards of the block at sequence `position`.

        `pause_point` is called between passes of the language model, and may raise to leave off.
        """
        geometry, shards = self._geometry, self._shards
        count = geometry.sequences_per_shard * len(shards)
        tokens = self._sequences.read(position, count, self._rank, self._world_size)
        for index, shard in enumerate(shards):
            # Of what this rank read, every len(shards)-th sequence belongs to the same shard.
            activations = self._shard_activations(tokens[index :: len(shards)], shard, position, pause_point)
            block[:, index] = activations.view(geometry.buffer_batches, -1, self._d_model)

    def _shard_activations(
        self,
        tokens: Int64[Tensor, "sequences context_length"],
        shard: int,
        position: int,
        pause_point: Callable[[], None],
    ) -> Float[Tensor, "shard_tokens d_model"]:
        """Return a shard with each token at its place in the shuffled order, from the cache if it is there.

        Never of several shards at once, so that the activations do not depend on the number of ranks.
        """
        generator = seeded_generator("block", self._seed, position, shard, self._geometry.num_shards)
        slots, copies = assign_slots(self._included(tokens), self._geometry.shard_tokens, generator)
        if copies.shape[1]:
            self.redrawn_tokens += copies.shape[1]
            log.info(
                f"{copies.shape[1]} of {self._geometry.shard_tokens} tokens of shard {shard} of the block at sequence "
                f"{position} were drawn twice, as special tokens left too few"
            )
        if self._cache is None:
            return self._run_model(tokens, slots, copies, pause_point)
        return self._cache.get(position, shard, tokens, lambda: self._run_model(tokens, slots, copies, pause_point))

    def _run_model(
        self,
        tokens: Int64[Tensor, "sequences context_length"],
        slots: Int64[Tensor, "sequences context_length"],
        copies: Int64[Tensor, "2 copies"],
        pause_point: Callable[[], None],
    ) -> Float[Tensor, "shard_tokens d_model"]:
        """Run the language model on a shard's sequences; put the activations where `assign_slots` says."""
        shuffled = torch.empty(self._geometry.shard_tokens, self._d_model, device=self._device)
        for batch, batch_slots in zip(tokens.split(self._lm_batch), slots.split(self._lm_batch), strict=True):
            pause_point()
            activations = self._mlp_in(batch.to(self._device)).flatten(0, 1)
            # Chosen on the CPU, where the slots are: a mask on a GPU would wait for the language model.
            (kept,) = (batch_slots.flatten() >= 0).nonzero(as_tuple=True)
            targets = batch_slots.flatten()[kept].to(self._device)
            shuffled[targets] = activations[kept.to(self._device)].float()
        shuffled[copies[0].to(self._device)] = shuffled[copies[1].to(self._device)]
        return shuffled


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
