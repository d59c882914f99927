"""f_s with one input latent moved: the truth that J is compared with, for many pairs at once.

    f_s,i(s_j = v)  =  relu(z_i) if z_i is among the k largest of z, else 0,      z = W_enc_y f(x + (v - s_j) d_j) + b

d_j is latent j's decoder row and x the token's linearisation point: the same function as `jacobians.latent_map` with
all but one latent held at their values, without its dense latents. The set of input latents stays the token's own.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jsae_lightning.fidelity.points import Pairs, Points
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.sae import SAEPair
from jsae_lightning.splicing import MAX_ELEMENTS


def values_at(
    pair: SAEPair, mlp: FrozenMLP, points: Points, pairs: Pairs, moved: Float[Tensor, "pairs points"]
) -> Float[Tensor, "pairs points"]:
    """Return f_s,i with s_j set to each of `moved`, in the pair's precision; memory is bounded.

    An output latent that leaves the top k, or whose pre-activation is below 0, is 0. (Latents that tie exactly for the
    k-th place all count as chosen.)
    """
    per_evaluation = max(mlp.d_mlp, pair.output_sae.d_sae)
    size = max(1, MAX_ELEMENTS // (8 * per_evaluation * max(1, moved.shape[1])))
    parts = [
        _values_of_some(pair, mlp, points, pairs, moved, rows)
        for rows in torch.arange(len(moved), device=moved.device).split(size)
    ]
    return torch.cat([moved[:0], *parts])


def survived(values: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Return where an output latent is still active: among the k largest and above 0."""
    return values > 0


def _values_of_some(
    pair: SAEPair, mlp: FrozenMLP, points: Points, pairs: Pairs, moved: Tensor, rows: Tensor
) -> Float[Tensor, "rows points"]:
    shift = moved[rows] - pairs.s_in[rows, None]
    direction = pair.input_sae.W_dec[pairs.input[rows]]
    x = points.x[pairs.token[rows]][:, None] + shift[:, :, None] * direction[:, None]
    sae = pair.output_sae
    mlp_out = mlp(x.flatten(0, 1))
    pre_activations = torch.addmm(sae.b_enc, mlp_out - sae.b_dec if sae.subtract_b_dec else mlp_out, sae.W_enc)
    latent = pairs.output[rows].repeat_interleave(moved.shape[1])
    own = pre_activations.gather(1, latent[:, None])
    chosen = (pre_activations > own).sum(dim=1, dtype=torch.int32) < sae.k
    return torch.where(chosen, own[:, 0].relu(), 0.0).view_as(shift)
