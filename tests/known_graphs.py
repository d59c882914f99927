"""Pairs and MLPs whose graph is known: orthonormal dictionaries, one hidden unit for each edge."""

import torch

from fake_language_model import FakeLanguageModel
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.held_out import HeldOut
from jsae_lightning.sae import SAEPair


def identity_pair(d_model: int = 8, k: int = 3, k_output: int | None = None) -> SAEPair:
    """Latent j of both SAEs is coordinate j: s = relu of the k largest coordinates, decoder rows are unit vectors."""
    pair = SAEPair(d_model, d_model, k, k_output=k_output).double()
    with torch.no_grad():
        for _, sae in pair.named_saes():
            sae.W_dec.copy_(torch.eye(d_model))
            sae.W_enc.copy_(torch.eye(d_model))
    return pair


def graph_mlp(edges: torch.Tensor, activation: str = "relu", b_in: float = 0.0) -> FrozenMLP:
    """y_i = sum_j edges[i, j] act(x_j + b_in): one hidden unit for each input, J_ij = edges[i, j] act'(x_j + b_in)."""
    d_model = len(edges)
    mlp = FrozenMLP(
        torch.eye(d_model), edges.T.float(), activation=activation, b_in=torch.full((d_model,), b_in)
    ).double()
    mlp.W_out.copy_(edges.T)  # without the rounding to float32
    return mlp


def sparse_inputs(tokens: int = 200, d_model: int = 8, k: int = 3, low: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Non-negative rows with exactly k non-zero entries in [low, low + 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(tokens, d_model, dtype=torch.float64)
    chosen = torch.rand(tokens, d_model, generator=generator).argsort(dim=1)[:, :k]
    return x.scatter_(1, chosen, low + torch.rand(tokens, k, generator=generator, dtype=torch.float64))


class SparseLanguageModel(FakeLanguageModel):
    """mlp_in is a sparse vector of each (sequence's first token, token, position); logits = (mlp_out) U."""

    def __init__(self, mlp: FrozenMLP, k: int = 3, seed: int = 3, low: float = 0.5) -> None:
        super().__init__(d_model=mlp.d_model, seed=seed)
        self.mlp = mlp
        self.table = sparse_inputs(997, mlp.d_model, k, low=low, seed=seed)

    def mlp_in(self, tokens: torch.Tensor) -> torch.Tensor:
        position = torch.arange(tokens.shape[1])
        return self.table[(tokens.cumsum(dim=1) * 31 + tokens * 7 + position * 101) % len(self.table)]

    def residual(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, self.mlp.d_model, dtype=torch.float64)


def held_out(pair, model, *, at: str = "input", sequences: int = 12, seq: int = 20, seed: int = 0) -> HeldOut:
    """Random token ids; the first position of each sequence is excluded, and each sequence is a document."""
    generator = torch.Generator().manual_seed(17)
    tokens = torch.randint(13, (sequences, seq), generator=generator)
    included = torch.ones_like(tokens, dtype=torch.bool)
    included[:, 0] = False
    document = torch.arange(sequences)[:, None].expand(sequences, seq).contiguous()
    return HeldOut(pair, model.mlp, model, tokens, included, document, at, batch_sequences=4, seed=seed)
