"""From folders of any format to a pair, and from a pair to a folder of any format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.atomic_files import atomic_folder
from jsae_lightning.checkpoint import load_pair, save_pair
from jsae_lightning.conversion import dictionary_learning, paper, saelens, sparsify
from jsae_lightning.conversion.cards import card
from jsae_lightning.conversion.reading import Foreign, read_safetensors
from jsae_lightning.conversion.sites import find_sites
from jsae_lightning.conversion.writing import SIDES, Origin, by_side
from jsae_lightning.convert import ModelChoice
from jsae_lightning.errors import UserError
from jsae_lightning.exported_pairs import find_export, read_pair_config
from jsae_lightning.model_files import model_folder
from jsae_lightning.sae import SAEPair
from jsae_lightning.versions import package_versions

_READERS: dict[str, Callable[[Path], Foreign]] = {
    "paper": paper.read,
    "saelens": saelens.read,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
}
_MLP_TOLERANCE = 1e-3
"""Relative difference between a copy of an MLP in a checkpoint and the model's: the copy may have been rounded."""


@dataclass(frozen=True)
class ReadPair:
    """A pair and what its files tell of it."""

    pair: SAEPair
    config: dict[str, Any]
    """`config.json` of our own export; for others, `converted_from` and, where it is known, `jacobian`."""
    about: list[dict[str, Any]] = field(default_factory=list)
    """What foreign configurations tell, one for each folder; empty for our own export."""
    mlp: dict[str, Tensor] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def find_format(folder: Path) -> str:
    """Return the format of what is in a folder, by its files. Raises UserError where they are no known one's."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: give a run's, an exported pair's or an SAE's")
    if (folder / "sae_pair").is_dir() or (folder / "model.safetensors").is_file():
        return "jsae"
    if (folder / sparsify.WEIGHTS).is_file():
        return "sparsify"
    if (folder / dictionary_learning.WEIGHTS).is_file():
        return "dictionary_learning"
    if (folder / saelens.WEIGHTS).is_file():
        return "paper" if paper.is_pair(set(read_safetensors(folder / saelens.WEIGHTS))) else "saelens"
    known = f"sae_pair/, {saelens.WEIGHTS}, {sparsify.WEIGHTS} or {dictionary_learning.WEIGHTS}"
    raise UserError(f"{folder}: holds no SAE of a known format (none of {known}): give the folder of those files")


def read_pair(sources: Sequence[Path], source_format: str | None = None) -> ReadPair:
    """Read a pair from its folder, or from those of its input SAE and its output SAE.

    A folder that `write_pair` made, with `input/` and `output/`, counts as the two. Raises UserError for everything
    that does not make a pair.
    """
    if len(sources) == 1 and all((sources[0] / side).is_dir() for side in SIDES):
        sources = [sources[0] / side for side in SIDES]
    formats = [source_format or find_format(source) for source in sources]
    if len(sources) == 1 and formats[0] == "jsae":
        export = find_export(sources[0])
        return ReadPair(load_pair(export), read_pair_config(export))
    if "jsae" in formats:
        raise UserError(f"{sources[formats.index('jsae')]}: is a pair already: give it alone, or two single SAEs")
    found = [_READERS[name](source) for name, source in zip(formats, sources, strict=True)]
    saes = [sae for foreign in found for sae in foreign.saes]
    if len(saes) != 2:
        what = "one SAE: give the input SAE's folder and the output SAE's" if len(saes) == 1 else "more than two SAEs"
        raise UserError(f"{', '.join(map(str, sources))}: holds {what}")
    if saes[0].d_model != saes[1].d_model:
        raise UserError(
            f"{sources[0]}: its SAE is {saes[0].d_model} wide, that of {sources[1]} {saes[1].d_model}: they do not "
            "belong to one MLP"
        )
    dtype = torch.promote_types(saes[0].W_dec.dtype, saes[1].W_dec.dtype)
    pair = SAEPair.of(*(sae.to(dtype) for sae in saes))
    about = [foreign.about for foreign in found]
    remarks = tuple(remark for foreign in found for remark in foreign.remarks)
    return ReadPair(pair, _config_of(about), about, found[0].mlp, remarks)


def write_pair(read: ReadPair, target: Path, to: str, choice: ModelChoice) -> list[str]:
    """Write a pair to a new folder in a format, whole or not at all; return remarks."""
    if to == "jsae":
        if not read.about:
            raise UserError("--to: is jsae, which this pair is already: choose another format")
        save_pair(read.pair, target, metadata=read.config | _model_section(read, choice))
        return []
    origin, remarks = _origin(read, choice)
    if to == "paper" and origin.model.get("mlp_kind") == "gated":
        remarks.append("the paper's code knows no gated MLPs: it can hold these SAEs, and not judge their Jacobian")
    with atomic_folder(target) as folder:
        if to == "paper":
            paper.write(read.pair, folder, origin)
        for side, sae in by_side(read.pair).items():
            if to == "saelens":
                saelens.write(sae, folder / side, side, origin)
            elif to == "sparsify":
                sparsify.write(sae, folder / sparsify.folder_name(side, origin), side, origin)
            elif to == "dictionary_learning":
                dictionary_learning.write(sae, folder / side, side, origin)
        (folder / "README.md").write_text(card(to, origin, read.pair), encoding="utf-8")
    return remarks


def _config_of(about: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the metadata of an export: for judging, a pair without a known penalty counts as a traditional one."""
    first = about[0]
    return {
        "jacobian": {
            "coef": first.get("coef", 0.0),
            "penalty": first.get("penalty", "l1"),
            "params": {},
            "at": "input",
            "edges": "jacobian",
            "token_fraction": 1,
        },
        "converted_from": about,
        "versions": package_versions(),
    }


