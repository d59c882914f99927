"""From folders of any format to a pair, and from a pair to a folder of any format."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.atomic_files import atomic_folder
from jsae_lightning.checkpoint import load_pair, save_pair
from jsae_lightning.conversion import ModelChoice, dictionary_learning, paper, saelens, sparsify
from jsae_lightning.conversion.cards import card
from jsae_lightning.conversion.models import chosen_model, find_origin, model_section
from jsae_lightning.conversion.reading import Foreign, optional, tensor_names
from jsae_lightning.conversion.writing import SIDES, by_side
from jsae_lightning.errors import UserError
from jsae_lightning.exported_pairs import check_section, find_export, read_pair_config
from jsae_lightning.sae import SAEPair
from jsae_lightning.versions import package_versions

_READERS: dict[str, Callable[[Path], Foreign]] = {
    "paper": paper.read,
    "saelens": saelens.read,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
}
_UNPENALISED = {"coef": 0.0, "penalty": "l1", "params": {}, "at": "input", "edges": "jacobian", "token_fraction": 1}
_OUTPUTS = (".mlp", "hook_mlp_out")


@dataclass(frozen=True)
class ReadPair:
    """A pair and what its files tell of it."""

    pair: SAEPair
    config: dict[str, Any]
    """`config.json` of our own export; for others, `converted_from` and `jacobian`."""
    facts: list[dict[str, Any]]
    """What is told of the language model, one for each folder."""
    is_ours: bool = False
    mlp: dict[str, Tensor] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def find_format(folder: Path) -> str:
    """Return the format of what is in a folder, by its files. Raises UserError where they are no known one's."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: give a run's, an exported pair's or an SAE's")
    if (found := _format_of(folder)) is None:
        known = f"sae_pair/, {saelens.WEIGHTS}, {sparsify.WEIGHTS} or {dictionary_learning.WEIGHTS}"
        raise UserError(f"{folder}: holds no SAE of a known format (none of {known}): give the folder of those files")
    return found


def _format_of(folder: Path) -> str | None:
    if (folder / "sae_pair").is_dir() or (folder / "model.safetensors").is_file():
        return "jsae"
    if (folder / sparsify.WEIGHTS).is_file():
        return "sparsify"
    if (folder / dictionary_learning.WEIGHTS).is_file():
        return "dictionary_learning"
    if (folder / saelens.WEIGHTS).is_file():
        return "paper" if paper.is_pair(tensor_names(folder / saelens.WEIGHTS)) else "saelens"
    return None


def read_pair(sources: Sequence[Path], source_format: str | None = None) -> ReadPair:
    """Read a pair from its folder, or from those of its input SAE and its output SAE.

    A folder with two folders of single SAEs, as `write_pair` makes them, counts as the two. Raises UserError for
    everything that does not make a pair.
    """
    if len(sources) == 1:
        sources = _two_in_one(sources[0]) or sources
    elif sources[0].resolve() == sources[1].resolve():
        raise UserError(f"{sources[0]}: is given for both SAEs: give the input SAE's folder and the output SAE's")
    formats = [source_format or find_format(source) for source in sources]
    if len(sources) == 1 and formats[0] == "jsae":
        return _read_ours(find_export(sources[0]))
    if "jsae" in formats:
        raise UserError(f"{sources[formats.index('jsae')]}: is a pair already: give it alone, or two single SAEs")
    found = [_READERS[name](source) for name, source in zip(formats, sources, strict=True)]
    saes = [sae for foreign in found for sae in foreign.saes]
    if len(saes) != 2:
        what = "one SAE: give the input SAE's folder and the output SAE's" if len(saes) == 1 else "more than two SAEs"
        raise UserError(f"{', '.join(map(str, sources))}: holds {what}")
    facts = [foreign.about for foreign in found]
    if len(facts) == 2:
        _check_sides(sources, facts)
        if saes[0].d_model != saes[1].d_model:
            raise UserError(
                f"{sources[0]}: its SAE is {saes[0].d_model} wide, that of {sources[1]} {saes[1].d_model}: they do not "
                "belong to one MLP"
            )
    dtype = torch.promote_types(saes[0].W_dec.dtype, saes[1].W_dec.dtype)
    pair = SAEPair.of(*(sae.to(dtype) for sae in saes))
    jacobian, remarks = facts[0].get("jacobian"), [remark for foreign in found for remark in foreign.remarks]
    if jacobian is None:
        remarks.append(
            "whether the Jacobian was penalised is not told: the pair counts as traditional, of coefficient 0"
        )
    config = {
        "jacobian": _UNPENALISED | (jacobian or {}),
        "converted_from": facts,
        "versions": package_versions(),
    }
    return ReadPair(pair, config, facts, mlp=found[0].mlp, remarks=tuple(remarks))


def write_pair(read: ReadPair, target: Path, to: str, choice: ModelChoice) -> list[str]:
    """Write a pair to a new folder in a format, whole or not at all; return remarks."""
    if to == "jsae" and read.is_ours:
        raise UserError("--to: is jsae, which this pair is already: choose another format")
    model, d_model = chosen_model(read.facts, choice), read.pair.d_model
    if to == "jsae":
        section = {} if choice.is_left_out else {"model": model_section(model, d_model, read.mlp)}
        save_pair(read.pair, target, metadata=read.config | section)
        return []
    if to == "paper":
        paper.check_sizes(read.pair)
    origin, remarks = find_origin(read.config, model, d_model, is_left_out=choice.is_left_out)
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


def _read_ours(export: Path) -> ReadPair:
    config, path = read_pair_config(export), export / "config.json"
    if config.get("model"):
        check_section(export, config, "model")
    for section in ("jacobian", "data", "recipe"):
        optional(path, config, section, dict)
    try:
        json.dumps(config, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path}: holds a number that is not finite: export the pair again") from error
    model = config.get("model") or {}
    facts = {"model_name": model.get("name"), **{key: model.get(key) for key in ("layer", "revision", "dtype")}}
    return ReadPair(load_pair(export), config, [facts | {"random_weights": model.get("random_weights")}], is_ours=True)


def _two_in_one(folder: Path) -> list[Path] | None:
    """Return the folders of the input and of the output SAE inside one, None if there are no such two."""
    if not folder.is_dir() or _format_of(folder) is not None:
        return None
    named = [folder / side for side in SIDES]
    if all(path.is_dir() and _format_of(path) in _READERS for path in named):
        return named
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and _format_of(path) in _READERS]
    if len(inside) != 2:
        return None
    sides = {_READERS[find_format(path)](path).about.get("mlp_side"): path for path in inside}
    return [sides[side] for side in SIDES] if set(sides) == set(SIDES) else None


def _check_sides(sources: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    """Raise UserError where the files tell that the first SAE is an MLP's output's, or the second its input's."""
    for source, fact, side in zip(sources, facts, SIDES, strict=True):
        told = fact.get("mlp_side")
        if told is None and side == "input" and str(fact.get("hook_name", "")).endswith(_OUTPUTS):
            told = "output"
        if told not in (None, side):
            raise UserError(
                f"{source}: is the SAE of an MLP's {told} ({fact.get('hook_name', 'its configuration says so')}): give "
                "the input SAE's folder first, then the output SAE's"
            )
