"""Changes of an SAE's parameters that leave its latents and reconstructions as they are, but for rounding."""

import torch
from torch import Tensor

from jsae_lightning.sae import TopKSAE


@torch.no_grad()
def parameters(sae: TopKSAE, *, subtracts_b_dec: bool) -> dict[str, Tensor]:
    """Return W_enc, b_enc, W_dec and b_dec for an encoder that subtracts b_dec from its input, or does not.

        (x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc)

    Where that changes b_enc it is computed in float64, and half-precision SAEs become float32: a rounded sum would
    choose other latents.
    """
    found = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    if sae.subtract_b_dec == subtracts_b_dec:
        return found
    shift = sae.b_dec.double() @ sae.W_enc.double()
    dtype = torch.promote_types(sae.W_enc.dtype, torch.float32)
    found["b_enc"] = sae.b_enc.double() + (shift if subtracts_b_dec else -shift)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


@torch.no_grad()
def with_unit_rows(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameters of the SAE whose TopK chooses among z_j |w_j|: the rows' norms go into the encoder.

    W_enc[:, j] |w_j|,  b_enc[j] |w_j|,  w_j / |w_j|.  A row of zeros stays one, and its latent is never active.
    """
    norms = W_dec.double().norm(dim=1)
    unit = W_dec.double() / norms.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return (W_enc * norms).to(W_enc.dtype), (b_enc * norms).to(b_enc.dtype), unit.to(W_dec.dtype)


def with_input_scale(W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return W_enc, W_dec and b_dec of an SAE on x from those of one on `scale` x, whose output is divided by it."""
    return W_enc * scale, W_dec / scale, b_dec / scale
