"""Judge a pair on held-out tokens: reconstruction, sparsity, the spliced language model's loss, and the Jacobian.

Positions. `included` marks the positions that count. An excluded one (a beginning-of-sequence token, say) is never
spliced and enters no mean. Cross-entropy and KL divergence are averaged over the included positions that have a
successor (see `splicing.splice_sums`), Jacobian measures over the first `jacobian_tokens` included positions in the
order of `tokens`, everything else over all included positions.

Splices. `input`: mlp_in is replaced by its reconstruction. `output`: mlp_out is replaced by the reconstruction of the
true mlp_out. `both`: mlp_in by x_hat, then f(x_hat) by its reconstruction by the output SAE. `zero_input`,
`zero_output`: the tensor is set to 0, the floor of the scores.

All figures are ratios of sums over tokens (`metrics`, `jacobian_metrics`). Ranks share the sequences out and add their
sums up once, so the figures are those of one process up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jsae_lightning import jacobian_metrics, metrics
from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobians import JACOBIAN_AT, EdgePenalty, jacobian
from jsae_lightning.metrics import Sums, add_sums, with_prefix, without_prefix
from jsae_lightning.sae import SAEPair
from jsae_lightning.splicing import SPLICE_KEYS, Spliceable, chunks, splice_sums


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_pair` found, the same on every rank; tensors are on the CPU."""

    metrics: dict[str, float]
    """Flat: `val/...`; `jacobian/...` at the trained setting and `jacobian_at_<other>/...` at the other one."""
    firing_rate_input: Float[Tensor, " d_sae_in"]
    """Share of the tokens on which each latent fired, float64."""
    firing_rate_output: Float[Tensor, " d_sae_out"]
    abs_histogram: Int[Tensor, " bins"]
    """Counts of |J| at the trained setting between `jacobian_metrics.histogram_edges()`: see `abs_histogram` there."""
    rms_histogram: Int[Tensor, " bins"]
    """The same of |J| divided by each token's root mean square."""


def evaluate_pair(
    pair: SAEPair,
    mlp: FrozenMLP,
    language_model: Spliceable,
    tokens: Int[Tensor, "sequences seq"],
    included: Bool[Tensor, "sequences seq"],
    *,
    at: str,
    batch_sequences: int,
    jacobian_tokens: int | None,
    penalty: EdgePenalty,
) -> Evaluation:
    """Evaluate on `tokens`; with several ranks, all must call it, and each works on its share of the sequences.

    Changes nothing that training depends on: no random numbers, no gradients, modules' training flags restored; the
    pair and the MLP are computed in their own precision (float32) even under autocast.

    Args:
        pair: the two SAEs; `mlp` and `language_model` live on the same device.
        mlp: the frozen MLP between them.
        language_model: the model that it was taken from.
        tokens: token ids, the same on every rank.
        included: the positions to judge; see the module's docstring.
        at: the trained setting of `jacobian.at`, `input` or `reconstruction`; both are measured, on the same tokens.
        batch_sequences: sequences per forward pass of the language model, which bounds the memory for logits.
        jacobian_tokens: use the first so many included tokens for Jacobian measures; None: all of them.
        penalty: the training penalty, for `val/penalty`: the mean, weighted by tokens, of its value on each sequence (a
            long one in chunks), which for all penalties but `l1_over_l2_batch` is its value on all tokens.

    Returns:
        The figures; cross-entropies and divergences in nats.

    Raises:
        UserError: `at` is unknown, or no position is included.
    """
    if at not in JACOBIAN_AT:
        raise UserError(f"jacobian.at: '{at}' is not known: choose one of {', '.join(JACOBIAN_AT)}")
    if not included.any():
        raise UserError(f"data: none of the {tokens.numel()} validation positions is included: exclude fewer of them")
    sums = evaluation_sums(
        pair,
        mlp,
        language_model,
        tokens,
        included,
        shard=rank_and_world_size(),
        at=at,
        batch_sequences=batch_sequences,
        jacobian_tokens=jacobian_tokens,
        penalty=penalty,
    )
    return summarize(all_reduce_sum(sums), at)


@torch.no_grad()
def metric_names(pair: SAEPair, mlp: FrozenMLP, *, at: str, penalty: EdgePenalty) -> list[str]:
    """Return the keys that `evaluate_pair(...).metrics` will have; takes no tokens, and evaluates nothing."""
    with evaluation_mode(pair, mlp), torch.autocast(pair.input_sae.W_enc.device.type, enabled=False):
        return list(summarize(_zero_sums(pair, mlp, at, penalty), at).metrics)


