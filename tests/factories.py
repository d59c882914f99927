"""Small random objects that several test modules build."""

import torch

from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.sae import SAEPair

MLP_KINDS = ["gelu", "gelu_tanh", "relu", "relu2", "silu", "gated_silu", "gated_gelu_tanh", "gelu_no_bias"]


def make_mlp(kind: str = "gelu", d_model: int = 10, d_mlp: int = 24, seed: int = 0) -> FrozenMLP:
    """A float64 MLP of a kind named after its activation, `gated_` before it, `_no_bias` behind it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[0] ** 0.5

    gated, biased = kind.startswith("gated_"), not kind.endswith("_no_bias")
    mlp = FrozenMLP(
        draw(d_model, d_mlp),
        draw(d_mlp, d_model),
        activation=kind.removeprefix("gated_").removesuffix("_no_bias"),
        b_in=draw(d_mlp) if biased else None,
        b_out=draw(d_model) if biased else None,
        W_gate=draw(d_model, d_mlp) if gated else None,
        b_gate=draw(d_mlp) if gated and biased else None,
    )
    return mlp.double()


def make_pair(d_model: int = 10, d_sae: int = 32, k: int = 5, seed: int = 0, **kwargs: int | bool) -> SAEPair:
    """A float64 pair with random biases and an encoder that is not the decoder's transpose."""
    generator = torch.Generator().manual_seed(seed)
    pair = SAEPair(d_model, d_sae, k, generator=generator, **kwargs).double()
    with torch.no_grad():
        for _, sae in pair.named_saes():
            for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pair


def make_x(tokens: int = 7, d_model: int = 10, seed: int = 1) -> torch.Tensor:
    """Float64 MLP inputs."""
    return torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