def _chosen_model(read: ReadPair, choice: ModelChoice) -> tuple[str | None, int | None, str | None]:
    """Return name, layer and revision: those of the caller, else what the files tell."""
    own = read.config.get("model") or {}
    told = {key: value for about in reversed(read.about) for key, value in about.items()}
    name = choice.name or own.get("name") or hub_name(told.get("model_name"))
    layer = choice.layer if choice.layer is not None else own.get("layer", told.get("layer"))
    revision = choice.revision if choice.name or choice.revision else own.get("revision")
    return name, layer, revision


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


def _model_section(read: ReadPair, choice: ModelChoice) -> dict[str, Any]:
    if choice.is_left_out:
        return {}
    name, layer, revision = _chosen_model(read, choice)
    for option, value in (("--model", name), ("--layer", layer)):
        if value is None:
            raise UserError(f"{option}: the files do not tell it: give it, or --no-model for the two SAEs alone")
    from jsae_lightning.frozen_mlp import FrozenMLP

    mlp = FrozenMLP.from_pretrained(str(name), layer=int(str(layer)), revision=revision, dtype=choice.dtype)
    if mlp.d_model != read.pair.d_model:
        raise UserError(f"--model: {name} is {mlp.d_model} wide, the SAEs {read.pair.d_model}: give the SAEs' own")
    for key, copy in read.mlp.items():
        own = getattr(mlp, key)
        if own is None or own.shape != copy.shape or not _is_close(copy, own):
            raise UserError(
                f"mlp.{key}: the copy in the checkpoint is not that of layer {layer} of {name}: give the --model, "
                "--layer and --revision that it was trained on, or --no-model"
            )
    model = {
        "name": name,
        "revision": revision,
        "layer": layer,
        "dtype": choice.dtype,
        "random_weights": False,
        "random_seed": 0,
        "synthetic": None,
        "mlp_kind": mlp.kind,
        "activation": mlp.activation,
        "mlp_hash": mlp.weights_hash(),
    }
    return {"model": model}


def _is_close(copy: Tensor, own: Tensor) -> bool:
    scale = float(own.abs().max())
    return float((copy.float() - own).abs().max()) <= _MLP_TOLERANCE * max(scale, 1e-12)


def _origin(read: ReadPair, choice: ModelChoice) -> tuple[Origin, list[str]]:
    """Return what is told of the pair in another format, and remarks on what could not be found out."""
    name, layer, revision = _chosen_model(read, choice)
    model = (read.config.get("model") or {}) | {"name": name, "layer": layer, "revision": revision}
    config = read.config | {"model": model}
    if choice.is_left_out or name is None or layer is None or model.get("synthetic"):
        return Origin(config, None), [
            "the names of the activations are left out: give --model and --layer to have them"
        ]
    try:
        sites = find_sites(model_folder(name, revision=revision), name, layer)
    except UserError as error:
        return Origin(config, None), [f"the names of the activations are left out: {error}"]
    if sites is None:
        return Origin(config, None), [
            f"the names of the activations are left out: no module of {name} has the MLP's input as its output"
        ]
    return Origin(config, sites), []
