"""Which shape the scalar functions s_j -> f_s,i have: linear, JumpReLU, flat, or another.

Each function of a random co-active pair is evaluated on GRID_POINTS evenly spaced values of s_j from 0 to 2 s_j. The
token's own value is in the middle: the range reaches from the latent's removal to as far on the other side. It needs no
pass over the data and grows with the latent, so that rescaling latents changes no class. (A fixed range would make
functions of small latents span several times what ever occurs.)

Classes, with R = max - min of the function on the grid; each function has exactly one:
    flat        R <= FLAT_SHARE * scale, with scale the root mean square of the token's active output latents
    linear      a straight line fits every point within TOLERANCE * R
    jump_relu   exactly 0 on one end of the grid (the output is negative, or has left the top k), and on all the rest a
                straight line fits within TOLERANCE * R
    other       anything else
As the output is active in the middle of the grid, "all the rest" is at least half of it: no line is fitted to a few
points. The published work used an absolute tolerance, which every function that is flat enough meets; so flat ones are
told first, and apart.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.fidelity.points import Pairs, Points
from jsae_lightning.fidelity.scalar_functions import values_at
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.metrics import Sums, ratio
from jsae_lightning.sae import SAEPair

CLASSES = ("linear", "jump_relu", "flat", "other")
"""In the order of their numbers."""

GRID_POINTS = 33
FLAT_SHARE = 0.01
TOLERANCE = 0.05


def grid(pairs: Pairs) -> Float[Tensor, "pairs points"]:
    """Return the values of s_j: GRID_POINTS from 0 to 2 s_j."""
    steps = torch.linspace(0, 2, GRID_POINTS, dtype=pairs.s_in.dtype, device=pairs.s_in.device)
    return pairs.s_in[:, None] * steps


def scalar_functions(
    pair: SAEPair, mlp: FrozenMLP, points: Points, pairs: Pairs
) -> tuple[Float[Tensor, "pairs points"], Float[Tensor, "pairs points"]]:
    """Return the grid of s_j and f_s,i on it."""
    moved = grid(pairs)
    return moved, values_at(pair, mlp, points, pairs, moved)


def classify(values: Float[Tensor, "pairs points"], scale: Float[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """Return each function's class as its number in CLASSES; `values` are on an evenly spaced grid."""
    values = values.double()
    span = values.amax(dim=1) - values.amin(dim=1)
    flat = span <= FLAT_SHARE * scale.double()
    everywhere = torch.ones_like(values, dtype=torch.bool)
    linear = _line_error(values, everywhere) <= TOLERANCE * span
    off = values == 0
    one_switch = (off[:, 1:] != off[:, :-1]).sum(dim=1) == 1
    jump = one_switch & (_line_error(values, ~off) <= TOLERANCE * span)
    classes = torch.full_like(span, CLASSES.index("other"), dtype=torch.int64)
    for name, where in (("jump_relu", jump), ("linear", linear), ("flat", flat)):  # the last one wins
        classes[where] = CLASSES.index(name)
    return classes


def class_terms(classes: Int[Tensor, " pairs"]) -> Sums:
    """Return, for each of CLASSES, 1 (float64) where a pair is in it."""
    return {name: (classes == number).double() for number, name in enumerate(CLASSES)}


def class_figures(sums: Sums) -> dict[str, float]:
    """Turn the totals of `class_terms` into shares.

    `flat_share` is of all functions. `linear_share`, `jump_relu_share` and `other_share` are of those that are not
    flat, and add up to 1: a pair cannot become more linear by doing nothing. NaN without such functions.
    """
    counts = {name: sums[name].item() for name in CLASSES}
    total = sum(counts.values())
    shares = {f"{name}_share": ratio(counts[name], total - counts["flat"]) for name in ("linear", "jump_relu", "other")}
    return shares | {"flat_share": ratio(counts["flat"], total)}


def _line_error(values: Float[Tensor, "pairs points"], used: Bool[Tensor, "pairs points"]) -> Float[Tensor, " pairs"]:
    """Return the largest distance of the used points from their least-squares line; 0 if none is used."""
    weight = used.double()
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    x = torch.linspace(-1, 1, values.shape[1], dtype=torch.float64, device=values.device).expand_as(values)
    x = (x - (weight * x).sum(dim=1, keepdim=True) / count) * weight
    y = (values - (weight * values).sum(dim=1, keepdim=True) / count) * weight
    variation = x.square().sum(dim=1, keepdim=True)
    slope = (x * y).sum(dim=1, keepdim=True) / variation.masked_fill(variation == 0, 1.0)
    return (y - slope * x).abs().amax(dim=1)
