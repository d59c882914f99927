"""EleutherAI's sparsify: one SAE a folder, which is named after the module whose output it reconstructs.

    s = topk_k(relu((x - b_dec) W_enc + b_enc)),   encoder.weight = W_enc^T

The ReLU before the choice of the k changes no reconstruction. Its encoder always subtracts b_dec, so b_dec W_enc is
added to the bias of an SAE that does not. Transcoders and skip connections are no SAEs and are refused.
"""

from pathlib import Path
from typing import Any

from jsae_lightning.conversion.folding import parameters
from jsae_lightning.conversion.reading import (
    NOTES,
    Foreign,
    check_tensors,
    demand,
    layer_of,
    make_sae,
    norm_remarks,
    own_notes,
    read_json,
    read_safetensors,
    told,
    whole_number,
)
from jsae_lightning.conversion.writing import Origin, file_tensors, notes, write_files
from jsae_lightning.sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path) -> Foreign:
    """Read one TopK SAE. Raises UserError for other kinds, missing, misshapen or non-finite tensors."""
    path, config = folder / CONFIG, read_json(folder / CONFIG)
    only = "only TopK SAEs are supported"
    demand(path, config, "activation", "topk", ("topk",), only)
    for key in ("transcode", "skip_connection", "signed"):
        demand(path, config, key, False, (False,), only)
    d_model, k = whole_number(path, config, "d_in"), whole_number(path, config, "k")
    d_sae = config.get("num_latents") or d_model * whole_number(path, config, "expansion_factor")
    d_sae = whole_number(path, {"num_latents": d_sae}, "num_latents")
    tensors = read_safetensors(folder / WEIGHTS)
    shapes = {
        "encoder.weight": (d_sae, d_model), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,),
    }  # fmt: skip
    check_tensors(folder / WEIGHTS, tensors, shapes)
    sae = make_sae(
        folder / WEIGHTS,
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k,
        subtract_b_dec=True,
    )
    facts = told(hook_name=folder.resolve().name, layer=layer_of(f".{folder.resolve().name}"))
    about = {"format": "sparsify", **facts, **own_notes(path, config)}
    return Foreign((sae,), about, remarks=norm_remarks(sae, str(folder)))


def write(sae: TopKSAE, folder: Path, side: str, origin: Origin) -> None:
    """Write one SAE of a pair."""
    from safetensors.torch import save_file

    ours = parameters(sae, subtracts_b_dec=True)
    theirs = {
        "encoder.weight": ours["W_enc"].T,
        "encoder.bias": ours["b_enc"],
        "W_dec": ours["W_dec"],
        "b_dec": ours["b_dec"],
    }
    tensors, config = file_tensors(theirs), _config(sae) | {NOTES: notes(side, origin)}
    write_files(folder, (CONFIG, config), lambda path: save_file(tensors, path), WEIGHTS)


def folder_name(side: str, origin: Origin) -> str:
    """Return the folder's name, the module's: what sparsify calls a hookpoint."""
    name = origin.hook_name(side)
    return side if name is None or origin.sites is None else origin.sites.without_head(name)


def _config(sae: TopKSAE) -> dict[str, Any]:
    return {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_model),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
    }
