"""The language model's share: its forward up to the MLP's input, on random weights made here, without a network."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from jsae_lightning.benchmarking.shapes import ModelSpec, Preset, Shape
from jsae_lightning.language_model import LanguageModel

BATCH_SEQUENCES = 16
"""Sequences of one forward pass, `data.lm_batch_sequences` by default."""


def mismatch(preset: Preset, shape: Shape) -> str | None:
    """Say why the preset's model does not belong to a shape; None if it does."""
    for key in ("d_model", "d_mlp", "gated", "activation"):
        if getattr(shape, key) != getattr(preset.shape, key):
            return f"--{key.replace('_', '-')} is not that of the preset's model"
    return None


class ModelForward:
    """Runs a language model on as many random tokens as a batch has, as filling the activation buffer does.

    Training stops at the layer's MLP, so layers beyond it are not made.
    """

    def __init__(self, spec: ModelSpec, *, tokens: int, dtype: str, device: torch.device, seed: int) -> None:
        """Build the model: `dtype` bf16-mixed makes it bfloat16, as a GPU preset would."""
        self.model = load_model(spec, dtype="bfloat16" if dtype == "bf16-mixed" else "float32", device=device)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.model.architecture.vocab_size, (tokens,), generator=generator).to(device)
        self.batches = batches(ids, spec.context_length)

    def __call__(self) -> None:
        """Compute the MLP's inputs of all tokens."""
        for batch in self.batches:
            self.model.mlp_in(batch)


def batches(ids: Int64[Tensor, " tokens"], context_length: int) -> list[Int64[Tensor, "batch seq"]]:
    """Cut tokens into batches of whole sequences, and one shorter sequence of what is left."""
    whole = len(ids) // context_length * context_length
    parts = list(ids[:whole].view(-1, context_length).split(BATCH_SEQUENCES)) if whole else []
    return parts + ([ids[whole:][None]] if whole < len(ids) else [])


def load_model(spec: ModelSpec, *, dtype: str, device: torch.device) -> LanguageModel:
    """Load the embedded model, or make one from its numbers, without its layers beyond `spec.layer`."""
    if spec.name is not None:
        return LanguageModel.load(spec.name, layer=spec.layer, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        write_config(spec, Path(folder))
        return LanguageModel.load(folder, layer=spec.layer, dtype=dtype, device=device, random_weights="full")


def write_config(spec: ModelSpec, folder: Path) -> None:
    """Write a Hugging Face folder that holds nothing but the model's configuration."""
    from transformers import AutoConfig

    arguments: dict[str, Any] = spec.config | {"num_hidden_layers": spec.layer + 1}
    AutoConfig.for_model(**arguments).save_pretrained(folder)
