"""The sparsity penalties on the latent-to-latent Jacobian J.

Each function takes J as `values` of shape (tokens, k_out, k_in), inactive entries exactly 0, and returns one scalar,
the mean over tokens of a per-token penalty (`l1_over_l2_batch` alone is a ratio over the batch). Below, n = k_out k_in,
and mean_ij is the mean over all n entries, so inactive entries count as zeros. What holds for all of them:

* J = 0 costs 0; an entry that is exactly 0 receives exactly zero gradient; nothing is NaN or infinite there;
* half-precision input is computed in float32, float64 stays float64;
* constant factors in front of the published code's penalties are left out: `jacobian.coef` is the factor.

The list follows the published code of Farnik et al. (Jacobian Sparse Autoencoders, arXiv 2502.18147), which draws on
Hurley & Rickard (Comparing Measures of Sparsity, arXiv 0811.4706); a function that differs says so.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jsae_lightning.errors import UserError

Penalty = Callable[[Float[Tensor, "tokens k_out k_in"]], Float[Tensor, ""]]

SCALE_FLOOR = 1e-12
"""Tokens whose largest |J| lies below this count as zero in the scale-free penalties: their gradient grows as 1/|J|."""


def l1(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """The paper's penalty: mean_ij |J_ij| (section 3)."""
    return _wide(values).abs().mean()


