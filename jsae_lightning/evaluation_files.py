"""The folder of an evaluation: `eval.json`, `eval.md`, `tensorboard/`, `arrays.safetensors`, `groups.safetensors`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_parts import PartResult
from jsae_lightning.evaluation_tables import evaluation_markdown
from jsae_lightning.jackknife import Figure

FORMAT_VERSION = 1
EVAL_JSON = "eval.json"
EXPLANATIONS = "autointerp"
"""The folder in that of an evaluation that `autointerp` writes to."""


def write_evaluation(folder: Path, record: dict[str, Any], result: PartResult) -> None:
    """Write everything to a folder that exists.

    `record` is what `eval.json` says of the pair and the evaluation, without figures and curves, which are added.
    `groups.safetensors` has what the comparison of two pairs needs: for each number of groups, as parts judge different
    tokens, `replicates_<groups>` (groups, figures), float64, the figures' names being in the metadata; and, for the
    Jacobian at the trained setting, `fine_histograms` (groups, bins) and `entries` (groups,); see `fine_histogram`.
    """
    from safetensors.torch import save_file

    record = record | {"figures": figures_to_json(result.figures), "curves": finite(result.curves)}
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (folder / EVAL_JSON).write_text(text, encoding="utf-8")
    (folder / "eval.md").write_text(evaluation_markdown(record), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in result.arrays.items()}, folder / "arrays.safetensors")
    groups, names = dict(result.groups), {}
    for size in sorted({len(values) for values in result.replicates.values()}):  # parts judge different tokens
        names[f"replicates_{size}"] = [name for name, values in result.replicates.items() if len(values) == size]
        columns = [result.replicates[name] for name in names[f"replicates_{size}"]]
        groups[f"replicates_{size}"] = torch.stack(columns, dim=1)
    metadata = {"figures": json.dumps(names)}
    save_file({name: tensor.contiguous() for name, tensor in groups.items()}, folder / "groups.safetensors", metadata)
    _write_tensorboard(folder / "tensorboard", result.figures)


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of an `eval.json`; UserError if it is none of this format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no result of jsae-eval ({error}): remove it and evaluate again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version} is not {FORMAT_VERSION}: use the package version that wrote it"
        )
    return record


def figures_to_json(figures: Mapping[str, Figure]) -> dict[str, dict[str, float | None]]:
    """Return figures as they stand in JSON, which has no NaN."""
    return {
        name: {"mean": finite(figure.mean), "standard_error": finite(figure.standard_error)}
        for name, figure in figures.items()
    }


def finite(value: Any) -> Any:
    """Return nested dicts and lists with NaN and infinities as None."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(folder: Path) -> None:
    """Raise UserError if writing the results would replace a folder of something else.

    Explanations of latents, which may be there before any results, are no such thing: they are kept.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"eval.out: '{folder}' is a file: give the name of a folder for the results")
    others = folder.is_dir() and any(entry.name != EXPLANATIONS for entry in folder.iterdir())
    if others and not (folder / EVAL_JSON).is_file():
        raise UserError(f"eval.out: '{folder}' holds other files, and no results to replace: give another folder")


def _write_tensorboard(folder: Path, figures: Mapping[str, Figure]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            if math.isfinite(figure.mean):
                writer.add_scalar(name, figure.mean, 0)
