"""Re-initialised language models: the controls that tell learned structure from the architecture's own."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from jsae_lightning.seeding import seeded_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALE = 0.8


@torch.no_grad()
def redraw_matrices(model: nn.Module, *, d_model: int, seed: int) -> None:
    """Redraw every weight matrix of `model` in place; keep its biases and norm vectors.

        W ~ N(0, (0.8 / sqrt(d_model))^2)          for parameters of two dimensions or more, embeddings included

    The paper's "randomised LLM" of Farnik et al. (arXiv 2502.18147). Drawn in float32 on the CPU from a generator
    of its own, so that the result depends neither on the device nor on the global random state, and is unrelated to
    what an SAE of the same seed begins with; tied parameters are drawn once.
    """
    generator = seeded_generator("random weights", seed)
    for parameter in model.parameters():  # yields tied parameters once
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(noise * (_SCALE / d_model**0.5))


def fresh_model(config: Any, *, seed: int, dtype: torch.dtype) -> "PreTrainedModel":
    """Return a causal language model initialised from its transformers `config`, as before any training.

    Reproducible under `seed` on the CPU; the global random state is left as it was found.
    """
    from transformers import AutoModelForCausalLM

    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    finally:
        torch.set_rng_state(state)
