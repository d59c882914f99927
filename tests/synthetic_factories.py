"""Small synthetic models, and pairs whose dictionaries are the true ones."""

from typing import Any

import torch

from jsae_lightning.sae import SAEPair
from jsae_lightning.synthetic.computation import SyntheticComputation, readouts


def spec_values(**changes: Any) -> dict[str, Any]:
    """Every key of `model.synthetic`, small sizes."""
    return {
        "seed": 0,
        "d_model": 20,
        "n_in": 16,
        "n_out": 8,
        "group_size": 2,
        "inputs_per_output": 2,
        "active_groups": 2,
        "activation": "relu",
        "threshold_low": 0.7,
        "threshold_high": 1.1,
        "weight_low": 0.7,
        "weight_high": 1.3,
        "negative_share": 0.0,
        "magnitude_low": 0.5,
        "magnitude_high": 1.5,
        "vocab_size": 32,
        "document_length": 24,
        "num_documents": 64,
        "readout_scale": 1.0,
    } | changes


def true_pair(
    computation: SyntheticComputation, *, k: int, k_output: int | None = None, extra: int = 0, bias: float = 0.0
) -> SAEPair:
    """A float64 pair whose latents are the true features, in their order, and `extra` dead latents after them.

    `bias` is the encoders' threshold: latents below it are off, which rounding would otherwise turn on.
    """
    n_out, n_in = computation.weights.shape
    pair = SAEPair(
        computation.directions_in.shape[1], n_in + extra, k, d_sae_output=n_out + extra, k_output=k_output or n_out
    ).double()
    with torch.no_grad():
        for (_, sae), directions in zip(
            pair.named_saes(), (computation.directions_in, computation.directions_out), strict=True
        ):
            n = len(directions)
            sae.W_dec[:n], sae.W_enc[:, :n] = directions, readouts(directions).T
            sae.W_enc[:, n:], sae.b_enc[:n], sae.b_enc[n:] = 0.0, -bias, -1.0
    return pair
