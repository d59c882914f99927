"""Sparse autoencoders of other projects, read and written.

    format                files of a folder                        holds
    jsae                  config.json, model.safetensors           a pair: `checkpoint.save_pair`
    paper                 cfg.json, sae_weights.safetensors        a pair: the code of Farnik et al. (arXiv 2502.18147)
    saelens               cfg.json, sae_weights.safetensors        one SAE: SAELens
    sparsify              cfg.json, sae.safetensors                one SAE: EleutherAI's sparsify
    dictionary_learning   config.json, ae.pt                       one SAE: dictionary_learning

Each module has `read(folder)` and `write(...)`. Nothing is executed: pickles are read with `weights_only=True`.
"""

from dataclasses import dataclass

FORMATS = ("jsae", "paper", "saelens", "sparsify", "dictionary_learning")


@dataclass(frozen=True)
class ModelChoice:
    """The language model that a pair was trained on, as far as the caller says; None: what the files tell."""

    name: str | None = None
    layer: int | None = None
    revision: str | None = None
    dtype: str | None = None
    is_left_out: bool = False
    """Write the two SAEs alone."""
