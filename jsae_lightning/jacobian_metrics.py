"""How sparse a Jacobian is: raw thresholds, and the scale-free measures that shrinking every entry cannot improve.

Functions take `values` (tokens, k_out, k_in) of any float dtype, inactive entries exactly 0, compute in float64, and
return one float64 value per token. n = k_out k_in counts all entries: those without an active latent on both sides are
zeros, as in the paper's shares of 1024. No measure depends on the order of entries (those per output: on the order of
rows, or within rows); none but `kurtosis` depends on signs.

A token whose J is all zeros has no scale to be free of: scale-free measures are NaN there. `jacobian_sums` leaves such
tokens out of their means and reports their share; rows that are all zeros are left out of means over rows likewise.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.metrics import Sums, cumulative_sum, ratio

Values = Float[Tensor, "tokens k_out k_in"]
PerToken = Float[Tensor, " tokens"]

RAW_THRESHOLDS = (0.005, 0.01, 0.015, 0.02)
RMS_THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
MAX_THRESHOLDS = (0.01, 0.05, 0.1, 0.5)
ROW_SHARES = (0.5, 0.9, 0.99)

# Relative slack of comparisons that can be ties (all |J| equal to their root mean square, a share met to the digit), so
# that rounding does not decide them.
_SLACK = 1e-9


def share_above(values: Values, threshold: float) -> PerToken:
    """Return the share of the n entries with |J| > threshold; it falls when J is merely scaled down."""
    return (values.double().abs() > threshold).double().mean(dim=(1, 2))


def rms_normalized(values: Values) -> Values:
    """Return J divided by the token's sqrt(mean_ij J_ij^2) over all n entries, float64; a token of zeros stays zero."""
    values = values.double()
    return _divide_or_zero(values, values.square().mean(dim=(1, 2), keepdim=True).sqrt())


def max_normalized(values: Values) -> Values:
    """Return J divided by the token's largest |J|, float64; a token of zeros stays zero."""
    values = values.double()
    return _divide_or_zero(values, values.abs().amax(dim=(1, 2), keepdim=True))


def rms_share_above(values: Values, threshold: float) -> PerToken:
    """Return the share of the n entries with |J| above `threshold` root-mean-squares of the token; NaN if J = 0."""
    return _undefined_if_zero(share_above(rms_normalized(values), threshold * (1 + _SLACK)), values)


def max_share_above(values: Values, threshold: float) -> PerToken:
    """Return the share of the n entries with |J| above `threshold` times the token's largest |J|; NaN if J = 0."""
    return _undefined_if_zero(share_above(max_normalized(values), threshold), values)


def effective_edges(values: Values) -> PerToken:
    """Return (sum|J|)^2 / sum J^2: m for m equal edges, so 1 for a single one and n if all are equal; NaN if J = 0."""
    values = values.double()
    return values.abs().sum(dim=(1, 2)).square() / values.square().sum(dim=(1, 2))


def effective_edges_per_output(values: Values) -> PerToken:
    """Return (sum_j|J_ij|)^2 / sum_j J_ij^2, averaged over the rows that are not all zeros; NaN if there is none."""
    values = values.double()
    return _mean_over_nonzero_rows(values.abs().sum(dim=2).square() / values.square().sum(dim=2), values)


def hoyer(values: Values) -> PerToken:
    """Return (sqrt(n) - sum|J| / sqrt(sum J^2)) / (sqrt(n) - 1): 0 if all |J| are equal, 1 for one edge (Hoyer 2004).

    NaN if J = 0; 0 if n = 1, where equal and single are the same thing.
    """
    root = math.sqrt(values.shape[1] * values.shape[2])
    return (root - effective_edges(values).sqrt()) / (root - 1 or 1.0)


def gini(values: Values) -> PerToken:
    """Return the Gini coefficient of the n magnitudes: 0 if all are equal, 1 - 1/n for one edge; NaN if J = 0.

        G = (n + 1) / n - 2 / n * sum_r r x_(r) / sum x,     x_(1) >= x_(2) >= ... the sorted |J|

    which is sum_ab |x_a - x_b| / (2 n sum x) in n log n steps.
    """
    return _gini_of_sorted(_sorted_magnitudes(values))


