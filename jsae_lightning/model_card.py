"""The README.md of an exported pair, as the Hugging Face hub shows it."""

from typing import Any

from jsae_lightning.exported_pairs import SAES

_EDGES = {"jacobian": "the Jacobian", "contribution": "the Jacobian times the input latents"}


def model_card(config: dict[str, Any]) -> str:
    """Return the text for an export with this `config.json`; what that does not tell is a question mark."""
    return "\n".join(
        [
            "---",
            "library_name: jsae-lightning",
            "tags: [sparse-autoencoder, jacobian-sae, interpretability]",
            "---",
            "# Jacobian SAE pair",
            "",
            _what_it_is(config.get("model") or {}, config.get("jacobian") or {}),
            "",
            "| | d_model | latents | k |",
            "|---|---|---|---|",
            *(_row(name.replace("_sae", " SAE"), config[name]) for name in SAES),
            "",
            _how_it_was_trained(config.get("jacobian") or {}, config.get("tokens_seen", "?")),
            *_conversion(config.get("converted_from")),
            "",
            "```python",
            "from jsae_lightning import SAEPair, load_run",
            "pair = SAEPair.load(FOLDER)           # the two SAEs",
            "run = load_run(FOLDER)                # with the language model's MLP, checked by its hash: run.mlp",
            "run = load_run(FOLDER, model=DIR)     # where that language model is, if not where it was",
            "```",
            "",
        ]
    )


def _row(label: str, sae: dict[str, Any]) -> str:
    return f"| {label} | {sae['d_model']} | {sae['d_sae']} | {sae['k']} |"


def _what_it_is(model: dict[str, Any], jacobian: dict[str, Any]) -> str:
    revision = f", revision `{model['revision']}`" if model.get("revision") else ""
    drawn = " with its weights drawn at random" if model.get("random_weights") else ""
    penalised = "without a penalty" if jacobian.get("coef") == 0 else "with a penalty"
    return (
        f"Two TopK sparse autoencoders on the input and output of the MLP in layer {model.get('layer', '?')} of "
        f"`{model.get('name', 'unknown')}`{revision}{drawn}, trained {penalised} on the Jacobian between their latents."
    )


def _how_it_was_trained(jacobian: dict[str, Any], tokens: Any) -> str:
    penalty, coef, at = (jacobian.get(key, "?") for key in ("penalty", "coef", "at"))
    edges = _EDGES.get(jacobian.get("edges", "jacobian"), "?")
    fraction = jacobian.get("token_fraction", 1)
    part = "" if fraction == 1 else f", on a part of {fraction} of the tokens"
    return f"Penalty: {penalty} of {edges}, weight {coef}, at the {at}{part}; trained on {tokens} tokens."


def _conversion(sources: Any) -> list[str]:
    if not sources:
        return []
    formats = " and ".join(dict.fromkeys(str(source.get("format")) for source in sources))
    untold = "" if any(source.get("jacobian") for source in sources) else ", which does not tell of any penalty"
    return ["", f"Converted from the format {formats}{untold}."]
