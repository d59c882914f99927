"""The published code of Farnik et al. (Jacobian Sparse Autoencoders, arXiv 2502.18147): a pair in one folder.

`_W_enc`, `_b_enc`, `_W_dec`, `_b_dec` are the input SAE's, with the suffix `_out` the output SAE's; often with a copy
of the language model's MLP. One number of latents, one k and one rule for b_dec hold for both SAEs. A missing
`apply_b_dec_to_input` means true there, although its runner sets false, so it is always written.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from jsae_lightning.conversion.folding import parameters
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
from jsae_lightning.conversion.writing import Origin, by_side, file_tensors, notes, write_files
from jsae_lightning.errors import UserError
from jsae_lightning.penalties import PENALTIES
from jsae_lightning.sae import SAEPair, TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SUFFIXES = {"input": "", "output": "_out"}
_MLP = ("W_in", "b_in", "W_out", "b_out")


def is_pair(tensors: set[str]) -> bool:
    """Return whether a file with tensors of these names is of this format and not SAELens'."""
    return "_W_enc_out" in tensors or "_W_enc" in tensors


def read(folder: Path) -> Foreign:
    """Read a pair. Raises UserError for other activations, single SAEs, missing, misshapen or non-finite tensors."""
    path, config = folder / CONFIG, read_json(folder / CONFIG)
    key = "activation_fn_str" if "activation_fn_str" in config else "activation_fn"
    demand(path, config, key, None, ("topk",), "only TopK SAEs are supported")
    demand(path, config, "normalize_activations", "none", ("none", None), "fold it into the weights first")
    arguments = optional(path, config, "activation_fn_kwargs", dict) or {}
    k = whole_number(path, arguments, "k", "activation_fn_kwargs.")
    d_model, d_sae = whole_number(path, config, "d_in"), whole_number(path, config, "d_sae")
    tensors = read_safetensors(folder / WEIGHTS)
    if "_W_enc_out" not in tensors:
        raise UserError(f"{folder / WEIGHTS}: tensor _W_enc_out is missing: it holds one SAE, give a pair")
    shapes = {
        f"_{name}{suffix}": shape
        for suffix in _SUFFIXES.values()
        for name, shape in (
            ("W_enc", (d_model, d_sae)), ("b_enc", (d_sae,)), ("W_dec", (d_sae, d_model)), ("b_dec", (d_model,)),
        )
    }  # fmt: skip
    copies = {name for name in tensors if name.startswith("mlp.")}
    check_tensors(folder / WEIGHTS, tensors, shapes, ignored=copies)
    subtracts = flag(path, config, "apply_b_dec_to_input", True)
    saes = tuple(_sae(folder / WEIGHTS, tensors, suffix, k, subtracts) for suffix in _SUFFIXES.values())
    remarks = [
        remark
        for side, sae in zip(_SUFFIXES, saes, strict=True)
        for remark in norm_remarks(sae, f"{folder}: {side} SAE")
    ]
    mlp = {name: tensors[f"mlp.{name}"] for name in _MLP if f"mlp.{name}" in tensors}
    return Foreign(saes, _about(path, config), mlp, tuple(remarks))


def check_sizes(pair: SAEPair) -> None:
    """Raise UserError where the SAEs differ in size or k."""
    saes = by_side(pair)
    for key in ("d_sae", "k"):
        sizes = {side: getattr(sae, key) for side, sae in saes.items()}
        if sizes["input"] != sizes["output"]:
            raise UserError(
                f"--to paper: {key} is {sizes['input']} for the input SAE and {sizes['output']} for the output SAE, "
                "but that format has one for both: choose another format"
            )


def write(pair: SAEPair, folder: Path, origin: Origin) -> None:
    """Write a pair. Raises UserError where its SAEs differ in size or k."""
    from safetensors.torch import save_file

    check_sizes(pair)
    saes = by_side(pair)
    subtracts = all(sae.subtract_b_dec for sae in saes.values())
    theirs = {
        f"_{name}{_SUFFIXES[side]}": tensor
        for side, sae in saes.items()
        for name, tensor in parameters(sae, subtracts_b_dec=subtracts).items()
    }
    tensors, config = file_tensors(theirs), _config(pair, subtracts, origin)
    write_files(folder, (CONFIG, config), lambda path: save_file(tensors, path), WEIGHTS)


def _sae(path: Path, tensors: dict[str, Tensor], suffix: str, k: int, subtracts: bool) -> TopKSAE:
    W_enc, b_enc, W_dec, b_dec = (tensors[f"_{name}{suffix}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return make_sae(path, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k, subtract_b_dec=subtracts)


def _about(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    metric, hook_name = optional(path, config, "sparsity_metric", str), optional(path, config, "hook_name", str)
    layer = optional(path, config, "hook_layer", int)
    coef, notes = optional(path, config, "jacobian_coefficient", int, float), own_notes(path, config)
    jacobian = None if coef is None else {"coef": coef, "penalty": metric if metric in PENALTIES else "l1"}
    facts = told(
        model_name=optional(path, config, "model_name", str),
        layer=layer_of(hook_name) if layer is None else layer,
        hook_name=hook_name,
        sparsity_metric=metric,
        mse_output_coef=config.get("mlp_out_mse_coefficient"),
        random_weights=flag(path, config, "randomize_llm_weights", False) or None,
        jacobian=jacobian,
    )
    return {"format": "paper", **facts, **notes}


def _config(pair: SAEPair, subtracts: bool, origin: Origin) -> dict[str, Any]:
    layer, jacobian = origin.model.get("layer"), origin.config.get("jacobian") or {}
    return {
        "activation_fn": "topk",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": pair.input_sae.k},
        "d_in": pair.d_model,
        "d_sae": pair.input_sae.d_sae,
        "use_jacobian_loss": True,
        "is_pair": True,
        "hook_name": None if layer is None else f"blocks.{layer}.ln2.hook_normalized",
        "hook_layer": layer,
        "model_name": origin.model.get("name"),
        "jacobian_coefficient": jacobian.get("coef"),
        "sparsity_metric": jacobian.get("penalty"),
        "mlp_out_mse_coefficient": (origin.config.get("recipe") or {}).get("sae.mse_output_coef", 1.0),
        "normalize_activations": "none",
        "randomize_llm_weights": bool(origin.model.get("random_weights")),
        "apply_b_dec_to_input": subtracts,
        "dtype": str(pair.input_sae.W_dec.dtype),
        "device": "cpu",
        NOTES: notes(None, origin),
    }
