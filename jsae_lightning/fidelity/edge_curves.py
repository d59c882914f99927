"""The MLP replaced by its linearised graph with the E strongest edges of each token: what is lost as E falls.

    y_E = sum over active output latents i of  a_i W_dec_y,i  +  b_dec_y,     a_i = m_i(c) + sum_{kept j} J_ij s_j

The output latents that are present are those of the token itself (the active set at its linearisation point); the graph
says how strong each is. It is linear: there is no ReLU behind it. c is how many of the token's E edges go to i.

What stands for the dropped edges matters. The remainder of the token's own expansion, s_y,i - sum_j J_ij s_j, would
make the full graph exact by construction and tell about the token even without edges. The mean of each dropped edge
over the tokens where both its ends are active (mean ablation edge by edge) cannot be estimated: most pairs of latents
meet once in thousands of tokens, and the mean of one value is the value. Zero for dropped edges makes even the best
graph pay for a constant. So m_i(c) is the mean, over sequences of OTHER documents and the tokens there on which i is
active, of all that i's c strongest edges in the same ranking do not carry, s_y,i - sum_{c strongest j} J_ij s_j: mean
ablation of an output latent's dropped edges and its remainder together. (c matters: where the strongest edges are
kept, the rest that a mean stands for is small.) What is peculiar to a token can then come through its kept edges only.
At E = 0 every active output latent has its mean activation; with all edges y_E is as good as the linear graph is, which
is less than exact for an MLP that is not linear. An output latent that is not active in the other sequences takes the
mean over all active output latents there.

Scores. With L the cross-entropy or KL(clean || replaced), over x = log2(E + 1), by the trapezoid rule,

    area = 1 / x_max * integral of (L_0 - L_E) / (L_0 - L_true) dx

0 if edges bring nothing over the means, 1 if a single edge brings all; L_true has the graph's target in place of the
MLP's output, sum_i s_y,i W_dec_y,i + b_dec_y. Measuring against L_true rather than against the full graph lets a graph
that is sparse but wrong score badly, even below 0. `edge_error` is sum |y_E - y_true|^2 / sum |y_true - mean y_true|^2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.fidelity.edge_ranking import (
    RANKINGS,
    contributions,
    kept_counts,
    ranking_scores,
    row_prefixes,
)
from jsae_lightning.fidelity.points import Points
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.metrics import Sums, cross_entropies, kl_divergences, ratio
from jsae_lightning.sae import Latents, SAEPair
from jsae_lightning.splicing import MAX_ELEMENTS

LOSSES = ("ce", "kl")


class Kept(NamedTuple):
    """The edges of some tokens in the order of every one of RANKINGS, and what is kept of them."""

    prefixes: Float[Tensor, "rankings tokens k_out prefixes"]
    """What each output latent's c strongest edges carry, c = 0 .. k_in."""
    counts: Int[Tensor, "rankings numbers tokens k_out"]
    """How many edges each output latent keeps, for each number E."""


def kept_edges(
    pair: SAEPair, mlp: FrozenMLP, points: Points, random: Float[Tensor, "tokens k_out k_in"], numbers: list[int]
) -> Kept:
    """Rank the edges of tokens; `random` holds uniform numbers in [0, 1) for the random ranking."""
    contribution = contributions(points)
    scores = ranking_scores(pair, mlp, points, random)
    return Kept(
        torch.stack([row_prefixes(contribution, scores[name]) for name in RANKINGS]),
        torch.stack([kept_counts(scores[name], numbers) for name in RANKINGS]),
    )


def remainder_sums(
    points: Points, prefixes: Float[Tensor, "rankings tokens k_out prefixes"], d_sae: int
) -> dict[str, Float[Tensor, "..."]]:
    """Sum s_y,i minus what i's c strongest edges carry, over the tokens where i is active, for every i and c; float64.

    `remainder` is (rankings, prefixes, d_sae), `active` (d_sae,).
    """
    active = points.latents_out.active
    index = points.latents_out.indices[active]
    remainder = (points.latents_out.values[:, :, None] - prefixes).double()[:, active]
    total = remainder.new_zeros(len(prefixes), d_sae, prefixes.shape[3]).index_add_(1, index, remainder)
    return {"remainder": total.transpose(1, 2), "active": torch.bincount(index, minlength=d_sae).double()}


