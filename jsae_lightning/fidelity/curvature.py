"""How curved f_s is where it is linearised: second derivatives by one input latent, in a form without scale.

    plain   f'' = w_i . (act''(h) * (W_in^T d_j)^2)
    gated   f'' = w_i . (act''(g) * (W_gate^T d_j)^2 * u + 2 act'(g) * (W_gate^T d_j) * (W_in^T d_j))

with w_i = W_out W_enc_y,i and d_j the decoder row. What is reported is the second-order term's part of the second-order
expansion over the latent's whole activation (s_j -> 0),

    q = |f'' s_j^2 / 2| / (|f' s_j| + |f'' s_j^2 / 2|)      in [0, 1]

0 for a function that is straight at the token, 1/2 if bending counts as much as slope, 1 if the slope is 0. It does not
change when f_s, s_j or both are rescaled. f' = f'' = 0 (an output that does not depend on the input at all) has no q
and is left out of mean and median. act'' comes from differentiating act', which is in closed form, elementwise.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.activation_functions import ACTIVATIONS
from jsae_lightning.fidelity.points import Pairs, Points
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.metrics import Sums, ratio
from jsae_lightning.sae import SAEPair
from jsae_lightning.splicing import MAX_ELEMENTS

_LOWEST_DECADE, _PER_DECADE = -8, 20
NUM_BINS = 1 - _LOWEST_DECADE * _PER_DECADE
"""One bin for q < 1e-8 (with 0), then 20 a decade up to 1."""


def second_derivatives(pair: SAEPair, mlp: FrozenMLP, points: Points, pairs: Pairs) -> Float[Tensor, " pairs"]:
    """Return d^2 f_s,i / d s_j^2 at each token's point, for pairs that are active there."""
    rows = torch.arange(len(pairs.token), device=pairs.token.device).split(max(1, MAX_ELEMENTS // (8 * mlp.d_mlp)))
    return torch.cat([pairs.s_in[:0], *(_second_derivatives_of_some(pair, mlp, points, pairs, some) for some in rows)])


def curvature_share(
    first: Float[Tensor, " pairs"], second: Float[Tensor, " pairs"], s_in: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Return q of the module's docstring, float64; NaN where both derivatives are 0."""
    slope, bend = (first.double() * s_in).abs(), (second.double() * s_in.double().square() / 2).abs()
    return bend / (slope + bend)


def curvature_bins(share: Float[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """Return the bin, in [0, NUM_BINS), of each q in [0, 1]: see NUM_BINS."""
    position = (share.double().clamp(min=1e-300).log10() - _LOWEST_DECADE) * _PER_DECADE
    return (position.floor().long() + 1).clamp(0, NUM_BINS - 1)


def curvature_terms(share: Float[Tensor, " pairs"]) -> Sums:
    """Return each pair's terms: whether q is defined, q (0 where not), and the one-hot of its bin."""
    defined = ~share.isnan()
    filled = torch.where(defined, share.double(), 0.0)
    one_hot = torch.nn.functional.one_hot(curvature_bins(filled), NUM_BINS).double() * defined[:, None]
    return {"defined": defined.double(), "share": filled, "bins": one_hot}


def curvature_figures(sums: Sums) -> dict[str, float]:
    """Turn the totals of `curvature_terms` into `curvature_mean` and `curvature_median` over pairs with a q.

    The median is that of the histogram, interpolated within its bin on the log scale, so it adds up over ranks; it is
    within a factor 10^(1/20) = 1.12 of the true one, and 0 if half of the pairs are below 1e-8. NaN without pairs.
    """
    count = sums["defined"].item()
    return {
        "curvature_median": _median(sums["bins"]) if count else math.nan,
        "curvature_mean": ratio(sums["share"].item(), count),
    }


def _median(counts: Float[Tensor, " bins"]) -> float:
    cumulative, half = counts.cumsum(0), counts.sum() / 2
    bin_number = int((cumulative < half).sum())
    if bin_number == 0:
        return 0.0
    before = cumulative[bin_number - 1].item()
    inside = (half.item() - before) / counts[bin_number].item()
    return 10 ** (_LOWEST_DECADE + (bin_number - 1 + inside) / _PER_DECADE)


def _second_derivatives_of_some(
    pair: SAEPair, mlp: FrozenMLP, points: Points, pairs: Pairs, some: Int[Tensor, " some"]
) -> Float[Tensor, " some"]:
    act = ACTIVATIONS[mlp.activation]
    x, direction = points.x[pairs.token[some]], pair.input_sae.W_dec[pairs.input[some]]
    read_out = pair.output_sae.W_enc.T[pairs.output[some]] @ mlp.W_out.T
    hidden, step = _project(x, mlp.W_in, mlp.b_in), direction @ mlp.W_in
    if mlp.W_gate is None:
        bend = _derivative(act.derivative, hidden) * step.square()
    else:
        gate, gate_step = _project(x, mlp.W_gate, mlp.b_gate), direction @ mlp.W_gate
        bend = _derivative(act.derivative, gate) * gate_step.square() * hidden
        bend = bend + 2 * act.derivative(gate) * gate_step * step
    return (read_out * bend).sum(dim=1)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def _derivative(function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Return the derivative of an elementwise function at h; 0 for one that is constant in pieces."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        values = function(h)
        return torch.autograd.grad(values.sum(), h)[0] if values.requires_grad else torch.zeros_like(h)
