"""How well a pair reconstructs, fires, and preserves the language model: additive sums first, ratios of them last.

Every quantity is computed from sums over tokens, so sums of batches or ranks can be added and the result is that of one
pass over all tokens: no mean of ratios. `*_sums` functions turn a batch into a dict of float64 sums, `add_sums` adds
two such dicts, `*_metrics` functions turn the total into figures. A figure without data (0 tokens, no variance) is NaN.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Sums = dict[str, Tensor]

SITES = ("input", "output", "both")
"""What is spliced into the language model: either SAE alone, or both."""

# A variance below this share of mean|x|^2 is rounding.
_NO_VARIANCE = 1e-13


def add_sums(total: Sums, batch: Sums) -> Sums:
    """Return the entry-wise sum of two dicts; a key that only one of them has is taken as it is."""
    return total | {key: total[key] + value if key in total else value for key, value in batch.items()}


def with_prefix(prefix: str, sums: Sums) -> Sums:
    """Return `sums` with `prefix` before every key."""
    return {prefix + key: value for key, value in sums.items()}


def without_prefix(prefix: str, sums: Sums) -> Sums:
    """Return the entries of `sums` whose key starts with `prefix`, under the rest of the key."""
    return {key.removeprefix(prefix): value for key, value in sums.items() if key.startswith(prefix)}


def reconstruction_sums(x: Float[Tensor, "tokens d_model"], x_hat: Float[Tensor, "tokens d_model"]) -> Sums:
    """Sum over tokens what `reconstruction_metrics` needs, in float64.

    In float64 sum|x|^2 - |sum x|^2 / N keeps 8 digits of the variance even where the mean is 10^4 standard deviations
    from 0, so there is no need of a shift that ranks would have to agree on.
    """
    x, x_hat = x.double(), x_hat.double()
    norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
    norms = norm * norm_hat
    cosine = (x * x_hat).sum(dim=1) / norms.masked_fill(norms == 0, 1.0)
    norm_ratio = torch.where(norm > 0, norm_hat / norm.masked_fill(norm == 0, 1.0), 0.0)
    return {
        "tokens": norm.new_tensor(len(x)),
        "nonzero_tokens": (norm > 0).sum().double(),
        "x": x.sum(dim=0),
        "x_squared": x.square().sum(),
        "error_squared": (x - x_hat).square().sum(),
        "cosine": cosine.sum(),
        "norm_ratio": norm_ratio.sum(),
    }


def reconstruction_metrics(sums: Sums) -> dict[str, float]:
    """Turn the total of `reconstruction_sums` over N tokens into figures.

        fvu = sum|x - x_hat|^2 / sum|x - mean(x)|^2         explained_variance = 1 - fvu       (ratio of sums)
        mse = sum|x - x_hat|^2 / (N d_model)                cosine = mean of x . x_hat / (|x| |x_hat|)
        norm_ratio = mean of |x_hat| / |x|

    mean(x) is the mean vector of the N tokens. Tokens with x = 0 are left out of the last two means; x_hat = 0 has
    cosine 0. Without variance fvu is NaN.
    """
    tokens, nonzero = sums["tokens"].item(), sums["nonzero_tokens"].item()
    error = sums["error_squared"].item()
    squared = sums["x_squared"].item()
    variance = squared - ratio(sums["x"].square().sum().item(), tokens)
    fvu = ratio(error, variance) if variance > _NO_VARIANCE * squared else math.nan
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": ratio(error, tokens * sums["x"].numel()),
        "cosine": ratio(sums["cosine"].item(), nonzero),
        "norm_ratio": ratio(sums["norm_ratio"].item(), nonzero),
    }


def latent_sums(values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], d_sae: int) -> Sums:
    """Count the tokens on which each of `d_sae` latents fired: was chosen, with a value above 0."""
    fired = torch.bincount(indices[values > 0], minlength=d_sae)
    return {"tokens": fired.new_tensor(len(values), dtype=torch.float64), "fired": fired.double()}


def firing_rates(sums: Sums) -> Float[Tensor, " d_sae"]:
    """Return the share of tokens on which each latent fired, float64 in [0, 1]; NaN without tokens."""
    return sums["fired"] / sums["tokens"]


def latent_metrics(sums: Sums) -> dict[str, float]:
    """Turn the total of `latent_sums` into figures.

    l0 = active entries per token        dead_share = share of latents that fired on none of these tokens
    """
    fired = sums["fired"]
    return {
        "l0": ratio(fired.sum().item(), sums["tokens"].item()),
        "dead_share": (fired == 0).double().mean().item(),
    }


def cross_entropies(
    logits: Float[Tensor, "positions vocab"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, " positions"]:
    """Return each position's cross-entropy in nats, -log softmax(logits)[target], in at least float32."""
    return F.cross_entropy(_wide(logits), targets, reduction="none")


def kl_divergences(
    logits: Float[Tensor, "positions vocab"], clean_logits: Float[Tensor, "positions vocab"]
) -> Float[Tensor, " positions"]:
    """Return each position's KL(clean || spliced) in nats, sum_v p_clean (log p_clean - log p), in at least float32."""
    log_p, log_clean = (_wide(values).log_softmax(dim=-1) for values in (logits, clean_logits))
    return F.kl_div(log_p, log_clean, reduction="none", log_target=True).sum(dim=-1)


def splice_metrics(sums: Sums) -> dict[str, float]:
    """Turn sums of cross-entropies and KL divergences over P positions into means and scores.

        ce_score_s = (ce_zero - ce_s) / (ce_zero - ce_clean)         kl_score_s = 1 - kl_s / kl_zero

    ratios of means, for s = input, output, both. Zero-ablation of the same site is the floor: the MLP's input for
    `input`, its output for `output` and for `both` (whose last word is the MLP's output). 1 is as good as the clean
    model, 0 as bad as the ablated one; where the ablation costs nothing a score means nothing (NaN if exactly nothing).

    Args:
        sums: `positions`; `ce_<v>` for v = clean, input, output, both, zero_input, zero_output; `kl_<v>` for the same
            but clean. All scalars, nats summed over positions.

    Returns:
        The means under the same keys, and `ce_score_<s>`, `kl_score_<s>`.
    """
    positions = sums["positions"].item()
    metrics = {key: ratio(value.item(), positions) for key, value in sums.items() if key != "positions"}
    for site in SITES:
        zero = "zero_input" if site == "input" else "zero_output"
        ce_zero = metrics[f"ce_{zero}"]
        metrics[f"ce_score_{site}"] = ratio(ce_zero - metrics[f"ce_{site}"], ce_zero - metrics["ce_clean"])
        metrics[f"kl_score_{site}"] = 1 - ratio(metrics[f"kl_{site}"], metrics[f"kl_{zero}"])
    return metrics


def ratio(numerator: float, denominator: float) -> float:
    """Return numerator / denominator, NaN if the denominator is 0."""
    return numerator / denominator if denominator else math.nan


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def cumulative_sum(values: Tensor, dim: int) -> Tensor:
    """Return `values.cumsum(dim)`, with `trainer.deterministic=true` on CUDA too.

    torch has none of floating-point numbers there that repeats to the bit, and raises; it is taken on the CPU then.
    """
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim).to(values.device)
    return values.cumsum(dim)