def l1_over_l2_token(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """Each token's mean_ij |J_ij| / sqrt(mean_ij J_ij^2): 1 if all |J| are equal, 1/sqrt(n) for a single edge.

    Scale-free per token; a token with J = 0 contributes 0.
    """
    scaled, alive = _unit_scale(_wide(values), dims=(1, 2))
    return _mean_over_root_mean_square(scaled, alive, dims=(1, 2)).mean()


def l1_over_l2_batch(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """The batch's mean |J| / sqrt(mean J^2), both means over all tokens and entries.

    Free of the batch's common scale only: it can be lowered by making some tokens' J large and the others' small. It is
    not a mean over tokens, so its value depends on how tokens are batched.
    """
    scaled, alive = _unit_scale(_wide(values), dims=(0, 1, 2))
    return _mean_over_root_mean_square(scaled, alive, dims=(0, 1, 2)).squeeze()


def log(values: Float[Tensor, "tokens k_out k_in"], *, power: float = 0.4, eps: float = 1e-4) -> Float[Tensor, ""]:
    """A slowly growing penalty, mean_ij ln(1 + |J_ij|^power), the power smoothed as in `_smooth_power`."""
    return torch.log1p(_smooth_power(_wide(values), power, eps)).mean()


def l04(values: Float[Tensor, "tokens k_out k_in"], *, power: float = 0.4, eps: float = 1e-4) -> Float[Tensor, ""]:
    """Each token's L^p quasi-norm (mean_ij |J_ij|^p)^(1/p), p = `power`, the power smoothed as in `_smooth_power`.

    Equals `l1` when all |J| are equal and is lower otherwise. The published code takes the quasi-norm over the whole
    batch; per token it is additive over batches and ranks.
    """
    return _smooth_power(_wide(values), power, eps).mean(dim=(1, 2)).pow(1 / power).mean()


def exp(values: Float[Tensor, "tokens k_out k_in"], *, rate: float = 2.5) -> Float[Tensor, ""]:
    """A saturating penalty, mean_ij (1 - e^(-rate |J_ij|))."""
    return -torch.expm1(-rate * _wide(values).abs()).mean()


def tanh(values: Float[Tensor, "tokens k_out k_in"], *, scale: float = 10.0, power: float = 2.0) -> Float[Tensor, ""]:
    """A smooth share of the entries above 1/scale, mean_ij tanh of (scale |J_ij|)^power, defaults as published."""
    return torch.tanh((scale * _wide(values).abs()).pow(power)).mean()


def scad(values: Float[Tensor, "tokens k_out k_in"], *, knot: float = 0.5, a: float = 4.3) -> Float[Tensor, ""]:
    """Smoothly clipped absolute deviation, mean_ij p(|J_ij|), with L = `knot` (Fan & Li 2001, their lambda).

        p(x) = L x                                    x <= L
             = (2 a L x - x^2 - L^2) / (2 (a - 1))    L < x <= a L
             = (a + 1) L^2 / 2                        x > a L

    The published pair (0.5, 4.3) is read as (L, a): the second number is Fan & Li's dimensionless a (theirs is 3.7), so
    the penalty is flat from a L = 2.15 on, which is also how the published code uses it. Read as two places on the |J|
    axis, the pair would mean a = 8.6. p and p' are continuous either way. The slope at 0 is L, not 1.
    """
    x = _wide(values).abs()
    middle = (2 * a * knot * x - x.square() - knot**2) / (2 * (a - 1))
    flat = (a + 1) * knot**2 / 2
    return torch.where(x <= knot, knot * x, torch.where(x <= a * knot, middle, flat)).mean()


def capped_l1(values: Float[Tensor, "tokens k_out k_in"], *, cap: float = 0.5) -> Float[Tensor, ""]:
    """mean_ij min(|J_ij|, cap)."""
    return _wide(values).abs().clamp(max=cap).mean()


def kurtosis(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """Each token's 1 / kurtosis about zero, (mean_ij J_ij^2)^2 / mean_ij J_ij^4: 1/n for one edge, 1 if all are equal.

    The reciprocal, because sparse means large kurtosis; the published code adds the kurtosis itself to the loss, which
    rewards dense Jacobians. Scale-free per token; a token with J = 0 contributes 0.
    """
    scaled, alive = _unit_scale(_wide(values), dims=(1, 2))
    squares = scaled.square()
    fourth = squares.square().mean(dim=(1, 2), keepdim=True).masked_fill(~alive, 1.0)
    return (squares.mean(dim=(1, 2), keepdim=True).square() / fourth).mean()


def hoyer(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """Each token's 1 - Hoyer sparsity, (sum|J| / sqrt(sum J^2) - 1) / (sqrt(n) - 1): 0 for one edge, 1 if all equal.

    An affine function of `l1_over_l2_token`, on the scale on which Hoyer (2004) reports sparsity. Scale-free per token;
    a token with J = 0, and any token if n = 1, contributes 0.
    """
    scaled, alive = _unit_scale(_wide(values), dims=(1, 2))
    root = math.sqrt(values.shape[1] * values.shape[2])
    ratio = root * _mean_over_root_mean_square(scaled, alive, dims=(1, 2))
    return ((ratio - 1).masked_fill(~alive, 0.0) / (root - 1 or 1.0)).mean()


def hoyer_rows(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """1 - Hoyer sparsity of each output latent's row, (sum_j|J| / sqrt(sum_j J^2) - 1) / (sqrt(k_in) - 1).

    The mean over a token's rows that are not all zeros, then over tokens: few inputs for each output, however large
    its row is. `hoyer` can also be lowered by a few rows that hold all of the mass; this cannot. Scale-free per row; a
    token with J = 0, and any token if k_in = 1, contributes 0. Not in the paper.
    """
    scaled, alive = _unit_scale(_wide(values), dims=(2,))
    root = math.sqrt(values.shape[2])
    ratio = root * _mean_over_root_mean_square(scaled, alive, dims=(2,))
    dense = ((ratio - 1).masked_fill(~alive, 0.0) / (root - 1 or 1.0)).sum(dim=(1, 2))
    return (dense / alive.sum(dim=(1, 2)).clamp(min=1)).mean()


def hoyer_token_rows(values: Float[Tensor, "tokens k_out k_in"], *, row_weight: float = 0.5) -> Float[Tensor, ""]:
    """Both at once, (1 - row_weight) hoyer + row_weight hoyer_rows. Not in the paper."""
    return (1 - row_weight) * hoyer(values) + row_weight * hoyer_rows(values)


def hoyer_l1(
    values: Float[Tensor, "tokens k_out k_in"], *, row_weight: float = 0.5, l1_weight: float = 5.0
) -> Float[Tensor, ""]:
    """hoyer_token_rows + l1_weight * l1: sparser, and no larger. Not in the paper.

    A scale-free penalty alone can be lowered by making the strong entries stronger, and a Jacobian whose entries grow
    says less about the function around the token; L1 holds them down. Not scale-free: `l1_weight` is in units of 1/|J|.
    """
    return hoyer_token_rows(values, row_weight=row_weight) + l1_weight * l1(values)


def l1_scaled(values: Float[Tensor, "tokens k_out k_in"]) -> Float[Tensor, ""]:
    """`l1_over_l2_token` with a detached scale: mean_ij |J_ij| / sqrt(mean_ij J_ij^2), no gradient of the denominator.

    Its value is scale-free, its gradient is that of `l1` with a weight that is the same in relation to every token's
    scale: it shrinks all entries of a token equally, the small ones to zero. Not in the paper.
    """
    scaled, alive = _unit_scale(_wide(values), dims=(1, 2))
    mean_square = scaled.detach().square().mean(dim=(1, 2), keepdim=True).masked_fill(~alive, 1.0)
    return (scaled.abs() / mean_square.sqrt()).mean()


def l1_rows_l05(
    values: Float[Tensor, "tokens k_out k_in"], *, power: float = 0.5, eps: float = 1e-4
) -> Float[Tensor, ""]:
    """L1 over output latents of an L^p quasi-norm over input latents: mean_i (mean_j |J_ij|^p)^(1/p), p = `power`.

    Sparsifies every output latent's row on its own; equals `l1` when the |J| of each row are equal. The power is
    smoothed as in `_smooth_power`.
    """
    return _smooth_power(_wide(values), power, eps).mean(dim=2).pow(1 / power).mean()


PENALTIES: dict[str, Callable[..., Float[Tensor, ""]]] = {
    function.__name__: function
    for function in (
        l1, l1_over_l2_batch, l1_over_l2_token, log, l04, exp, tanh, scad, capped_l1, kurtosis, hoyer, l1_rows_l05,
        hoyer_rows, hoyer_token_rows, hoyer_l1, l1_scaled,
    )
}  # fmt: skip

# Where "any finite number above 0" is too wide (bounds inclusive): beyond them the gradient at J = 0 is infinite, and
# Fan & Li's a is at least 2.
_RANGES = {
    ("l04", "power"): (0.0, 1.0),
    ("l1_rows_l05", "power"): (0.0, 1.0),
    ("scad", "a"): (2.0, math.inf),
    ("tanh", "power"): (1.0, math.inf),
    ("hoyer_token_rows", "row_weight"): (0.0, 1.0),
    ("hoyer_l1", "row_weight"): (0.0, 1.0),
}


def make_penalty(name: str, **params: object) -> Penalty:
    """Return the penalty `name` with its parameters bound: a function of J (tokens, k_out, k_in) to a scalar.

    Args:
        name: a key of `PENALTIES`.
        params: the keyword arguments of that function, numbers; those left out keep their published defaults.

    Raises:
        UserError: unknown name or parameter (the message lists the known ones), or a value outside its range.
    """
    if name not in PENALTIES:
        raise UserError(f"jacobian.penalty: {name!r} is unknown: choose one of {', '.join(PENALTIES)}")
    function = PENALTIES[name]
    known = [key for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    numbers: dict[str, float] = {}
    for key, value in params.items():
        if key not in known:
            takes = f"one of {', '.join(known)}" if known else "no parameters: remove it"
            raise UserError(f"jacobian.penalty: {key!r} is no parameter of {name}, which takes {takes}")
        low, high = _RANGES.get((name, key), (0.0, math.inf))
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not (math.isfinite(value) and value > 0 and low <= value <= high)
        ):
            allowed = f"a positive number from {low:g} to {high:g}" if (name, key) in _RANGES else "a positive number"
            raise UserError(f"jacobian.penalty: {name}'s {key} is {value!r}: give {allowed}")
        numbers[key] = float(value)
    return partial(function, **numbers)


def _wide(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """At least float32: sums of a thousand bfloat16 entries lose the small ones."""
    return values if values.dtype == torch.float64 else values.float()


def _smooth_power(x: Float[Tensor, "..."], power: float, eps: float) -> Float[Tensor, "..."]:
    """(|x| + eps)^power - eps^power: |x|^power with its infinite slope at 0 capped at power * eps^(power - 1).

    Written with log1p and expm1 so that 0 maps to exactly 0. The default eps, 1e-4, is 50 times below the lowest
    threshold the paper counts (0.005) and caps the slope of |x|^0.4 at 100.
    """
    return eps**power * torch.expm1(power * torch.log1p(x.abs() / eps))


def _unit_scale(
    values: Float[Tensor, "tokens k_out k_in"], dims: tuple[int, ...]
) -> tuple[Float[Tensor, "tokens k_out k_in"], Bool[Tensor, "..."]]:
    """Divide by the largest |J| over `dims`, and set slices below SCALE_FLOOR to 0; also the mask of the other slices.

    So squares cannot underflow. The divisor is detached: what ignores scale has the same gradient either way.
    """
    largest = values.detach().abs().amax(dim=dims, keepdim=True)
    too_small = largest < SCALE_FLOOR
    return values.masked_fill(too_small, 0.0) / largest.masked_fill(too_small, 1.0), ~too_small


def _mean_over_root_mean_square(
    scaled: Float[Tensor, "tokens k_out k_in"], alive: Bool[Tensor, "..."], dims: tuple[int, ...]
) -> Float[Tensor, "..."]:
    """mean|x| / sqrt(mean x^2) over `dims`, kept as size 1; 0 with zero gradient where not `alive`."""
    mean_square = scaled.square().mean(dim=dims, keepdim=True).masked_fill(~alive, 1.0)
    return scaled.abs().mean(dim=dims, keepdim=True) / mean_square.sqrt()
