"""Does a pair find the graph that its MLP was built from? For synthetic models, whose graph is known.

Found edges are pairs of latents, true edges pairs of features; latents stand for features by their directions
(`synthetic.matching`). The weight of an edge, found or true, is the mean of |J_ij| over the tokens at which the output
i is active; a true edge counts if it is active anywhere on the tokens. What is reported:

    average_precision            of all found edges, ranked by weight (`synthetic.ranking`); an edge at a latent that
                                 stands for no feature is a false one, a true edge at an unmatched feature a missed one
    average_precision_matched    among matched latents and features alone: the graph, given the features
    average_precision_pooled     many latents may stand for one feature: sum |J| over all of them, over the tokens at
                                 which any latent of the output's feature is active: forgives splitting
    precision, recall, f1        at the cut with the best F1 (chosen with the truth's help)
    precision_at_true_count      of as many edges as there are true ones
    base_rate                    share of true ones among all found edges: what a random ranking's precision is
    token_precision, _recall     at every token, as many of its strongest edges as it has true ones; ratios of sums
    weight_on_true_edges         share of sum |J| on edges that are true at that token
    matched_share, mean_cosine   share of the features that a latent stands for; mean of their best cosines
    latents_per_feature          latents near a feature, among features that have one: above 1 where one is split
    effective_edges              (sum|J|)^2 / sum J^2 a token, found and true

Every figure is free of the Jacobian's scale. NaN where there is nothing to judge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.checkpoint import load_run
from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_progress import EvaluationProgress
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jacobian_metrics import effective_edges
from jsae_lightning.jacobians import jacobian
from jsae_lightning.metrics import Sums, add_sums, ratio
from jsae_lightning.sae import SAEPair
from jsae_lightning.splicing import chunks
from jsae_lightning.synthetic.computation import SyntheticComputation
from jsae_lightning.synthetic.documents import SyntheticDocuments
from jsae_lightning.synthetic.language_model import SyntheticLanguageModel
from jsae_lightning.synthetic.matching import Matching, match
from jsae_lightning.synthetic.ranking import PrecisionRecall, precision_recall

ROUNDING = 1e-6
"""An edge with less than this share of the strongest one's weight is none: it is rounding."""

