"""SAELens, from version 6 on (and TopK SAEs of earlier ones, to read): one SAE a folder.

    z = (x [- b_dec]) W_enc + b_enc,  times the norms of W_dec's rows with `rescale_acts_by_decoder_norm`

The name of the activations is a trap: `blocks.L.ln2.hook_normalized` is an MLP's input in TransformerLens 2, and lies
before the norm's gain in the 3.9 that SAELens loads today. What is written here names transformers' own modules
(`model_class_name` AutoModelForCausalLM), whose outputs are the same everywhere.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.conversion.folding import with_input_scale, with_unit_rows
from jsae_lightning.conversion.reading import (
    NOTES,
    Foreign,
    check_tensors,
    demand,
    flag,
    layer_of,
    make_sae,
    norm_remarks,
    optional,
    own_notes,
    read_json,
    read_safetensors,
    told,
    whole_number,
)
from jsae_lightning.conversion.writing import Origin, file_tensors, notes, write_files
from jsae_lightning.errors import UserError
from jsae_lightning.sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCALE = "activation_scaler.json"
FORMAT_VERSION = "6.0.0"
"""The version of SAELens whose format is written: files without one are taken for older than 6."""


def read(folder: Path) -> Foreign:
    """Read one TopK SAE. Raises UserError for other architectures, missing, misshapen or non-finite tensors."""
    path, config = folder / CONFIG, read_json(folder / CONFIG)
    d_model, d_sae = whole_number(path, config, "d_in"), whole_number(path, config, "d_sae")
    k = _number_of_active(path, config)
    demand(path, config, "reshape_activations", "none", ("none",), "SAEs of attention heads are unknown here")
    tensors = read_safetensors(folder / WEIGHTS)
    shapes = {"W_enc": (d_model, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    check_tensors(folder / WEIGHTS, tensors, shapes, ignored=["scaling_factor"])
    _check_finetuning(folder / WEIGHTS, tensors)
    W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in shapes)
    if (scale := _input_scale(folder, config)) is not None:
        W_enc, W_dec, b_dec = with_input_scale(W_enc, W_dec, b_dec, scale)
    if flag(path, config, "rescale_acts_by_decoder_norm", False):
        W_enc, b_enc, W_dec = with_unit_rows(W_enc, b_enc, W_dec)
    subtracts = flag(path, config, "apply_b_dec_to_input", True)
    sae = make_sae(folder / WEIGHTS, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k, subtract_b_dec=subtracts)
    about = _about(path, config)
    return Foreign((sae,), about, remarks=(*norm_remarks(sae, str(folder)), *_site_remarks(about, folder)))


def write(sae: TopKSAE, folder: Path, side: str, origin: Origin) -> None:
    """Write one SAE of a pair."""
    from safetensors.torch import save_file

    tensors = file_tensors(dict(sae.named_parameters()))
    write_files(folder, (CONFIG, _config(sae, side, origin)), lambda path: save_file(tensors, path), WEIGHTS)


def _config(sae: TopKSAE, side: str, origin: Origin) -> dict[str, Any]:
    loading = {key: origin.model[key] for key in ("revision", "dtype") if origin.model.get(key) is not None}
    return {
        "architecture": "topk",
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "model_name": origin.model.get("name"),
            "model_class_name": "AutoModelForCausalLM",
            "model_from_pretrained_kwargs": loading,
            "hook_name": origin.hook_name(side),
            "hook_head_index": None,
            "prepend_bos": origin.prepends_bos,
            "context_size": origin.data.get("context_length") or origin.context_length,
            "dataset_path": origin.data.get("path") or origin.data.get("name"),
            "neuronpedia_id": None,
            NOTES: notes(side, origin),
        },
    }


def _number_of_active(path: Path, config: dict[str, Any]) -> int:
    """Return k; UserError for what is no TopK. Before version 6 it stood among the activation function's arguments."""
    activation = config.get("activation_fn_str", config.get("activation_fn"))
    architecture = config.get("architecture", "standard")
    if architecture == "topk" or (architecture == "standard" and activation == "topk"):
        arguments = optional(path, config, "activation_fn_kwargs", dict) or {}
        if "k" not in arguments:
            return whole_number(path, config, "k")
        k = whole_number(path, arguments, "k", "activation_fn_kwargs.")
        demand(path, config, "k", k, (k,), f"activation_fn_kwargs.k is {k}: which of them was trained?")
        return k
    named = f"{architecture} with {activation}" if architecture == "standard" and activation else architecture
    raise UserError(f"{path}: architecture is {named}: only TopK SAEs are supported")


def _about(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return what the configuration tells; before version 6 metadata stood among the other keys."""
    metadata = {**config, **(optional(path, config, "metadata", dict) or {})}
    loading = optional(path, metadata, "model_from_pretrained_kwargs", dict) or {}
    hook_name = metadata.get("hook_name") or metadata.get("hook_point")
    facts = told(
        model_name=optional(path, metadata, "model_name", str),
        hook_name=hook_name,
        layer=layer_of(hook_name),
        revision=optional(path, loading, "revision", str, where="model_from_pretrained_kwargs."),
        **{key: metadata.get(key) for key in ("model_class_name", "context_size", "prepend_bos", "dataset_path")},
    )
    return {"format": "saelens", **facts, **own_notes(path, metadata)}


def _input_scale(folder: Path, config: dict[str, Any]) -> float | None:
    """Return what the SAE's input is multiplied by; None: nothing."""
    normalised = config.get("normalize_activations", "none")
    if normalised in ("none", None, False):
        return None
    if normalised == "expected_average_only_in" and (folder / _SCALE).is_file():
        scale = read_json(folder / _SCALE).get("scaling_factor")
        if isinstance(scale, (int, float)) and scale > 0:
            return float(scale)
        raise UserError(f"{folder / _SCALE}: scaling_factor: {scale!r} is no number above 0: copy it again")
    raise UserError(
        f"{folder / CONFIG}: normalize_activations is {normalised!r}, which no linear encoder can do, or whose factor "
        "is not in the folder: fold it into the weights with SAELens first"
    )


def _check_finetuning(path: Path, tensors: dict[str, Tensor]) -> None:
    factor = tensors.get("scaling_factor")
    if factor is not None and not torch.equal(factor, torch.ones_like(factor)):
        raise UserError(f"{path}: tensor scaling_factor is not 1: SAEs with fine-tuned scales are not supported")


def _site_remarks(about: dict[str, Any], folder: Path) -> tuple[str, ...]:
    if not str(about.get("hook_name", "")).endswith("hook_normalized"):
        return ()
    return (
        f"{folder}: was trained at {about['hook_name']}, which is the MLP's input in TransformerLens 2 and lies before "
        "the norm's gain in later ones: look at the explained variance that jsae-eval finds",
    )
