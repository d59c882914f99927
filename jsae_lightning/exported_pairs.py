"""An exported pair's folder and what its `config.json` says, read without torch so that mistakes show at once."""

import json
from pathlib import Path
from types import NoneType
from typing import Any

from jsae_lightning.errors import UserError

FORMAT_VERSION = 1
SAES = ("input_sae", "output_sae")
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Of a pair's tensors, and of a language model's."""
_SIZES = ("d_model", "d_sae", "k")
_LARGEST = 2**31
_SECTIONS: dict[str, dict[str, tuple[type, ...]]] = {
    "model": {
        "name": (str,),
        "layer": (int,),
        "revision": (str, NoneType),
        "dtype": (str,),
        "random_weights": (bool, str),
        "random_seed": (int,),
        "mlp_hash": (str,),
    },
    "jacobian": {"coef": (int, float), "at": (str,), "penalty": (str,), "params": (dict,)},
}
"""What a run's export says beyond the pair itself: keys and types. Only what needs a section reads it."""
_WITHOUT = {
    "model": "only the two SAEs can be had: use SAEPair.load, or export a run",
    "jacobian": "the pair cannot be judged: save it with metadata={'jacobian': {coef, penalty, params, at}, ...}",
}


def find_export(folder: Path) -> Path:
    """Return the folder of the exported pair: `sae_pair/` of a run, or the folder itself; UserError if it is none."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: give a run's folder or an exported pair's")
    if (folder / "sae_pair").is_dir():
        return folder / "sae_pair"
    if not (folder / "config.json").is_file() and (runs := sorted(folder.glob("*/sae_pair"))):
        raise UserError(
            f"{folder}: holds {len(runs)} run(s), such as {runs[0].parent.name}: give one of their folders; "
            "jsae-report takes all of them"
        )
    return folder


def read_pair_config(folder: Path) -> dict[str, Any]:
    """Return an export's `config.json`, checked as far as the pair itself needs it.

    Raises UserError for a file that is missing or no JSON object, another version's, and sizes that no pair has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: give the folder of an exported pair (sae_pair/ of a run)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({error}): export the pair again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: is {json.dumps(config)[:40]}, not a JSON object: export the pair again")
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {config.get('format_version')} is not {FORMAT_VERSION}: "
            "use the package version that wrote it"
        )
    for name in SAES:
        _check_sae(config.get(name), f"{path}: {name}")
    sizes = [config[name]["d_model"] for name in SAES]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path}: input_sae.d_model is {sizes[0]}, output_sae.d_model {sizes[1]}: export the pair again"
        )
    return config


def check_section(folder: Path, config: dict[str, Any], section: str) -> dict[str, Any]:
    """Return `config[section]` (model or jacobian) of an export in `folder`; UserError where one of its keys is wrong.

    Pairs that were saved by hand need no such section.
    """
    where, found = f"{folder / 'config.json'}: {section}", config.get(section)
    if not found:
        raise UserError(f"{where} is missing, so {_WITHOUT[section]}")
    _check_mapping(found, where)
    for key, types in _SECTIONS[section].items():
        if key not in found:
            raise UserError(f"{where}.{key} is missing: export the pair again")
        if not isinstance(found[key], types) or (isinstance(found[key], bool) and bool not in types):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)
            raise UserError(f"{where}.{key}: {found[key]!r} is no {names}: export the pair again")
    if not isinstance(found.get("synthetic", {}), (dict, NoneType)):
        raise UserError(f"{where}.synthetic: {found['synthetic']!r} is no JSON object: export the pair again")
    return found


def check_for_evaluation(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless the `config.json` of an export holds what a pair is judged by."""
    for section in _SECTIONS:
        check_section(folder, config, section)
    for section in ("data", "evaluation"):
        _check_mapping(config.get(section, {}), f"{folder / 'config.json'}: {section}")


def _check_sae(sae: Any, where: str) -> None:
    _check_mapping({} if sae is None else sae, where)
    for key in (*_SIZES, "subtract_b_dec"):
        if key not in (sae or {}):
            raise UserError(f"{where}.{key} is missing: export the pair again")
    for key in _SIZES:
        if not isinstance(sae[key], int) or isinstance(sae[key], bool) or not 1 <= sae[key] < _LARGEST:
            raise UserError(f"{where}.{key}: {sae[key]!r} is no whole number from 1 to 2^31: export the pair again")
    if sae["k"] > sae["d_sae"]:
        raise UserError(f"{where}.k: {sae['k']} is more than its {sae['d_sae']} latents: export the pair again")
    if not isinstance(sae["subtract_b_dec"], bool):
        raise UserError(f"{where}.subtract_b_dec: {sae['subtract_b_dec']!r} is no bool: export the pair again")


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} is no JSON object: export the pair again")
