"""dictionary_learning's AutoEncoderTopK: one SAE a folder.

    s = topk_k(relu((x - b_dec) W_enc + b_enc)),   encoder.weight = W_enc^T,   decoder.weight = W_dec^T

Its encoder always subtracts b_dec, so b_dec W_enc is added to the bias of an SAE that does not. `threshold`, an
alternative to TopK for inference, is not read, and written as -1, which stands for none.
"""

from pathlib import Path
from typing import Any

import torch

from jsae_lightning.conversion.folding import parameters
from jsae_lightning.conversion.reading import (
    NOTES,
    Foreign,
    check_tensors,
    make_sae,
    norm_remarks,
    optional,
    own_notes,
    read_json,
    read_state_dict,
    told,
    whole_number,
)
from jsae_lightning.conversion.writing import Origin, file_tensors, notes, write_files
from jsae_lightning.errors import UserError
from jsae_lightning.sae import TopKSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_CLASS = "AutoEncoderTopK"


def read(folder: Path) -> Foreign:
    """Read one TopK SAE. Raises UserError for other classes, backups, missing, misshapen or non-finite tensors."""
    path = folder / CONFIG
    trainer = read_json(path).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{path}: trainer is missing: give the folder of a finished SAE")
    if (found := trainer.get("dict_class")) != _CLASS:
        raise UserError(f"{path}: trainer.dict_class is {found}: only TopK SAEs ({_CLASS}) are supported")
    d_model = whole_number(path, trainer, "activation_dim", "trainer.")
    d_sae, k = whole_number(path, trainer, "dict_size", "trainer."), whole_number(path, trainer, "k", "trainer.")
    tensors = read_state_dict(folder / WEIGHTS)
    shapes = {
        "encoder.weight": (d_sae, d_model), "encoder.bias": (d_sae,), "decoder.weight": (d_model, d_sae),
        "b_dec": (d_model,),
    }  # fmt: skip
    check_tensors(folder / WEIGHTS, tensors, shapes, ignored=["k", "threshold"])
    if "k" in tensors and tensors["k"].tolist() != k:
        raise UserError(
            f"{folder / WEIGHTS}: k is {tensors['k'].tolist()}, {CONFIG} says {k}: the files do not belong together"
        )
    sae = make_sae(
        folder / WEIGHTS,
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["decoder.weight"].T,
        b_dec=tensors["b_dec"],
        k=k,
        subtract_b_dec=True,
    )
    facts = told(
        model_name=optional(path, trainer, "lm_name", str, where="trainer."),
        layer=optional(path, trainer, "layer", int, where="trainer."),
        hook_name=optional(path, trainer, "submodule_name", str, where="trainer."),
    )
    about = {"format": "dictionary_learning", **facts, **own_notes(path, trainer)}
    return Foreign((sae,), about, remarks=norm_remarks(sae, str(folder)))


def write(sae: TopKSAE, folder: Path, side: str, origin: Origin) -> None:
    """Write one SAE of a pair."""
    ours = parameters(sae, subtracts_b_dec=True)
    theirs = {
        "k": torch.tensor(sae.k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
        "decoder.weight": ours["W_dec"].T,
        "encoder.weight": ours["W_enc"].T,
        "encoder.bias": ours["b_enc"],
        "b_dec": ours["b_dec"],
    }
    tensors = file_tensors(theirs)
    write_files(folder, (CONFIG, _config(sae, side, origin)), lambda path: torch.save(tensors, path), WEIGHTS)


def _config(sae: TopKSAE, side: str, origin: Origin) -> dict[str, Any]:
    return {
        "trainer": {
            "trainer_class": "TopKTrainer",
            "dict_class": _CLASS,
            "activation_dim": sae.d_model,
            "dict_size": sae.d_sae,
            "k": sae.k,
            "layer": origin.model.get("layer"),
            "lm_name": origin.model.get("name"),
            "submodule_name": origin.hook_name(side),
            NOTES: notes(side, origin),
        }
    }
