"""What this package is measured against: SAEs with dense latents, and the Jacobian as its authors describe it.

Written from Farnik et al. (arXiv 2502.18147, sections 3 and 4 and their account of the cost), in plain torch with
plain autograd:

    traditional SAE     latents (tokens, d_sae), dense and mostly zero;  x_hat = latents W_dec + b_dec, a dense product
    Jacobian            A = W_enc_y^T W_out^T, B = W_dec_x W_in     (d_sae, d_mlp) each, over the whole dictionaries
                        J = einsum(A[active], act', B[active]),      two gathered (tokens, k, d_mlp) tensors

Rows are gathered from contiguous (d_sae, d_mlp) matrices, the layout that is kindest to this formulation. Weights, the
MLP and its derivative are those that the package's own losses take, so that both must give the same numbers.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.sae import SAEPair, TopKSAE


def dense_autoencode(
    sae: TopKSAE, x: Float[Tensor, "tokens d_model"]
) -> tuple[Float[Tensor, ""], Int[Tensor, "tokens k"]]:
    """Return the mean squared error of a TopK SAE with dense latents, and which latents were chosen."""
    pre_activations = torch.addmm(sae.b_enc, x, sae.W_enc)
    values, indices = pre_activations.topk(sae.k, dim=1)
    latents = torch.zeros_like(pre_activations).scatter(1, indices, values.relu())
    x_hat = torch.addmm(sae.b_dec, latents, sae.W_dec)
    return (x - x_hat).square().mean(), indices


def traditional_loss(sae: TopKSAE, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
    """One traditional SAE: MSE(x, x_hat)."""
    return dense_autoencode(sae, x)[0]


def traditional_pair_loss(pair: SAEPair, mlp: FrozenMLP, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
    """Two traditional SAEs: MSE(x, x_hat) + MSE(y, y_hat), with the true y = MLP(x)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y = mlp(x)
    return traditional_loss(pair.input_sae, x) + traditional_loss(pair.output_sae, y)


def jsae_loss(pair: SAEPair, mlp: FrozenMLP, x: Float[Tensor, "tokens d_model"], coef: float) -> Float[Tensor, ""]:
    """MSE(x, x_hat) + MSE(y, y_hat) + coef mean |J|; chosen latents that the ReLU zeroes are not masked out of J."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y, slopes = mlp.forward_with_slopes(x)
    mse_in, indices_in = dense_autoencode(pair.input_sae, x)
    mse_out, indices_out = dense_autoencode(pair.output_sae, y)
    rows_out = (pair.output_sae.W_enc.T @ mlp.W_out.T)[indices_out]
    terms = [
        torch.einsum("tim,tm,tjm->tij", rows_out, slope, (pair.input_sae.W_dec @ weight)[indices_in])
        for weight, slope in slopes
    ]
    values = sum(terms[1:], terms[0])
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # bfloat16 under autocast
    return mse_in + mse_out + coef * values.abs().mean()
