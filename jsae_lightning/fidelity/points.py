"""The tokens that are studied: the points where the MLP is linearised, latents, J, and random pairs of latents."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobians import Jacobian, jacobian_from_latents, linearization_point
from jsae_lightning.sae import Latents, SAEPair


@dataclass(frozen=True)
class Points:
    """A batch of tokens at the points where the MLP is linearised."""

    x: Float[Tensor, "tokens d_model"]
    """What the MLP reads there: the true mlp_in, or (`at="reconstruction"`) its reconstruction."""
    latents_in: Latents
    latents_out: Latents
    """The output SAE's latents of f(x)."""
    jacobian: Jacobian


@dataclass(frozen=True)
class Pairs:
    """Sampled (token, output latent, input latent) triples, all co-active; all fields are (pairs,)."""

    token: Int[Tensor, " pairs"]
    """Row of `Points`."""
    output: Int[Tensor, " pairs"]
    """Output latent i, in [0, d_sae)."""
    input: Int[Tensor, " pairs"]
    """Input latent j, in [0, d_sae)."""
    s_in: Float[Tensor, " pairs"]
    """The input latent's activation s_j > 0."""
    s_out: Float[Tensor, " pairs"]
    """The output latent's activation s_y,i > 0."""
    jacobian: Float[Tensor, " pairs"]
    """J_ij."""
    scale: Float[Tensor, " pairs"]
    """Root mean square of the active output latents of the token: what is large for an output there."""


def points_at(pair: SAEPair, mlp: FrozenMLP, mlp_in: Float[Tensor, "tokens d_model"], at: str) -> Points:
    """Return the linearisation points of tokens; UserError unless `at` is `input` or `reconstruction`."""
    latents_in = pair.input_sae.encode(mlp_in)
    x = linearization_point(pair, mlp_in, latents_in, at)
    mlp_out, slopes = mlp.forward_with_slopes(x)
    latents_out = pair.output_sae.encode(mlp_out)
    return Points(x, latents_in, latents_out, jacobian_from_latents(pair, mlp, slopes, latents_in, latents_out))


def draw_entries(points: Points, random: Int[Tensor, " tokens"]) -> tuple[Pairs, Bool[Tensor, " tokens"]]:
    """Take one entry of each token's J at random, and keep it if both of its latents are active.

    `random` holds uniform numbers in [0, k_out k_in). Rejecting the inactive entries makes the kept ones uniform over
    all co-active pairs of all tokens, whatever each token's number of them. Nothing is matched by rank.

    Returns:
        The kept pairs, in the order of their tokens, and the mask of the tokens that have one.
    """
    k_in = points.latents_in.indices.shape[1]
    slot_out, slot_in = random // k_in, random % k_in
    rows = torch.arange(len(random), device=random.device)
    kept = points.jacobian.active[rows, slot_out, slot_in]
    rows, slot_out, slot_in = rows[kept], slot_out[kept], slot_in[kept]
    outputs = points.latents_out.values
    scale = (outputs.square().sum(dim=1) / points.latents_out.active.sum(dim=1).clamp(min=1)).sqrt()
    pairs = Pairs(
        token=rows,
        output=points.latents_out.indices[rows, slot_out],
        input=points.latents_in.indices[rows, slot_in],
        s_in=points.latents_in.values[rows, slot_in],
        s_out=outputs[rows, slot_out],
        jacobian=points.jacobian.values[rows, slot_out, slot_in],
        scale=scale[rows],
    )
    return pairs, kept


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` of the numbers 0 .. count - 1, evenly spaced (all of them if there are fewer)."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def batches(items: list[int], size: int) -> Iterator[list[int]]:
    """Split a list into lists of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
