"""What a pair is judged on: the pair, its MLP, the language model around them, held-out tokens and their documents."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.sae import SAEPair
from jsae_lightning.splicing import Spliceable


@dataclass(frozen=True)
class HeldOut:
    """The common input of every part of an evaluation; the same on every rank."""

    pair: SAEPair
    mlp: FrozenMLP
    language_model: Spliceable
    tokens: Int[Tensor, "sequences seq"]
    """Token ids, int64, on the CPU."""
    included: Bool[Tensor, "sequences seq"]
    """The positions that count and that are spliced; see `evaluation`."""
    document: Int[Tensor, "sequences seq"]
    """The document that each position belongs to, int64, 0, 1, 2, ...; never falling in reading order."""
    at: str
    """The trained setting of `jacobian.at`, `input` or `reconstruction`."""
    batch_sequences: int
    """Sequences of one forward pass of the language model, which bounds the memory for logits."""
    seed: int = 0
    """Of every random choice that a part makes (pairs of latents, rankings at random)."""
    tokenizer: Any = None
    """Turns token ids into text; None only for pre-tokenised data and a model folder without a tokenizer."""

    @property
    def num_documents(self) -> int:
        """How many documents the tokens come from."""
        return int(self.document.max()) + 1
