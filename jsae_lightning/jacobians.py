"""The Jacobian between the active latents of the two SAEs of a pair, in closed form.

    f_s = e_y . f . d_x . topk_k                    the MLP as a map from input latents to output latents
    J[i, j] = d f_s,i / d s_x,j                     non-zero for active i and j only: at most k_out x k_in a token

With slopes `sum_t weight_t diag(slope_t) W_out` for the MLP's own derivative (one term for a plain MLP, two for a gated
one; see `FrozenMLP.forward_with_slopes`),

    J = W_enc_y[active]^T W_out^T  [sum_t diag(slope_t) weight_t^T]  W_dec_x[active]^T      (Farnik et al., section 4.2)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning import kernels
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP, Slopes
from jsae_lightning.penalties import Penalty
from jsae_lightning.sae import Latents, SAEPair, TopKSAE

JacobianAt = Literal["input", "reconstruction"]
JACOBIAN_AT: tuple[str, ...] = get_args(JacobianAt)
PENALIZED_EDGES = ("jacobian", "contribution")


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of a batch of tokens, restricted to the latents that TopK chose."""

    values: Float[Tensor, "tokens k_out k_in"]
    """d f_s,i / d s_x,j; exactly 0 where either latent is inactive."""
    indices_out: Int[Tensor, "tokens k_out"]
    indices_in: Int[Tensor, "tokens k_in"]
    active_out: Bool[Tensor, "tokens k_out"]
    """False where TopK chose a latent whose value the ReLU set to 0."""
    active_in: Bool[Tensor, "tokens k_in"]
    activations_in: Float[Tensor, "tokens k_in"]
    """s_x,j of the input latents, detached; 0 where inactive."""

    @property
    def contributions(self) -> Float[Tensor, "tokens k_out k_in"]:
        """J_ij s_j: what each edge carries to the first order."""
        return self.values * self.activations_in[:, None, :].to(self.values.dtype)

    @property
    def active(self) -> Bool[Tensor, "tokens k_out k_in"]:
        """Mask of the entries whose two latents are both active."""
        return self.active_out[:, :, None] & self.active_in[:, None, :]


EdgePenalty = Callable[[Jacobian], Float[Tensor, ""]]


def edge_penalty(penalty: Penalty, edges: str) -> EdgePenalty:
    """Return `penalty` as a function of a Jacobian: of J (`edges="jacobian"`) or of J_ij s_j (`contribution`).

    Raises UserError for any other `edges`.
    """
    if edges not in PENALIZED_EDGES:
        raise UserError(f"jacobian.edges: '{edges}' is not known: choose one of {', '.join(PENALIZED_EDGES)}")
    return lambda result: penalty(result.contributions if edges == "contribution" else result.values)


def jacobian(pair: SAEPair, mlp: FrozenMLP, mlp_in: Float[Tensor, "tokens d_model"], at: str = "input") -> Jacobian:
    """Return the Jacobian for each token.

    `at="input"` linearises the MLP at the true x and takes the output latents of the true y = f(x), as the published
    training does; `at="reconstruction"` is the formal definition: everything at x_hat, output latents of f(x_hat).
    Gradients reach W_dec of the input SAE and W_enc of the output SAE, and at `reconstruction` also what x_hat
    depends on. Raises UserError for any other `at`, and for `mlp_in` of another shape.
    """
    if mlp_in.ndim != 2 or mlp_in.shape[1] != pair.d_model:
        raise UserError(
            f"mlp_in: has shape {list(mlp_in.shape)}, not (tokens, {pair.d_model}): flatten (batch, seq, d_model) by "
            ".flatten(0, 1)"
        )
    latents_in = pair.input_sae.encode(mlp_in)
    point = linearization_point(pair, mlp_in, latents_in, at)
    mlp_out, slopes = mlp.forward_with_slopes(point)
    return jacobian_from_latents(pair, mlp, slopes, latents_in, pair.output_sae.encode(mlp_out))