_SCALARS = (
    "tokens", "weight", "weight_on_true", "token_kept", "token_hits", "token_true", "effective_found",
    "effective_found_tokens", "effective_true", "effective_true_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class GroundTruth:
    """How a pair compares with the truth."""

    figures: dict[str, float]
    """Keys `ground_truth/...`; see the module's docstring."""
    curve: PrecisionRecall
    """Precision against recall of all found edges."""
    found: Float[Tensor, "d_sae_out d_sae_in"]
    """Weights of the found edges, float64."""
    true: Float[Tensor, "n_out n_in"]
    """Weights of the true edges, float64."""
    matching_in: Matching
    matching_out: Matching


def run_ground_truth(held_out: HeldOut) -> GroundTruth:
    """Compare the pair's graph with the truth on all included tokens, at the trained setting of `jacobian.at`.

    With several ranks all must call it; each works on its share of the sequences. Raises UserError if the language
    model is no synthetic one, or no position is included.
    """
    if not held_out.included.any():
        raise UserError(f"data: none of the {held_out.tokens.numel()} positions is included: exclude fewer of them")
    matchings = matchings_of(held_out)
    (sums,) = group_sums(held_out, matchings, torch.zeros_like(held_out.tokens), 1)
    return summarize_ground_truth(sums, *matchings)


def matchings_of(held_out: HeldOut) -> tuple[Matching, Matching]:
    """Match both dictionaries with the true features: (input, output); UserError if the truth is not known."""
    computation = _synthetic(held_out).computation
    return (
        match(computation.directions_in, held_out.pair.input_sae.W_dec),
        match(computation.directions_out, held_out.pair.output_sae.W_dec),
    )


@torch.no_grad()
def group_sums(
    held_out: HeldOut, matchings: tuple[Matching, Matching], group: Int[Tensor, "sequences seq"], num_groups: int
) -> list[Sums]:
    """Return `ground_truth_sums` of each group of positions, over all ranks: what a jackknife over groups needs.

    `group` says which of the groups 0 ... num_groups - 1 each position is of; positions that are not included count
    nowhere. Memory: `num_groups` times 8 bytes for every entry of (d_sae_out, d_sae_in).
    """
    model, pair = _synthetic(held_out), held_out.pair
    rank, world_size = rank_and_world_size()
    mine = torch.arange(rank, len(held_out.tokens), world_size)
    sums = [zero_sums(pair, model.computation) for _ in range(num_groups)]
    size = max(pair.input_sae.d_sae, model.spec.n_in) * max(pair.output_sae.k, model.spec.n_out)
    with (
        torch.autocast(model.device.type, enabled=False),
        EvaluationProgress("ground truth", len(mine), "sequences") as progress,
    ):
        for batch in mine.split(held_out.batch_sequences):
            tokens, included = held_out.tokens[batch].to(model.device), held_out.included[batch].to(model.device)
            mlp_in, features = model.mlp_in(tokens), model.features(tokens)
            groups = group[batch].to(model.device)
            for g in groups[included].unique().tolist():
                chosen = included & (groups == g)
                for x, s in zip(chunks(mlp_in[chosen], size), chunks(features[chosen], size), strict=True):
                    part = ground_truth_sums(pair, held_out.mlp, model.computation, x, s, *matchings, at=held_out.at)
                    sums[g] = add_sums(sums[g], part)
            progress.advance(len(batch))
    # Process groups reduce on the device that they were made for.
    flat = {f"{g} {key}": value.to(model.device) for g, part in enumerate(sums) for key, value in part.items()}
    total = {key: value.cpu() for key, value in all_reduce_sum(flat).items()}
    return [{key: total[f"{g} {key}"] for key in part} for g, part in enumerate(sums)]


def _synthetic(held_out: HeldOut) -> SyntheticLanguageModel:
    if not isinstance(held_out.language_model, SyntheticLanguageModel):
        raise UserError("ground_truth: the graph of this language model is not known: it needs model=synthetic")
    return held_out.language_model


@torch.no_grad()
def ground_truth_sums(
    pair: SAEPair,
    mlp: FrozenMLP,
    computation: SyntheticComputation,
    mlp_in: Float[Tensor, "tokens d_model"],
    features: Float[Tensor, "tokens n_in"],
    matching_in: Matching,
    matching_out: Matching,
    *,
    at: str,
) -> Sums:
    """Sum over tokens what `summarize_ground_truth` needs, float64 on the CPU: sums of parts can be added.

    `features` are the true activations that `mlp_in` was made of. Memory: 8 bytes for every entry of (tokens, n_out,
    n_in) and of (d_sae_out, d_sae_in).
    """
    result = jacobian(pair, mlp, mlp_in.to(pair.input_sae.W_enc.dtype), at=at)
    values = result.values.cpu().double()
    indices_out, indices_in = result.indices_out.cpu(), result.indices_in.cpu()
    truth = computation.jacobian(features.cpu())
    magnitudes = values.abs()
    # One row of (output, input) pairs a token
    edges = indices_out[:, :, None] * pair.input_sae.d_sae + indices_in[:, None, :]
    found = torch.zeros(pair.output_sae.d_sae * pair.input_sae.d_sae, dtype=torch.float64)
    found.index_add_(0, edges.flatten(), magnitudes.flatten())
    active_found = torch.zeros(pair.output_sae.d_sae, dtype=torch.float64)
    active_found.index_add_(0, indices_out.flatten(), result.active_out.cpu().double().flatten())
    active_pooled = _active_features(result.active_out.cpu(), matching_out.nearest_feature[indices_out], truth.shape[1])
    is_true = _true_entries(truth, matching_out.feature_of[indices_out], matching_in.feature_of[indices_in])
    effective_found, effective_true = effective_edges(values), effective_edges(truth)
    return {
        "tokens": torch.tensor(float(len(values)), dtype=torch.float64),
        "found": found.view(pair.output_sae.d_sae, pair.input_sae.d_sae),
        "active_found": active_found,
        "active_pooled": active_pooled.double().sum(dim=0),
        "true": truth.abs().sum(dim=0),
        "active_true": (computation.output_features(features.cpu()) > 0).double().sum(dim=0),
        "weight": magnitudes.sum(),
        "weight_on_true": magnitudes[is_true].sum(),
        "effective_found": effective_found.nan_to_num(0.0).sum(),
        "effective_found_tokens": (~effective_found.isnan()).double().sum(),
        "effective_true": effective_true.nan_to_num(0.0).sum(),
        "effective_true_tokens": (~effective_true.isnan()).double().sum(),
    } | _token_sums(magnitudes.flatten(1), is_true.flatten(1), (truth != 0).flatten(1).sum(dim=1))


def zero_sums(pair: SAEPair, computation: SyntheticComputation) -> Sums:
    """Return all keys and shapes of `ground_truth_sums` as zeros."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_SCALARS, ())
    shapes |= {"found": (pair.output_sae.d_sae, pair.input_sae.d_sae), "active_found": (pair.output_sae.d_sae,)}
    n_out = len(computation.weights)
    shapes |= {"true": tuple(computation.weights.shape), "active_true": (n_out,), "active_pooled": (n_out,)}
    return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}


def summarize_ground_truth(sums: Sums, matching_in: Matching, matching_out: Matching) -> GroundTruth:
    """Turn the total of `ground_truth_sums` into figures."""
    found = sums["found"] / sums["active_found"].clamp_min(1)[:, None]
    found = torch.where(found > ROUNDING * found.max(), found, 0.0)
    true = sums["true"] / sums["active_true"].clamp_min(1)[:, None]
    is_edge = true > 0
    num_true = int(is_edge.sum())
    is_true = _true_pairs(is_edge, matching_out.feature_of, matching_in.feature_of)
    curve = precision_recall(found, is_true, num_true)
    matched = (matching_out.feature_of >= 0)[:, None] & (matching_in.feature_of >= 0)[None, :]
    num_matched = int(is_edge[matching_out.latent_of >= 0][:, matching_in.latent_of >= 0].sum())
    among_matched = precision_recall(found[matched], is_true[matched], num_matched)
    precision, recall, f1 = curve.best()
    figures = {
        "average_precision": curve.average_precision,
        "average_precision_matched": among_matched.average_precision,
        "average_precision_pooled": _pooled(sums, is_edge, matching_in, matching_out).average_precision,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "precision_at_true_count": curve.precision_at(num_true),
        "base_rate": float(curve.precision[-1]) if len(curve.kept) else float("nan"),
        "true_edges": float(num_true),
        "found_edges": float(curve.kept[-1]) if len(curve.kept) else 0.0,
        "token_precision": ratio(sums["token_hits"].item(), sums["token_kept"].item()),
        "token_recall": ratio(sums["token_hits"].item(), sums["token_true"].item()),
        "weight_on_true_edges": ratio(sums["weight_on_true"].item(), sums["weight"].item()),
        "effective_edges_found": ratio(sums["effective_found"].item(), sums["effective_found_tokens"].item()),
        "effective_edges_true": ratio(sums["effective_true"].item(), sums["effective_true_tokens"].item()),
    }
    for name, matching in (("input", matching_in), ("output", matching_out)):
        figures[f"matched_share_{name}"] = matching.share
        figures[f"mean_cosine_{name}"] = float(matching.best_cosine.mean())
        figures[f"latents_per_feature_{name}"] = matching.latents_per_feature
    figures = {f"ground_truth/{key}": value for key, value in figures.items()}
    return GroundTruth(figures, curve, found, true, matching_in, matching_out)


def judge_run(folder: str | Path, *, sequences: int = 64) -> GroundTruth:
    """Compare the pair of a run's or an export's folder with the truth, on held-out documents sampled afresh.

    For notebooks. Raises UserError if the run was not trained on a synthetic model.
    """
    run = load_run(folder)
    values: Mapping[str, Any] | None = run.config["model"].get("synthetic")
    if values is None:
        raise UserError(f"{folder}: was trained on {run.config['model']['name']}: it needs a run of model=synthetic")
    documents = SyntheticDocuments(dict(values), "val").first(sequences)
    included = torch.ones_like(documents, dtype=torch.bool)
    return run_ground_truth(
        HeldOut(
            pair=run.pair,
            mlp=run.mlp,
            language_model=SyntheticLanguageModel(values),
            tokens=documents,
            included=included,
            document=torch.arange(len(documents))[:, None].expand_as(documents),
            at=run.config["jacobian"]["at"],
            batch_sequences=16,
        )
    )


def _true_pairs(
    is_edge: Bool[Tensor, "n_out n_in"], feature_out: Int[Tensor, " d_sae_out"], feature_in: Int[Tensor, " d_sae_in"]
) -> Bool[Tensor, "d_sae_out d_sae_in"]:
    """Say of each pair of latents whether they stand for a true edge."""
    chosen = is_edge[feature_out.clamp_min(0)][:, feature_in.clamp_min(0)]
    return chosen & (feature_out >= 0)[:, None] & (feature_in >= 0)[None, :]


def _true_entries(
    truth: Float[Tensor, "tokens n_out n_in"],
    feature_out: Int[Tensor, "tokens k_out"],
    feature_in: Int[Tensor, "tokens k_in"],
) -> Bool[Tensor, "tokens k_out k_in"]:
    """Say of each token's entries of J whether they stand for an edge that is active at this token."""
    token = torch.arange(len(truth))[:, None, None]
    chosen = truth[token, feature_out.clamp_min(0)[:, :, None], feature_in.clamp_min(0)[:, None, :]] != 0
    return chosen & (feature_out >= 0)[:, :, None] & (feature_in >= 0)[:, None, :]


def _token_sums(
    magnitudes: Float[Tensor, "tokens entries"],
    is_true: Bool[Tensor, "tokens entries"],
    num_true: Int[Tensor, " tokens"],
) -> Sums:
    """Keep each token's `num_true` strongest entries (non-zero ones) and count the true ones among them."""
    sorted_magnitudes, order = magnitudes.sort(dim=1, descending=True, stable=True)
    kept = (torch.arange(magnitudes.shape[1]) < num_true[:, None]) & (sorted_magnitudes > 0)
    hits = kept & is_true.gather(1, order)
    return {
        "token_kept": kept.double().sum(),
        "token_hits": hits.double().sum(),
        "token_true": num_true.double().sum(),
    }


def _active_features(
    active_out: Bool[Tensor, "tokens k_out"], feature_out: Int[Tensor, "tokens k_out"], n_out: int
) -> Bool[Tensor, "tokens n_out"]:
    """Say of each token which output features have an active latent near them."""
    column = torch.where(active_out & (feature_out >= 0), feature_out, n_out)
    active = torch.zeros(len(active_out), n_out + 1, dtype=torch.bool)
    return active.scatter(1, column, torch.ones_like(column, dtype=torch.bool))[:, :n_out]


def _pooled(
    sums: Sums, is_edge: Bool[Tensor, "n_out n_in"], matching_in: Matching, matching_out: Matching
) -> PrecisionRecall:
    """Rank edges between features: sum |J| of all latents near them, per token at which any of the output's is active.

    Means of the single latents would not do: those of latents that take turns add up to more than the feature's own.
    A latent near no feature keeps edges of its own, all false.
    """
    found, (n_out, n_in) = sums["found"], is_edge.shape
    own_out, own_in = (
        torch.where(near >= 0, near, n + torch.arange(len(near)))
        for near, n in ((matching_out.nearest_feature, n_out), (matching_in.nearest_feature, n_in))
    )
    rows = found.new_zeros(n_out + found.shape[0], found.shape[1]).index_add(0, own_out, found)
    pooled = rows.new_zeros(len(rows), n_in + found.shape[1]).index_add(1, own_in, rows)
    pooled /= torch.cat([sums["active_pooled"], sums["active_found"]]).clamp_min(1)[:, None]
    pooled = torch.where(pooled > ROUNDING * pooled.max(), pooled, 0.0)
    is_true = torch.zeros_like(pooled, dtype=torch.bool)
    is_true[:n_out, :n_in] = is_edge
    return precision_recall(pooled, is_true, int(is_edge.sum()))
