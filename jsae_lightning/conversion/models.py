"""The language model of a pair from elsewhere: what its files tell, what the caller says, and what both lead to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.architecture import Architecture, check_layer, read_architecture
from jsae_lightning.conversion import ModelChoice
from jsae_lightning.conversion.sites import find_sites
from jsae_lightning.conversion.writing import Origin
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.model_files import model_folder
from jsae_lightning.sequence_maker import MAX_CONTEXT_LENGTH

_LEFT_OUT = "the names of the activations are left out"


@dataclass(frozen=True)
class Model:
    """A language model and the layer of its MLP; None: not known."""

    name: str | None
    layer: int | None
    revision: str | None
    dtype: str
    random_weights: bool | str = False


def chosen_model(facts: Sequence[Mapping[str, Any]], choice: ModelChoice) -> Model:
    """Return what the caller says, else what the files tell; UserError where they contradict each other.

    `facts` are those of each folder: `model_name`, `layer`, `revision`, `dtype`, `random_weights`.
    """
    layers = {fact["layer"] for fact in facts if fact.get("layer") is not None}
    if choice.layer is not None and layers - {choice.layer}:
        raise UserError(f"--layer: is {choice.layer}, but the files tell {min(layers - {choice.layer})}: leave it out")
    if len(layers) > 1:
        raise UserError(
            f"--layer: the SAEs are of layers {' and '.join(map(str, sorted(layers)))}: give those of one MLP"
        )
    first = {key: value for fact in reversed(facts) for key, value in fact.items() if value is not None}
    name = choice.name or hub_name(first.get("model_name"))
    is_folder = name is not None and Path(name).expanduser().is_dir()
    return Model(
        name=str(Path(str(name)).expanduser().resolve()) if is_folder else name,
        layer=choice.layer if choice.layer is not None else next(iter(layers), None),
        revision=choice.revision or (None if is_folder or choice.name else first.get("revision")),
        dtype=choice.dtype or first.get("dtype") or "float32",
        random_weights=first.get("random_weights", False),
    )


def hub_name(name: Any) -> str | None:
    """Return the hub's name of a model that others call by TransformerLens' short name."""
    if not isinstance(name, str) or not name:
        return None
    if "/" in name:
        return name
    owners = {"pythia": "EleutherAI", "gpt2": "openai-community", "gemma": "google"}
    owner = next((owner for prefix, owner in owners.items() if name.startswith(prefix)), None)
    name = "gpt2" if name == "gpt2-small" else name
    return f"{owner}/{name}" if owner else name


def model_section(model: Model, d_model: int, copies: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `model` of an export's `config.json`, from the MLP itself; `copies` of its tensors are compared with it.

    Raises UserError where the model is not known, cannot be loaded, or is not that of the SAEs.
    """
    for option, value in (("--model", model.name), ("--layer", model.layer)):
        if value is None:
            raise UserError(f"{option}: the files do not tell it: give it, or --no-model for the two SAEs alone")
    if model.random_weights:
        raise UserError(
            "--model: the SAEs were trained on a model with random weights, which these files cannot make again: give "
            "--no-model for the two SAEs alone"
        )
    name, layer = str(model.name), int(str(model.layer))
    mlp = FrozenMLP.from_pretrained(name, layer=layer, revision=model.revision, dtype=model.dtype)
    _check_width(name, mlp.d_model, d_model)
    for key, copy in copies.items():
        own = getattr(mlp, key)
        if own is None or own.shape != copy.shape or not _is_close(copy, own, model.dtype):
            raise UserError(
                f"mlp.{key}: the copy in the checkpoint is not that of layer {layer} of {name}: give the --model, "
                "--layer and --revision that it was trained on, or --no-model"
            )
    return {
        "name": name,
        "revision": model.revision,
        "layer": layer,
        "dtype": model.dtype,
        "random_weights": False,
        "random_seed": 0,
        "synthetic": None,
        "mlp_kind": mlp.kind,
        "activation": mlp.activation,
        "mlp_hash": mlp.weights_hash(),
    }


def find_origin(
    config: dict[str, Any], model: Model, d_model: int, *, is_left_out: bool = False
) -> tuple[Origin, list[str]]:
    """Return what is told of a pair in another format, and remarks on what could not be found out.

    Raises UserError where the model that is found is not that of the SAEs.
    """
    own = config.get("model") or {}
    known = {"name": model.name, "layer": model.layer, "revision": model.revision, "dtype": model.dtype}
    config = config | {"model": own | known | {"random_weights": model.random_weights}}
    if is_left_out:
        return Origin(config), []
    if own.get("synthetic"):
        return Origin(config), [f"{_LEFT_OUT}: the model is made, other projects cannot load it"]
    if model.name is None or model.layer is None:
        return Origin(config), [f"{_LEFT_OUT}: give --model and --layer to have them"]
    try:
        architecture = read_architecture(model.name, revision=model.revision)
        folder = model_folder(model.name, revision=model.revision)
    except UserError as error:
        return Origin(config), [f"{_LEFT_OUT}: {error}"]
    check_layer(architecture, model.layer)
    _check_width(model.name, architecture.d_model, d_model)
    remarks = []
    if model.random_weights:
        remarks.append("the model's weights were random: others will load those of the hub, which the SAEs do not fit")
    sites = find_sites(folder, model.name, model.layer)
    if sites is None:
        remarks.append(f"{_LEFT_OUT}: no module of {model.name} was found to have the MLP's input as its output")
    length = min(architecture.context_length, MAX_CONTEXT_LENGTH)
    return Origin(config, sites, length, _prepends_bos(config, model, architecture)), remarks


def _prepends_bos(config: Mapping[str, Any], model: Model, architecture: Architecture) -> bool | None:
    """Return whether sequences begin with BOS, as far as it can be told: `data.bos`, or what the tokenizer does."""
    rule = (config.get("data") or {}).get("bos")
    if rule in ("sequence", "document", "never"):
        return rule != "never"
    from jsae_lightning.model_loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(model.name), revision=model.revision)
    except UserError:
        return None
    ids = tokenizer.encode("a")
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _check_width(name: str, found: int, d_model: int) -> None:
    if found != d_model:
        raise UserError(f"--model: {name} is {found} wide, the SAEs {d_model}: give the SAEs' own")


def _is_close(copy: Tensor, own: Tensor, dtype: str) -> bool:
    """Whether two tensors differ by no more than the rounding of one of them."""
    eps = max(torch.finfo(copy.dtype).eps, torch.finfo(getattr(torch, dtype)).eps)
    return float((copy.float() - own).abs().max()) <= max(2 * eps, 1e-4) * float(own.abs().max())
