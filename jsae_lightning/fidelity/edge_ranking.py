"""Which edges of a token's graph come first, and what the first E of them carry.

An edge is a pair of latents that are both active on the token; it carries J_ij s_j. Rankings, strongest first:

    contribution           |J_ij s_j|
    jacobian               |J_ij|
    integrated_gradients   |s_j mean_a J_ij(a)|, J averaged along the straight path on which all s_j go from 0 to their
                           values together (Sundararajan et al. 2017; used for such graphs by SCALAR, arXiv 2511.07572)
    random                 uniform: what any ranking must beat

A ranking only orders edges: what a kept edge carries is J_ij s_j in all of them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.fidelity.points import Points
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobian_metrics import top_share_sizes
from jsae_lightning.jacobians import jacobian_from_latents
from jsae_lightning.metrics import cumulative_sum
from jsae_lightning.sae import SAEPair

RANKINGS = ("contribution", "jacobian", "integrated_gradients", "random")

PATH_STEPS = 8
"""Midpoints of the path of integrated gradients."""


def edge_numbers(k_out: int, k_in: int) -> list[int]:
    """Return the numbers of kept edges that are looked at: 0, 1, 2, 4, ... below k_out k_in, and k_out k_in."""
    return [0, *top_share_sizes(k_out * k_in)]


def integrated_gradients(
    pair: SAEPair, mlp: FrozenMLP, points: Points, steps: int = PATH_STEPS
) -> Float[Tensor, "tokens k_out k_in"]:
    """Return s_j times the mean of J_ij at the midpoints a = 1/(2n), 3/(2n), ... of the path x(a) = x + (a - 1) D s.

    D s = sum_j s_j d_j. The sets of latents stay the token's own, and outputs are pre-activations of the output SAE, so
    by completeness sum_j IG_ij = z_i(s) - z_i(0) up to the midpoint rule's error, exactly where f is quadratic.
    """
    decoded = pair.input_sae.decode(points.latents_in) - pair.input_sae.b_dec
    totals: list[Tensor] = []
    for step in range(steps):
        _, slopes = mlp.forward_with_slopes(points.x + ((step + 0.5) / steps - 1) * decoded)
        totals = [t + slope for t, (_, slope) in zip(totals, slopes, strict=True)] if totals else [s for _, s in slopes]
    # J is linear in the slopes of the MLP, so their mean gives the mean of J.
    mean_slopes = tuple((weight, total / steps) for (weight, _), total in zip(slopes, totals, strict=True))
    mean = jacobian_from_latents(pair, mlp, mean_slopes, points.latents_in, points.latents_out).values
    return mean * points.latents_in.values[:, None]


def ranking_scores(
    pair: SAEPair, mlp: FrozenMLP, points: Points, random: Float[Tensor, "tokens k_out k_in"]
) -> dict[str, Float[Tensor, "tokens k_out k_in"]]:
    """Return each ranking's score, larger first; entries that are no edges have -1, below every edge.

    `random` holds uniform numbers in [0, 1).
    """
    scores = {
        "contribution": contributions(points).abs(),
        "jacobian": points.jacobian.values.abs(),
        "integrated_gradients": integrated_gradients(pair, mlp, points).abs(),
        "random": random,
    }
    return {name: torch.where(points.jacobian.active, score, -1.0) for name, score in scores.items()}


def contributions(points: Points) -> Float[Tensor, "tokens k_out k_in"]:
    """Return J_ij s_j."""
    return points.jacobian.values * points.latents_in.values[:, None]


def row_prefixes(
    contribution: Float[Tensor, "tokens k_out k_in"], score: Float[Tensor, "tokens k_out k_in"]
) -> Float[Tensor, "tokens k_out prefixes"]:
    """Return, for c = 0 .. k_in, the sum of what each output latent's c edges of highest score carry to it."""
    order = score.argsort(dim=2, descending=True, stable=True)
    cumulative = cumulative_sum(contribution.gather(2, order), dim=2)
    return torch.cat([torch.zeros_like(cumulative[:, :, :1]), cumulative], dim=2)


def kept_counts(score: Float[Tensor, "tokens k_out k_in"], numbers: list[int]) -> Int[Tensor, "numbers tokens k_out"]:
    """Return, for each number E, how many of the token's E edges of highest score go to each output latent.

    Those are the output latent's own edges of highest score: the prefixes of `row_prefixes`.
    """
    rank = score.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(score)
    return torch.stack([(rank < number).sum(dim=2) for number in numbers])