def linearization_point(
    pair: SAEPair, mlp_in: Float[Tensor, "tokens d_model"], latents_in: Latents, at: str
) -> Float[Tensor, "tokens d_model"]:
    """Return x for `at="input"`, x_hat for `at="reconstruction"`; raise UserError otherwise."""
    if at not in JACOBIAN_AT:
        raise UserError(f"jacobian.at: '{at}' is not known: choose one of {', '.join(JACOBIAN_AT)}")
    return mlp_in if at == "input" else pair.input_sae.decode(latents_in)


def jacobian_from_latents(
    pair: SAEPair, mlp: FrozenMLP, slopes: Slopes, latents_in: Latents, latents_out: Latents
) -> Jacobian:
    """Return the Jacobian from parts that the caller has at hand.

    `slopes` are those of `mlp.forward_with_slopes`; the latents decide the rows and columns.
    """
    values = kernels.jacobian_values(
        pair.output_sae.W_enc.T, pair.input_sae.W_dec, mlp.W_out, slopes, latents_out.indices, latents_in.indices
    )
    active = latents_out.active[:, :, None] & latents_in.active[:, None, :]
    return Jacobian(
        values=torch.where(active, values, 0.0),
        indices_out=latents_out.indices,
        indices_in=latents_in.indices,
        active_out=latents_out.active,
        active_in=latents_in.active,
        activations_in=latents_in.values.detach(),
    )


def jacobian_of_latents(
    pair: SAEPair,
    mlp: FrozenMLP,
    mlp_in: Float[Tensor, "tokens d_model"],
    latents_in: Latents,
    latents_out: Latents,
    *,
    at: str,
) -> Jacobian:
    """Return `jacobian(pair, mlp, mlp_in, at)` where the latents are at hand, in their own order.

    To encode a part of the tokens again may swap latents that are as good as equal: rounding depends on the number of
    tokens.
    """  # fmt: skip
    _, slopes = mlp.forward_with_slopes(linearization_point(pair, mlp_in, latents_in, at))
    return jacobian_from_latents(pair, mlp, slopes, latents_in, latents_out)


def latent_map(
    pair: SAEPair, mlp: FrozenMLP, mlp_in: Float[Tensor, " d_model"], at: str
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, " d_sae"]]:
    """Return f_s for one token as a function of the dense input latents, and the point s_x at which to differentiate.

    At `reconstruction` it is e_y(f(d_x(s))); at `input` e_y(f(x + d_x(s) - d_x(s_x))), whose value at s_x is the
    true output latents. Plain dense torch, independent of the closed form: for `torch.func.jacrev` and for studies
    of how linear f_s is.
    """
    point = _dense_topk(pair.input_sae, mlp_in)
    chosen = (point > 0).to(point.dtype)  # the topk_k of f_s: no derivative with respect to the other latents
    decoder = pair.input_sae
    offset = mlp_in - point @ decoder.W_dec if at == "input" else decoder.b_dec

    def output_latents(latents: Tensor) -> Tensor:
        return _dense_topk(pair.output_sae, mlp((latents * chosen @ decoder.W_dec + offset)[None])[0])

    return output_latents, point


def _dense_topk(sae: TopKSAE, x: Tensor) -> Tensor:
    pre_activations = (x - sae.b_dec if sae.subtract_b_dec else x) @ sae.W_enc + sae.b_enc
    chosen = pre_activations.topk(sae.k).indices
    mask = torch.zeros_like(pre_activations).index_fill(-1, chosen, 1.0)
    return pre_activations.relu() * mask


def jacobian_reference(
    pair: SAEPair, mlp: FrozenMLP, mlp_in: Float[Tensor, " d_model"], at: str = "input"
) -> Float[Tensor, "d_sae_out d_sae_in"]:
    """Return one token's whole Jacobian by automatic differentiation of f_s: the check on the closed form."""
    function, point = latent_map(pair, mlp, mlp_in, at)
    return torch.func.jacrev(function)(point)