def kurtosis(values: Values) -> PerToken:
    """Return the fourth standardised moment of the n signed entries, mean (J - mean J)^4 / (mean (J - mean J)^2)^2.

    Not the excess: 3 for a normal distribution. 1, its least possible value, if all entries are the same number; NaN if
    J = 0.
    """
    values = values.double().flatten(1)
    central = values - values.mean(dim=1, keepdim=True)
    second = central.square().mean(dim=1)
    constant = second <= (_SLACK * values.abs().amax(dim=1)).square()
    result = torch.where(constant, 1.0, central.pow(4).mean(dim=1) / second.square())
    return torch.where((values == 0).all(dim=1), math.nan, result)


def top_share_sizes(n: int) -> list[int]:
    """Return the numbers of edges at which `top_shares` looks: 1, 2, 4, ... below n, and n."""
    return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]


def top_shares(values: Values) -> dict[int, PerToken]:
    """Return, for each m of `top_share_sizes(n)`, the share of sum|J| that the m largest |J| hold; NaN if J = 0."""
    return _top_shares_of_sorted(_sorted_magnitudes(values))


def edges_for(values: Values, share: float) -> PerToken:
    """Return how many of a row's largest |J_ij| it takes to hold `share` of its sum_j |J_ij|, averaged over rows.

    The mean is over the rows that are not all zeros; NaN if there is none.
    """
    cumulative = cumulative_sum(values.abs().sort(dim=2, descending=True).values.double(), dim=2)
    return _edges_for(cumulative, share, values)


def jacobian_measures(
    values: Values, active_out: Bool[Tensor, "tokens k_out"], active_in: Bool[Tensor, "tokens k_in"]
) -> dict[str, PerToken]:
    """Return every measure of a batch of Jacobians by the name under which it is reported.

    Raw: `mean_abs` (over the n entries), `share_above_<t>`, `active_entries` (active outputs times active inputs),
    `zero_token_share` (1 where J = 0). Scale-free: `rms_share_above_<t>`, `max_share_above_<t>`, `effective_edges`,
    `effective_edges_per_output`, `hoyer`, `gini`, `kurtosis`, `top_share_<m>`, `edges_for_<percent>`, and
    `zero_row_share`, the share of the active outputs whose row is all zeros.
    """
    measures = {f"share_above_{t:g}": share_above(values, t) for t in RAW_THRESHOLDS}
    rms, largest = rms_normalized(values), max_normalized(values)
    for t in RMS_THRESHOLDS:
        measures[f"rms_share_above_{t:g}"] = _undefined_if_zero(share_above(rms, t * (1 + _SLACK)), values)
    for t in MAX_THRESHOLDS:
        measures[f"max_share_above_{t:g}"] = _undefined_if_zero(share_above(largest, t), values)
    magnitudes = _sorted_magnitudes(values)
    measures |= {f"top_share_{m}": share for m, share in _top_shares_of_sorted(magnitudes).items()}
    cumulative = cumulative_sum(values.abs().sort(dim=2, descending=True).values.double(), dim=2)
    measures |= {f"edges_for_{share * 100:g}": _edges_for(cumulative, share, values) for share in ROW_SHARES}
    rows, active_rows = _nonzero_rows(values).sum(dim=1), active_out.sum(dim=1)
    return measures | {
        "mean_abs": values.double().abs().mean(dim=(1, 2)),
        "active_entries": (active_rows * active_in.sum(dim=1)).double(),
        "zero_token_share": (rows == 0).double(),
        "zero_row_share": _undefined_if_zero(1 - rows / active_rows.clamp(min=1).double(), values),
        "effective_edges": effective_edges(values),
        "effective_edges_per_output": effective_edges_per_output(values),
        "hoyer": hoyer(values),
        "gini": _gini_of_sorted(magnitudes),
        "kurtosis": kurtosis(values),
    }


def is_raw(measure: str) -> bool:
    """Whether `jacobian_measures` defines the measure on tokens with J = 0 too, so that its mean is over all tokens."""
    return measure in ("mean_abs", "active_entries", "zero_token_share") or measure.startswith("share_above_")


