"""The figures of `evaluation` with standard errors over documents, in one pass over the held-out tokens.

The sums behind every figure are kept for each group of documents (`jackknife.document_groups`), as one tensor with the
groups in front. A position is judged in its document's group; what is spliced around it is the same for all groups.
Memory does not depend on the number of tokens: (groups, d_sae) firing counts are the largest thing that is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning import jacobian_metrics, metrics
from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation import autoencoder_sums, evaluation_mode, jacobian_prefix, summarize
from jsae_lightning.fine_histogram import fine_histogram
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jackknife import Figure, leave_one_out, standard_error
from jsae_lightning.jacobians import JACOBIAN_AT, EdgePenalty, jacobian
from jsae_lightning.metrics import Sums, with_prefix
from jsae_lightning.splicing import SPLICE_KEYS, chunks, splice_sums_of

NUM_HEAT_MAPS = 8


@dataclass(frozen=True)
class GroupedEvaluation:
    """What `evaluate_groups` found, the same on every rank; tensors are on the CPU, float64 unless said otherwise."""

    figures: dict[str, Figure]
    """The figures of `evaluation.evaluate_pair` under the same keys."""
    replicates: dict[str, Tensor]
    """By figure: its value without one of the groups that hold data for it, float64; none if there is only one."""
    fine_histograms: Int[Tensor, "groups bins"]
    """The `fine_histogram` of |J| at the trained setting, int64, of each group in which the Jacobian was measured."""
    entries: Int[Tensor, " groups"]
    """The entries of J, zeros included, that each group's histogram is of, int64."""
    arrays: dict[str, Tensor]
    """For figures: `histogram_edges`, `histogram_{abs,rms}_<setting>` (int64), `firing_rate_{input,output}`."""
    tokens: int
    """Positions judged."""
    jacobian_tokens: int
    """Positions at which the Jacobian was measured."""


def evaluate_groups(
    held_out: HeldOut,
    groups: Int[Tensor, "sequences seq"],
    *,
    jacobian_tokens: int | None,
    penalty: EdgePenalty,
    on_sequences: Callable[[int], None] = lambda count: None,
) -> GroupedEvaluation:
    """Evaluate a pair; with several ranks all must call it, and each works on its share of the sequences.

    Args:
        held_out: the pair and what it is judged on.
        groups: each position's group, 0 ... G - 1, from `jackknife.document_groups`.
        jacobian_tokens: measure the Jacobian at so many of the included positions, evenly spaced; None: at all.
        penalty: the training penalty, for `val/penalty`: the mean, weighted by tokens, of its value on the tokens that
            a sequence has in a group, which for all penalties but `l1_over_l2_batch` is its value on all tokens.
        on_sequences: called with how many more sequences are done on this rank.

    Raises:
        UserError: no position is included.
    """
    check_included(held_out)
    sums = all_reduce_sum(
        group_sums(
            held_out,
            groups,
            shard=rank_and_world_size(),
            jacobian_tokens=jacobian_tokens,
            penalty=penalty,
            on_sequences=on_sequences,
        )
    )
    return _summarize_groups({key: value.cpu() for key, value in sums.items()}, held_out.at)


def check_included(held_out: HeldOut) -> None:
    """Raise UserError if no position is included."""
    if not held_out.included.any():
        raise UserError(f"data: none of the {held_out.tokens.numel()} held-out positions is included: exclude fewer")


@torch.no_grad()
def group_sums(
    held_out: HeldOut,
    groups: Int[Tensor, "sequences seq"],
    *,
    shard: tuple[int, int],
    jacobian_tokens: int | None,
    penalty: EdgePenalty,
    on_sequences: Callable[[int], None] = lambda count: None,
) -> Sums:
    """Return one shard's sums with the groups as first dimension: sequences rank, rank + world_size, ... for `shard`.

    Every shard has the same keys and shapes. The other arguments are those of `evaluate_groups`.
    """
    pair, mlp, model = held_out.pair, held_out.mlp, held_out.language_model
    device, dtype = pair.input_sae.W_enc.device, pair.input_sae.W_enc.dtype
    for_jacobian = spaced(held_out.included, jacobian_tokens)
    rank, world_size = shard
    with evaluation_mode(pair, mlp), torch.autocast(device.type, enabled=False):
        total = _zero_sums(held_out, penalty, int(groups.max()) + 1)
        mine = list(range(rank, len(held_out.tokens), world_size))
        for start in range(0, len(mine), held_out.batch_sequences):
            batch = mine[start : start + held_out.batch_sequences]
            tokens, included = held_out.tokens[batch].to(device), held_out.included[batch].to(device)
            batch_groups, chosen = groups[batch].to(device), for_jacobian[batch].to(device)
            mlp_in = model.mlp_in(tokens).to(dtype)
            present = batch_groups[included].unique().tolist()
            judged = [included & (batch_groups == group) for group in present]
            for group, mask, losses in zip(
                present, judged, splice_sums_of(pair, model, tokens, included, judged), strict=True
            ):
                _add_to(total, group, with_prefix("splice/", losses))
                _add_to(total, group, autoencoder_sums(pair, mlp, mlp_in[mask]))
                for sequence, rows in zip(mlp_in, mask & chosen, strict=True):
                    for chunk in chunks(sequence[rows], mlp.d_mlp * max(pair.input_sae.k, pair.output_sae.k)):
                        _add_to(total, group, _jacobian_sums(held_out, chunk, penalty))
            on_sequences(len(batch))
    return total


