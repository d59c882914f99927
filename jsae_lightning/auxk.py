"""AuxK: an auxiliary loss that gives dead latents a gradient (Gao et al. 2024, appendix A.2)."""

from jaxtyping import Bool, Float
from torch import Tensor

from jsae_lightning import kernels
from jsae_lightning.sae import TopKSAE


def auxk_loss(
    sae: TopKSAE,
    x: Float[Tensor, "tokens d_model"],
    x_hat: Float[Tensor, "tokens d_model"],
    dead: Bool[Tensor, " d_sae"],
    k: int,
) -> Float[Tensor, ""]:
    """Return how badly the k strongest dead latents of each token explain what the SAE leaves over.

    e = x - x_hat, detached;  e_hat = relu(topk_k(z restricted to dead latents)) W_dec, without b_dec, which x_hat
    has used already;  loss = mean (e - e_hat)^2 over tokens and d_model, the unit of the main loss. Zero if no latent
    is dead. With fewer than k dead latents all of them are used.
    """
    dead_indices = dead.nonzero()[:, 0]
    if dead_indices.numel() == 0:
        return x.new_zeros(())
    residual = (x - x_hat).detach()
    encoder_input = x - sae.b_dec if sae.subtract_b_dec else x
    values, chosen = kernels.topk_encode(
        encoder_input, sae.W_enc[:, dead_indices], sae.b_enc[dead_indices], min(k, dead_indices.numel())
    )
    residual_hat = kernels.sparse_decode(values, chosen, sae.W_dec[dead_indices])
    return (residual - residual_hat).square().mean()