def jacobian_sums(
    values: Values, active_out: Bool[Tensor, "tokens k_out"], active_in: Bool[Tensor, "tokens k_in"]
) -> Sums:
    """Sum `jacobian_measures` over tokens, scale-free ones over the tokens with J != 0, and count both kinds of tokens.

    Only all-zero tokens are left out: a NaN or Inf in J shows in the sums.
    """
    nonzero = _nonzero_rows(values).any(dim=1)
    sums = {
        name: (value if is_raw(name) else torch.where(nonzero, value, 0.0)).sum()
        for name, value in jacobian_measures(values, active_out, active_in).items()
    }
    return sums | {
        "tokens": nonzero.new_tensor(len(values), dtype=torch.float64),
        "nonzero_tokens": nonzero.sum().double(),
    }


def jacobian_means(sums: Sums) -> dict[str, float]:
    """Turn the total of `jacobian_sums` into means over tokens (over those with J != 0 for scale-free measures)."""
    counts = {name: sums[name].item() for name in ("tokens", "nonzero_tokens")}
    return {
        name: ratio(value.item(), counts["tokens" if is_raw(name) else "nonzero_tokens"])
        for name, value in sums.items()
        if name not in counts
    }


def shrink_matched_scale(values_jsae: Values, values_baseline: Values) -> float:
    """Return mean|J_jsae| / mean|J_baseline|, means over all tokens and entries.

    The baseline (the pair trained with coefficient 0) times this scale is the shrink-matched baseline: as small on
    average as the sparse pair, and no sparser than it was. Only what differs from it is more than shrinkage. Raises
    UserError if the baseline is all zeros.
    """
    baseline = values_baseline.double().abs().mean().item()
    if baseline == 0:
        raise UserError("the baseline's Jacobian is all zeros: no scale matches it to another; check the baseline pair")
    return values_jsae.double().abs().mean().item() / baseline


def histogram_edges(low: int = -6, high: int = 2, per_decade: int = 10) -> Float[Tensor, " edges"]:
    """Return 10^low ... 10^high, evenly spaced on a log scale, `per_decade` steps for a factor of ten, float64."""
    return torch.logspace(low, high, (high - low) * per_decade + 1, dtype=torch.float64)


def abs_histogram(values: Float[Tensor, "..."], edges: Float[Tensor, " edges"]) -> Int[Tensor, " bins"]:
    """Count the entries of |J| between fixed edges, so that counts of batches and ranks can be added.

    Returns:
        Int64 counts of len(edges) + 2 classes: exactly zero; above 0 and below the first edge; len(edges) - 1 bins that
        hold their lower edge; the last edge and above (with NaN, which sorts last).
    """
    magnitudes = values.double().abs().flatten()
    classes = torch.bucketize(magnitudes, edges.to(magnitudes.device), right=True) + 1
    return torch.bincount(classes.masked_fill(magnitudes == 0, 0), minlength=len(edges) + 2)


def _divide_or_zero(values: Values, scale: Float[Tensor, "tokens 1 1"]) -> Values:
    return values / scale.masked_fill(scale == 0, 1.0)


def _nonzero_rows(values: Values) -> Bool[Tensor, "tokens k_out"]:
    return (values != 0).any(dim=2)


def _undefined_if_zero(measure: PerToken, values: Values) -> PerToken:
    return torch.where(_nonzero_rows(values).any(dim=1), measure, math.nan)


def _mean_over_nonzero_rows(per_row: Float[Tensor, "tokens k_out"], values: Values) -> PerToken:
    rows = _nonzero_rows(values)
    return torch.where(rows, per_row, 0.0).sum(dim=1) / rows.sum(dim=1)


def _sorted_magnitudes(values: Values) -> Float[Tensor, "tokens entries"]:
    return values.abs().flatten(1).sort(dim=1, descending=True).values.double()


def _gini_of_sorted(magnitudes: Float[Tensor, "tokens entries"]) -> PerToken:
    n = magnitudes.shape[1]
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=magnitudes.device)
    return (n + 1) / n - 2 / n * (magnitudes @ rank) / magnitudes.sum(dim=1)


def _top_shares_of_sorted(magnitudes: Float[Tensor, "tokens entries"]) -> dict[int, PerToken]:
    cumulative = cumulative_sum(magnitudes, dim=1)
    return {m: cumulative[:, m - 1] / cumulative[:, -1] for m in top_share_sizes(magnitudes.shape[1])}


def _edges_for(cumulative: Float[Tensor, "tokens k_out k_in"], share: float, values: Values) -> PerToken:
    missing = cumulative < share * (1 - _SLACK) * cumulative[:, :, -1:]
    return _mean_over_nonzero_rows(missing.sum(dim=2).double() + 1, values)