def remainder_means(sums: Sums) -> Float[Tensor, "rankings prefixes d_sae"]:
    """Return m_i(c) from the totals of `remainder_sums`; see the module's docstring for latents without data."""
    remainder, active = sums["remainder"], sums["active"]
    overall = remainder.sum(dim=2, keepdim=True) / active.sum().clamp(min=1)
    return torch.where(active > 0, remainder / active.clamp(min=1), overall)


def graph_outputs(
    pair: SAEPair,
    points: Points,
    prefixes: Float[Tensor, "tokens k_out prefixes"],
    counts: Int[Tensor, "tokens k_out"],
    means: Float[Tensor, "prefixes d_sae"],
) -> Float[Tensor, "tokens d_model"]:
    """Return y_E for one ranking and one E, in the pair's precision."""
    latents = points.latents_out
    carried = prefixes.gather(2, counts[:, :, None])[:, :, 0]
    values = torch.where(latents.active, carried + means.to(carried.dtype)[counts, latents.indices], 0.0)
    return pair.output_sae.decode(Latents(values, latents.indices))


def position_losses(
    logits: Float[Tensor, "batch seq vocab"],
    clean: Float[Tensor, "batch seq vocab"],
    tokens: Int[Tensor, "batch seq"],
    positions: Int[Tensor, "positions 2"],
) -> Float[Tensor, "losses positions"]:
    """Return cross-entropy and KL(clean || replaced) at positions that have a successor, float64, in nats."""
    losses = []
    for part in positions.split(max(1, MAX_ELEMENTS // logits.shape[-1])):
        sequence, position = part.unbind(dim=1)
        at_positions = logits[sequence, position]
        ce = cross_entropies(at_positions, tokens[sequence, position + 1])
        losses.append(torch.stack([ce, kl_divergences(at_positions, clean[sequence, position])]).double())
    return torch.cat(losses, dim=1) if losses else logits.new_zeros(2, 0, dtype=torch.float64)


def log_edges(numbers: list[int]) -> Float[Tensor, " numbers"]:
    """Return x = log2(E + 1), float64."""
    return (torch.tensor(numbers, dtype=torch.float64) + 1).log2()


def area(losses: Float[Tensor, " numbers"], true: float, numbers: list[int]) -> float:
    """Return the area of the module's docstring from the losses at each E; NaN if E = 0 loses nothing."""
    gain = (losses[0] - losses.double()) / (losses[0] - true)
    x = log_edges(numbers)
    return ratio(torch.trapezoid(gain.cpu(), x).item(), x[-1].item()) if losses[0] != true else float("nan")


def curve_values(sums: Sums) -> dict[str, Float[Tensor, "rankings numbers"]]:
    """Turn the totals of the curves' pass into mean `ce` and `kl` in nats, and `error`; NaN without positions."""
    tokens = sums["tokens"]
    variation = sums["true_squared"] - sums["true"].square().sum() / tokens
    return {name: sums[name] / sums["positions"] for name in LOSSES} | {"error": sums["error_squared"] / variation}


def curve_figures(sums: Sums, numbers: list[int]) -> dict[str, float]:
    """Turn the totals of the curves' pass into figures.

    `edge_<loss>_area_<ranking>`; `edge_<loss>_none` (E = 0), `edge_<loss>_all` (all edges), `edge_<loss>_true` (the
    graph's target) in nats; `edge_ce_clean`, the language model's own; `edge_error_all`.
    """
    positions = sums["positions"].item()
    values = curve_values(sums)
    figures = {"edge_ce_clean": ratio(sums["ce_clean"].item(), positions)}
    for loss in LOSSES:
        true = ratio(sums[f"{loss}_true"].item(), positions)
        figures |= {
            f"edge_{loss}_true": true,
            f"edge_{loss}_none": values[loss][0, 0].item(),
            f"edge_{loss}_all": values[loss][0, -1].item(),
        }
        figures |= {f"edge_{loss}_area_{name}": area(values[loss][r], true, numbers) for r, name in enumerate(RANKINGS)}
    return figures | {"edge_error_all": values["error"][0, -1].item()}
