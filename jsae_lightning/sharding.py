"""How many parts a block of activations is made and shuffled in; without torch, for the check of the configuration."""

import math

from jsae_lightning.errors import UserError

DEFAULT_NUM_SHARDS = 8


def choose_num_shards(wanted: int | None, batch_tokens: int, world_size: int) -> int:
    """Return the number of shards: `wanted`, or by default the largest of 8, 4, 2, 1 that divides the batch.

    Where the number of ranks does not divide the default, it takes its place. All numbers of ranks that divide the
    result see the same batches.

    Raises:
        UserError: `wanted` does not divide the batch, or the number of ranks does not divide `wanted`.
    """
    if wanted is None:
        default = math.gcd(batch_tokens, DEFAULT_NUM_SHARDS)
        return default if default % world_size == 0 else world_size
    if batch_tokens % wanted:
        raise UserError(
            f"data.num_shards: {wanted} does not divide data.batch_tokens {batch_tokens}: change one, or give null"
        )
    if wanted % world_size:
        raise UserError(
            f"data.num_shards: {wanted} is not a multiple of the {world_size} ranks: give one that is, or null"
        )
    return wanted