def spaced(included: Bool[Tensor, "sequences seq"], count: int | None) -> Bool[Tensor, "sequences seq"]:
    """Return `count` of the included positions, evenly spaced in reading order (None, or more than there are: all)."""
    total = int(included.sum())
    if count is None or count >= total:
        return included
    ordinal = included.flatten().cumsum(0).view_as(included) - 1
    # The one of ordinal m is taken where floor((m + 1) count / total) steps up: `count` times in all.
    return included & ((ordinal + 1) * count // total > ordinal * count // total)


@torch.no_grad()
def heat_maps(
    held_out: HeldOut, count: int = NUM_HEAT_MAPS
) -> tuple[Float[Tensor, "maps k_out k_in"], Int[Tensor, "maps 2"]]:
    """Return J, float32, at the trained setting of `count` included positions drawn by the seed, and those positions.

    A position is (sequence, position in it); fewer where fewer are included. All on the CPU.
    """
    device, dtype = held_out.pair.input_sae.W_enc.device, held_out.pair.input_sae.W_enc.dtype
    positions = held_out.included.nonzero()
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(held_out.seed))
    positions = positions[order[:count]]
    maps = []
    with evaluation_mode(held_out.pair, held_out.mlp), torch.autocast(device.type, enabled=False):
        for sequence, position in positions.tolist():
            mlp_in = held_out.language_model.mlp_in(held_out.tokens[sequence][None].to(device))[0, position]
            result = jacobian(held_out.pair, held_out.mlp, mlp_in[None].to(dtype), at=held_out.at)
            maps.append(result.values[0].float().cpu())
    return torch.stack(maps), positions


def _jacobian_sums(held_out: HeldOut, mlp_in: Float[Tensor, "tokens d_model"], penalty: EdgePenalty) -> Sums:
    """Sum measures and histograms of both settings; penalty and fine histogram of the trained one."""
    sums: Sums = {}
    edges = jacobian_metrics.histogram_edges()
    for setting in JACOBIAN_AT:
        result = jacobian(held_out.pair, held_out.mlp, mlp_in, at=setting)
        measures = jacobian_metrics.jacobian_sums(result.values, result.active_out, result.active_in)
        sums |= with_prefix(jacobian_prefix(setting, held_out.at), measures)
        normalized = jacobian_metrics.rms_normalized(result.values)
        sums[f"histogram/abs_{setting}"] = jacobian_metrics.abs_histogram(result.values, edges)
        sums[f"histogram/rms_{setting}"] = jacobian_metrics.abs_histogram(normalized, edges)
        if setting == held_out.at:
            sums["penalty"] = penalty(result).double() * len(mlp_in)
            sums["fine_histogram"] = fine_histogram(result.values)
            sums["entries"] = sums["fine_histogram"].new_tensor(result.values.numel())
    return sums


def _zero_sums(held_out: HeldOut, penalty: EdgePenalty, num_groups: int) -> Sums:
    token = held_out.pair.input_sae.W_enc.new_zeros(1, held_out.pair.d_model)
    sums = autoencoder_sums(held_out.pair, held_out.mlp, token) | _jacobian_sums(held_out, token, penalty)
    sums |= {f"splice/{key}": token.new_zeros((), dtype=torch.float64) for key in SPLICE_KEYS}
    return {key: value.new_zeros((num_groups, *value.shape)) for key, value in sums.items()}


def _add_to(total: Sums, group: int, sums: Sums) -> None:
    for key, value in sums.items():
        total[key][group] += value


def _summarize_groups(sums: Sums, at: str) -> GroupedEvaluation:
    num_groups = len(sums["penalty"])
    large = [key for key in sums if key.startswith(("histogram/", "fine_histogram", "entries"))]
    histograms = {key: sums[key] for key in large}
    small = {key: value for key, value in sums.items() if key not in large}

    def figures(total: Sums) -> dict[str, float]:
        none = {f"histogram/{kind}": torch.zeros(0, dtype=torch.int64) for kind in ("abs", "rms")}
        return summarize(total | none, at).metrics

    per_group = [{key: value[group] for key, value in small.items()} for group in range(num_groups)]
    means, left_out = leave_one_out(per_group, figures)
    filled = [i for i, entry in enumerate(per_group) if any(bool((value != 0).any()) for value in entry.values())]
    replicates = {}
    for name in means:
        # Few tokens for the Jacobian leave groups without any, which are no groups of its figures.
        tokens = small[_tokens_of(name)]
        values = [entry[name] for group, entry in zip(filled, left_out, strict=False) if tokens[group] > 0]
        replicates[name] = torch.tensor(values if len(values) > 1 else [], dtype=torch.float64)
    total = {key: value.sum(dim=0) for key, value in small.items()}
    arrays = {"histogram_edges": jacobian_metrics.histogram_edges()}
    for setting in JACOBIAN_AT:
        for kind in ("abs", "rms"):
            arrays[f"histogram_{kind}_{setting}"] = histograms[f"histogram/{kind}_{setting}"].sum(dim=0)
    for site in ("input", "output"):
        latents = metrics.without_prefix(f"{site}/latents/", total)
        arrays[f"firing_rate_{site}"] = metrics.firing_rates(latents)
    measured = small["jacobian/tokens"] > 0
    return GroupedEvaluation(
        figures={name: Figure(mean, standard_error(replicates[name])) for name, mean in means.items()},
        replicates=replicates,
        fine_histograms=histograms["fine_histogram"][measured],
        entries=histograms["entries"][measured],
        arrays=arrays,
        tokens=int(total["input/reconstruction/tokens"]),
        jacobian_tokens=int(total["jacobian/tokens"]),
    )


def _tokens_of(figure: str) -> str:
    """Return the key of the sum that counts the positions a figure is measured at."""
    if figure.startswith("jacobian") or figure == "val/penalty":
        return "jacobian/tokens"
    return "splice/positions" if figure.startswith(("val/ce_", "val/kl_")) else "input/reconstruction/tokens"