@torch.no_grad()
def evaluation_sums(
    pair: SAEPair,
    mlp: FrozenMLP,
    language_model: Spliceable,
    tokens: Int[Tensor, "sequences seq"],
    included: Bool[Tensor, "sequences seq"],
    *,
    shard: tuple[int, int],
    at: str,
    batch_sequences: int,
    jacobian_tokens: int | None,
    penalty: EdgePenalty,
) -> Sums:
    """Return one shard's sums: for `shard` = (rank, world_size) those of the sequences rank, rank + world_size, ...

    Every shard has the same keys and shapes, even one without sequences; the sum over all shards is what `summarize`
    takes. The other arguments are those of `evaluate_pair`.
    """
    device, dtype = pair.input_sae.W_enc.device, pair.input_sae.W_enc.dtype
    for_jacobian = included
    if jacobian_tokens is not None:
        for_jacobian = included & (included.flatten().cumsum(0).view_as(included) <= jacobian_tokens)
    rank, world_size = shard
    with evaluation_mode(pair, mlp), torch.autocast(device.type, enabled=False):
        sums = _zero_sums(pair, mlp, at, penalty)
        mine = list(range(rank, len(tokens), world_size))
        for start in range(0, len(mine), batch_sequences):
            batch = mine[start : start + batch_sequences]
            batch_tokens, mask = tokens[batch].to(device), included[batch].to(device)
            mlp_in = language_model.mlp_in(batch_tokens).to(dtype)
            sums = add_sums(sums, autoencoder_sums(pair, mlp, mlp_in[mask]))
            sums = add_sums(sums, with_prefix("splice/", splice_sums(pair, language_model, batch_tokens, mask)))
            # By sequence, so that a penalty that is no mean over tokens depends neither on batches nor on ranks.
            for sequence, chosen in zip(mlp_in, for_jacobian[batch].to(device), strict=True):
                for chunk in chunks(sequence[chosen], mlp.d_mlp * max(pair.input_sae.k, pair.output_sae.k)):
                    sums = add_sums(sums, _jacobian_sums(pair, mlp, chunk, at, penalty))
    return sums


def summarize(sums: Sums, at: str) -> Evaluation:
    """Turn the total of `evaluation_sums` over all shards into figures; `at` must be the one used there."""
    figures: dict[str, float] = {}
    rates = {}
    for name in ("input", "output"):
        reconstruction = metrics.reconstruction_metrics(without_prefix(f"{name}/reconstruction/", sums))
        latents = without_prefix(f"{name}/latents/", sums)
        rates[name] = metrics.firing_rates(latents).cpu()
        site_figures = reconstruction | metrics.latent_metrics(latents)
        figures |= {f"val/{key}_{name}": value for key, value in site_figures.items()}
    losses = metrics.splice_metrics(without_prefix("splice/", sums))
    figures |= {f"val/{key}": value for key, value in losses.items()}
    for setting in JACOBIAN_AT:
        prefix = jacobian_prefix(setting, at)
        means = jacobian_metrics.jacobian_means(without_prefix(prefix, sums))
        figures |= {prefix + key: value for key, value in means.items()}
    figures["val/penalty"] = metrics.ratio(sums["penalty"].item(), sums["jacobian/tokens"].item())
    return Evaluation(
        metrics=figures,
        firing_rate_input=rates["input"],
        firing_rate_output=rates["output"],
        abs_histogram=sums["histogram/abs"].cpu(),
        rms_histogram=sums["histogram/rms"].cpu(),
    )


def autoencoder_sums(pair: SAEPair, mlp: FrozenMLP, mlp_in: Float[Tensor, "tokens d_model"]) -> Sums:
    """Sum reconstruction and firing of both SAEs: the input SAE on x, the output SAE on the true y = f(x)."""
    sums: Sums = {}
    for x in chunks(mlp_in, max(pair.input_sae.d_sae, pair.output_sae.d_sae, mlp.d_mlp)):
        for (name, sae), target in zip(pair.named_saes(), (x, mlp(x)), strict=True):
            reconstruction, latents = sae(target)
            parts = with_prefix("reconstruction/", metrics.reconstruction_sums(target, reconstruction))
            parts |= with_prefix("latents/", metrics.latent_sums(latents.values, latents.indices, sae.d_sae))
            sums = add_sums(sums, with_prefix(f"{name}/", parts))
    return sums


def _jacobian_sums(
    pair: SAEPair, mlp: FrozenMLP, mlp_in: Float[Tensor, "tokens d_model"], at: str, penalty: EdgePenalty
) -> Sums:
    """Sum the Jacobian's measures at both settings; penalty and histograms at the trained one."""
    sums: Sums = {}
    for setting in JACOBIAN_AT:
        result = jacobian(pair, mlp, mlp_in, at=setting)
        measures = jacobian_metrics.jacobian_sums(result.values, result.active_out, result.active_in)
        sums |= with_prefix(jacobian_prefix(setting, at), measures)
        if setting == at:
            edges = jacobian_metrics.histogram_edges()
            normalized = jacobian_metrics.rms_normalized(result.values)
            sums["penalty"] = penalty(result).double() * len(mlp_in)
            sums["histogram/abs"] = jacobian_metrics.abs_histogram(result.values, edges)
            sums["histogram/rms"] = jacobian_metrics.abs_histogram(normalized, edges)
    return sums


def jacobian_prefix(setting: str, at: str) -> str:
    """Return the family of figures that a setting of `jacobian.at` is reported under, `at` being the trained one."""
    return "jacobian/" if setting == at else f"jacobian_at_{setting}/"


def _zero_sums(pair: SAEPair, mlp: FrozenMLP, at: str, penalty: EdgePenalty) -> Sums:
    """All keys and shapes, as zeros: what a rank without sequences adds to the reduction."""
    token = pair.input_sae.W_enc.new_zeros(1, pair.d_model)
    sums = autoencoder_sums(pair, mlp, token) | _jacobian_sums(pair, mlp, token, at, penalty)
    sums |= {f"splice/{key}": token.new_zeros((), dtype=torch.float64) for key in SPLICE_KEYS}
    return {key: torch.zeros_like(value) for key, value in sums.items()}


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules and their submodules into eval mode, and restore each one's own flag afterwards."""
    flags = {member: member.training for module in modules for member in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for member, flag in flags.items():
            member.training = flag
