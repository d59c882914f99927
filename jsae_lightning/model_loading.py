"""A language model's weights and its tokenizer, from its folder, by transformers and without the network."""

from pathlib import Path
from typing import Any

import torch

from jsae_lightning.architecture import load_config
from jsae_lightning.errors import UserError
from jsae_lightning.model_files import check_safetensors, first_line, model_folder

_ROUND_TRIP = "The cat sat on a mat: 12 + 34 = 46."


def load_tokenizer(name_or_path: str, *, revision: str | None = None) -> Any:
    """Return the model's own transformers tokenizer; for a local folder without any network.

    Raises UserError if the folder has no tokenizer files, or if a text does not survive encoding and decoding (which
    is how a folder with the wrong files, or with a placeholder for them, shows).
    """
    folder = model_folder(name_or_path, revision=revision, part="tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model: the tokenizer of {name_or_path} cannot be loaded ({first_line(error)}): copy its files again"
        ) from error
    ids = tokenizer.encode(_ROUND_TRIP, add_special_tokens=False)
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if text.lower().split() != _ROUND_TRIP.lower().split():
        raise UserError(
            f"model: the tokenizer of {name_or_path} turns {_ROUND_TRIP!r} into {text!r}: its files are missing or "
            "damaged, copy them again"
        )
    return tokenizer


def load_weights(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Load the causal language model in `folder`; nothing half-loaded, no code of the model's run.

    Raises UserError for weights that are damaged, incomplete, or that transformers cannot load.
    """
    check_safetensors(folder)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = load_config(folder, name)
    loaded: Any
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # No attn_implementation: transformers takes sdpa, or eager where the architecture refuses it (Gemma-2).
        loaded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"model: transformers cannot load {name} ({first_line(error)}): copy its files again or choose another"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random values in their place.
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model: the weights of {name} lack {len(missing)} tensors, such as {missing[0]}: copy its files again"
        )
    return model
