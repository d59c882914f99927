"""A language model small enough to compute by hand: one causal mixing layer, one MLP, float64."""

import torch
from torch import Tensor

from factories import make_mlp

VOCAB = 13


class FakeLanguageModel:
    """h_t = E[token_t] + mean of E[tokens up to t]; mlp_in = 0.5 h; logits = (h + mlp(mlp_in)) U."""

    def __init__(self, d_model: int = 10, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mlp = make_mlp(d_model=d_model)
        self.embed = torch.randn(VOCAB, d_model, generator=generator, dtype=torch.float64)
        self.unembed = torch.randn(d_model, VOCAB, generator=generator, dtype=torch.float64)

    def residual(self, tokens: Tensor) -> Tensor:
        embedded = self.embed[tokens]
        positions = torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)[:, None]
        return embedded + embedded.cumsum(dim=1) / positions

    def mlp_in(self, tokens: Tensor) -> Tensor:
        return 0.5 * self.residual(tokens)

    def logits(self, tokens: Tensor, *, replace_mlp_in=None, replace_mlp_out=None) -> Tensor:
        mlp_in = self.mlp_in(tokens)
        if replace_mlp_in is not None:
            mlp_in = replace_mlp_in(mlp_in)
        mlp_out = self.mlp(mlp_in.flatten(0, 1)).view_as(mlp_in)
        if replace_mlp_out is not None:
            mlp_out = replace_mlp_out(mlp_out)
        return (self.residual(tokens) + mlp_out) @ self.unembed


def make_tokens(sequences: int = 5, seq: int = 9, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Random token ids, and a mask that excludes the first position and some others, two at a sequence's end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (sequences, seq), generator=generator)
    included = torch.rand(sequences, seq, generator=generator) < 0.8
    included[:, 0] = False
    included[:, -1] = torch.arange(sequences) % 2 == 0
    return tokens, included
