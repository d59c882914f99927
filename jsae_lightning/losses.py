"""The loss of a pair on a batch of tokens, as pure functions: what training and the benchmark compute.

    mse_input = mean (x - x_hat)^2,   mse_output = mean (y - y_hat)^2,   jacobian_penalty = penalty(J)

Source: Farnik et al., section 3. Means are over tokens and dimensions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jsae_lightning.frozen_mlp import FrozenMLP, Slopes
from jsae_lightning.jacobians import EdgePenalty, jacobian_from_latents, linearization_point
from jsae_lightning.sae import Latents, SAEPair, TopKSAE


class Reconstruction(NamedTuple):
    """One SAE's pass."""

    x: Float[Tensor, "tokens d_model"]
    x_hat: Float[Tensor, "tokens d_model"]
    latents: Latents
    mse: Float[Tensor, ""]


@dataclass(frozen=True)
class PairLosses:
    """A pair's pass over a batch."""

    input: Reconstruction
    output: Reconstruction
    jacobian_penalty: Float[Tensor, ""] | None
    """Without its weight; None if no penalty was asked for."""

    def total(self, coef: float, mse_output_coef: float = 1.0) -> Float[Tensor, ""]:
        """mse_input + mse_output_coef mse_output + coef jacobian_penalty."""
        loss = self.input.mse + mse_output_coef * self.output.mse
        return loss if self.jacobian_penalty is None else loss + coef * self.jacobian_penalty


def reconstruct(sae: TopKSAE, x: Float[Tensor, "tokens d_model"]) -> Reconstruction:
    """Return the SAE's pass over x."""
    x_hat, latents = sae(x)
    return Reconstruction(x, x_hat, latents, (x - x_hat).square().mean())


def pair_losses(
    pair: SAEPair,
    mlp: FrozenMLP,
    mlp_in: Float[Tensor, "tokens d_model"],
    penalty: EdgePenalty | None = None,
    *,
    at: str = "input",
    penalty_gradient: bool = True,
) -> PairLosses:
    """Return the losses of a pair on the MLP's input.

    Args:
        pair: the SAEs; gradients reach their parameters only.
        mlp: the MLP between them, always computed without autocast.
        mlp_in: x; y = mlp(x) is computed here.
        penalty: of the Jacobian; None: it is not computed.
        at: where the MLP is linearised, `input` or `reconstruction`; see `jacobians.jacobian`.
        penalty_gradient: False gives the penalty's value alone, which costs a third.

    Raises:
        UserError: unknown `at`.
    """
    needs_slopes_at_x = penalty is not None and at == "input"
    slopes: Slopes = ()
    with torch.no_grad(), torch.autocast(mlp_in.device.type, enabled=False):
        if needs_slopes_at_x:
            mlp_out, slopes = mlp.forward_with_slopes(mlp_in)
        else:
            mlp_out = mlp(mlp_in)
    first, second = reconstruct(pair.input_sae, mlp_in), reconstruct(pair.output_sae, mlp_out)
    if penalty is None:
        return PairLosses(first, second, None)
    with torch.set_grad_enabled(penalty_gradient and torch.is_grad_enabled()):
        latents_out = second.latents
        if not needs_slopes_at_x:
            point = linearization_point(pair, mlp_in, first.latents, at)
            with torch.autocast(mlp_in.device.type, enabled=False):
                reconstructed_out, slopes = mlp.forward_with_slopes(point)
            latents_out = pair.output_sae.encode(reconstructed_out)
        value = penalty(jacobian_from_latents(pair, mlp, slopes, first.latents, latents_out))
    return PairLosses(first, second, value)
