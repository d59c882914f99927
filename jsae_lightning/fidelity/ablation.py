"""Does J predict what happens when an input latent is removed, or raised by one?

For random co-active pairs (output i, input j), with s_j moved and everything else of the token held,

    full ablation   s_j -> 0          predicted  -J_ij s_j      measured  f_s,i(0) - f_s,i(s_j)
    unit step       s_j -> s_j + 1    predicted   J_ij          measured  f_s,i(s_j + 1) - f_s,i(s_j)

Output latents that the change takes out of the active set jump to 0, which no derivative can tell: they are counted
apart (`drop_out_share`) and enter nothing else. A tolerance on |predicted - measured| would be met by any J that is
small enough, so agreement is judged by regression, which has no scale.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jsae_lightning.fidelity.points import Pairs, Points
from jsae_lightning.fidelity.scalar_functions import survived, values_at
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.metrics import Sums, ratio
from jsae_lightning.sae import SAEPair

INTERVENTIONS = ("ablation", "unit")

# A variance below this share of the mean square is rounding.
_NO_VARIANCE = 1e-12


def predicted_and_measured(
    pair: SAEPair, mlp: FrozenMLP, points: Points, pairs: Pairs
) -> dict[str, tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"], Bool[Tensor, " pairs"]]]:
    """Return (predicted change, measured change, still active) of s_y,i for each of INTERVENTIONS.

    Both are measured from f_s,i evaluated at s_j by the same path, so that a change of nothing measures exactly 0.
    """
    moved = torch.stack([pairs.s_in, torch.zeros_like(pairs.s_in), pairs.s_in + 1], dim=1)
    before, ablated, raised = values_at(pair, mlp, points, pairs, moved).unbind(dim=1)
    return {
        "ablation": (-pairs.jacobian * pairs.s_in, ablated - before, survived(ablated)),
        "unit": (pairs.jacobian, raised - before, survived(raised)),
    }


def regression_terms(
    predicted: Float[Tensor, " pairs"], measured: Float[Tensor, " pairs"], alive: Bool[Tensor, " pairs"]
) -> Sums:
    """Return each pair's float64 terms of n, sum p, m, pp, pm, mm over survivors, and of the number of pairs."""
    weight, p, m = alive.double(), predicted.double() * alive, measured.double() * alive
    return {
        "pairs": torch.ones_like(weight), "n": weight, "p": p, "m": m, "pp": p * p, "pm": p * m, "mm": m * m,
    }  # fmt: skip


def regression_figures(sums: Sums) -> dict[str, float]:
    """Turn the totals of `regression_terms` into figures of measured m on predicted p, over survivors.

        slope = cov(p, m) / var(p)      (least squares with an intercept)     slope_through_origin = sum pm / sum pp
        correlation = cov / sqrt(var(p) var(m))                               r2 = correlation^2, of the fitted line
        identity_r2 = 1 - sum (m - p)^2 / sum (m - mean m)^2      of the prediction itself: slope 1, intercept 0
        drop_out_share = 1 - survivors / pairs

    NaN where it is undefined: no survivors, or no variance. r2 says how well the changes are ordered and spaced by J;
    slope and identity_r2 whether they have the predicted size too.
    """
    n, p, m = (sums[key].item() for key in ("n", "p", "m"))
    pp, pm, mm = (sums[key].item() for key in ("pp", "pm", "mm"))
    spread_p, spread_m = _variation(n, p, pp), _variation(n, m, mm)
    joint = pm - ratio(p * m, n)
    correlation = ratio(joint, math.sqrt(spread_p * spread_m))
    return {
        "slope": ratio(joint, spread_p),
        "r2": correlation**2,
        "correlation": correlation,
        "slope_through_origin": ratio(pm, pp),
        "identity_r2": 1 - ratio(mm - 2 * pm + pp, spread_m),
        "drop_out_share": 1 - ratio(n, sums["pairs"].item()),
    }


def _variation(n: float, total: float, squares: float) -> float:
    """Sum of squared deviations from the mean; 0 where it is only rounding."""
    variation = squares - total * total / n if n else 0.0
    return variation if variation > _NO_VARIANCE * squares else 0.0
