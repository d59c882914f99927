"""A small held-out set on the language model that can be computed by hand."""

import torch

from factories import make_pair
from fake_language_model import FakeLanguageModel, make_tokens
from jsae_lightning.held_out import HeldOut


def make_held_out(sequences: int = 5, seq: int = 9, **changes) -> HeldOut:
    """Five short sequences of two documents; a pair of 32 input and 24 output latents, k = 5 and 4, float64."""
    tokens, included = make_tokens(sequences, seq)
    model = FakeLanguageModel()
    document = (torch.arange(sequences) >= sequences // 2).long()[:, None].expand(sequences, seq).contiguous()
    fields = {
        "pair": make_pair(d_sae_output=24, k_output=4),
        "mlp": model.mlp,
        "language_model": model,
        "tokens": tokens,
        "included": included,
        "document": document,
        "at": "input",
        "batch_sequences": 2,
    }
    return HeldOut(**fields | changes)
