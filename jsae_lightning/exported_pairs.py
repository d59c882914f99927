"""An exported pair's folder and what its `config.json` says, read without torch so that mistakes show at once."""

import json
from pathlib import Path
from typing import Any

from jsae_lightning.errors import UserError

FORMAT_VERSION = 1
SAES = ("input_sae", "output_sae")


def find_export(folder: Path) -> Path:
    """Return the folder of the exported pair: `sae_pair/` of a run, or the folder itself; UserError if it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: give a run's folder or an exported pair's")
    return folder / "sae_pair" if (folder / "sae_pair").is_dir() else folder


def read_pair_config(folder: Path) -> dict[str, Any]:
    """Return an export's `config.json`, checked."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: give the folder of an exported pair (sae_pair/ of a run)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is no valid JSON ({error}): export the pair again") from error
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {config.get('format_version')} is not {FORMAT_VERSION}: "
            "use the package version that wrote it"
        )
    for name in SAES:
        for key in ("d_model", "d_sae", "k", "subtract_b_dec"):
            if key not in config.get(name, {}):
                raise UserError(f"{path}: {name}.{key} is missing: export the pair again")
    return config
