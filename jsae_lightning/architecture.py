"""A language model's sizes, read from its configuration before anything heavy is imported or loaded."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsae_lightning.errors import UserError
from jsae_lightning.model_files import first_line, model_folder
from jsae_lightning.synthetic import NAME as SYNTHETIC
from jsae_lightning.synthetic.spec import SyntheticSpec, make_spec

# transformers' names of one quantity, by age and taste of the architecture.
_CONFIG_KEYS = {
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"),
    "vocab_size": ("vocab_size",),
}
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Architecture:
    """What training has to know of a language model before its weights are loaded."""

    d_model: int
    num_layers: int
    context_length: int
    """Longest sequence, in tokens, that the model was made for."""
    vocab_size: int
    """Rows of the embedding: every token id lies below it."""
    model_type: str
    """transformers' name of the architecture, such as "gpt_neox"."""


def read_architecture(
    name_or_path: str, *, revision: str | None = None, synthetic: Mapping[str, Any] | None = None
) -> Architecture:
    """Read a model's sizes from its `config.json` alone; no weights, and for a local folder no network.

    With `synthetic` (the keys of `model.synthetic`) the sizes are those of the model that they describe.
    Raises UserError for a missing folder or file, a failure of the hub, an unknown architecture, a model that is not a
    causal language model, and mixtures of experts.
    """
    if synthetic is not None:
        return synthetic_architecture(make_spec(synthetic))
    file = model_folder(name_or_path, revision=revision) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {file} is not readable JSON ({error}): copy it again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f"model: {file} has no model_type: give a model in the format of transformers")
    heads = [head for head in raw.get("architectures") or [] if "For" in head or "Head" in head]
    if heads and not heads[0].endswith(_CAUSAL_HEADS) or raw.get("is_encoder_decoder"):
        found = heads[0] if heads else raw["model_type"]
        raise UserError(f"model: {name_or_path} is a {found}, not a causal language model: choose another one")
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    experts = next((key for key in _EXPERT_KEYS if isinstance(text.get(key), int) and text[key] > 1), None)
    if experts is not None:
        raise UserError(
            f"model: {name_or_path} is a mixture of experts ({experts} is {text[experts]}), which is not supported: "
            "choose a model with dense MLPs"
        )
    sizes = {size: _first_int(text.get, keys) for size, keys in _CONFIG_KEYS.items()}
    if None in sizes.values():
        # Left to the architecture's defaults, which only transformers knows.
        config = load_config(file.parent, name_or_path).get_text_config()
        sizes = {size: _first_int(lambda key: getattr(config, key, None), keys) for size, keys in _CONFIG_KEYS.items()}
    for size, value in sizes.items():
        if value is None:
            keys = ", ".join(_CONFIG_KEYS[size])
            raise UserError(f"model: {file} tells no {size} (none of {keys}): choose another model")
    known = {size: value for size, value in sizes.items() if value is not None}
    return Architecture(**known, model_type=raw["model_type"])


def synthetic_architecture(spec: SyntheticSpec) -> Architecture:
    """Return a synthetic model's sizes: one layer, sequences as long as its documents."""
    return Architecture(
        d_model=spec.d_model,
        num_layers=1,
        context_length=spec.document_length,
        vocab_size=spec.vocab_size,
        model_type=SYNTHETIC,
    )


def _first_int(get: Callable[[str], Any], keys: tuple[str, ...]) -> int | None:
    return next((value for value in map(get, keys) if isinstance(value, int)), None)


def check_layer(architecture: Architecture, layer: int) -> None:
    """Raise UserError unless `layer` is one of the model's, counted from 0."""
    if not 0 <= layer < architecture.num_layers:
        raise UserError(
            f"model.layer: {layer} is not a layer of this {architecture.model_type}: "
            f"choose one of 0..{architecture.num_layers - 1}"
        )


def load_config(folder: Path, name: str) -> Any:
    """Return transformers' configuration of the model in `folder`, without running any code of the model's."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"model: transformers has no architecture for {name} ({first_line(error)}): choose another model"
        ) from error
