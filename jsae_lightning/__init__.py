"""Train and judge Jacobian sparse autoencoders on the MLPs of language models.

    from jsae_lightning import FrozenMLP, SAEPair, jacobian, load_run

Names are imported when first used, so that the command line answers before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsae_lightning.checkpoint import load_run
    from jsae_lightning.frozen_mlp import FrozenMLP
    from jsae_lightning.jacobians import Jacobian, jacobian
    from jsae_lightning.language_model import LanguageModel, load_tokenizer
    from jsae_lightning.sae import Latents, SAEPair, TopKSAE

__version__ = "0.1.0"

_HOMES = {
    "FrozenMLP": "frozen_mlp",
    "LanguageModel": "language_model",
    "load_tokenizer": "language_model",
    "Jacobian": "jacobians",
    "Latents": "sae",
    "SAEPair": "sae",
    "TopKSAE": "sae",
    "jacobian": "jacobians",
    "load_run": "checkpoint",
}
__all__ = [
    "FrozenMLP",
    "Jacobian",
    "LanguageModel",
    "Latents",
    "SAEPair",
    "TopKSAE",
    "jacobian",
    "load_run",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jsae_lightning' has no attribute '{name}'")
    value = getattr(import_module(f"jsae_lightning.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
