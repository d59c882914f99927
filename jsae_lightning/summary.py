"""What a run ends with: its final figures, `metrics.json` and a table on the terminal."""

import json
import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.callbacks.evaluation import InTrainingEvaluation
from jsae_lightning.callbacks.throughput import Throughput
from jsae_lightning.errors import UserError
from jsae_lightning.module import JSAEModule
from jsae_lightning.suggestions import did_you_mean

Metrics = Mapping[str, int | float | str | None]

_SAE_ROWS = (
    ("explained variance", "val/explained_variance_", ".4f"),
    ("MSE", "val/mse_", ".4g"),
    ("CE score", "val/ce_score_", ".4f"),
    ("KL score", "val/kl_score_", ".4f"),
    ("L0", "val/l0_", ".2f"),
    ("dead latents", "val/dead_share_", ".1%"),
)
_RAW_ROWS = (
    ("mean |J|", "mean_abs", ".3g"),
    ("|J| > 0.005", "share_above_0.005", ".2%"),
    ("|J| > 0.01", "share_above_0.01", ".2%"),
    ("|J| > 0.015", "share_above_0.015", ".2%"),
    ("|J| > 0.02", "share_above_0.02", ".2%"),
    ("active entries", "active_entries", ".1f"),
)
_SCALE_FREE_ROWS = (
    ("effective edges", "effective_edges", ".1f"),
    ("|J| > rms", "rms_share_above_1", ".2%"),
    ("|J| > max / 10", "max_share_above_0.1", ".2%"),
    ("edges/output for 90%", "edges_for_90", ".2f"),
    ("Hoyer", "hoyer", ".4f"),
    ("Gini", "gini", ".4f"),
)


def final_metrics(trainer: Trainer) -> dict[str, Any]:
    """Return a finished run's figures: the last evaluation's, the time's, and `run/...`.

    `run/steps` (optimizer steps), `run/tokens_seen` (by all ranks), `run/status`: `finished`, or `stopped` before
    `max_steps`. Where the trainer lacks an evaluation or throughput callback, its figures are missing.
    """
    metrics: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InTrainingEvaluation) and callback.last is not None:
            metrics |= callback.last.metrics
        if isinstance(callback, Throughput):
            metrics |= callback.final_metrics()
    return metrics | {
        "run/steps": trainer.global_step,
        "run/tokens_seen": int(cast(JSAEModule, trainer.lightning_module).tokens_seen),
        "run/status": "finished" if trainer.global_step >= trainer.max_steps else "stopped",
    }


def check_names(trainer: Trainer, objective: str, best_metric: str | None) -> None:
    """Raise UserError if a figure that runs or checkpoints shall be chosen by will not exist, before hours go into it.

    Called when the language model has been loaded. Without an evaluation callback nothing is checked: there are no
    figures then.
    """
    module = cast(JSAEModule, trainer.lightning_module)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    evaluated = [name for c in callbacks if isinstance(c, InTrainingEvaluation) for name in c.metric_names(module)]
    if not evaluated:
        return
    numbers = [name for name, value in final_metrics(trainer).items() if not isinstance(value, str)]
    _check_name("objective", objective, {*evaluated, *numbers})
    # A callback of the user's own may log figures of its own; then the first evaluation decides.
    are_ours = all(type(c).__module__.partition(".")[0] in ("jsae_lightning", "lightning") for c in callbacks)
    if best_metric is not None and are_ours:
        _check_name("checkpoint.best_metric", best_metric, evaluated)


def _check_name(key: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        choices = ", ".join(sorted(known))
        raise UserError(f"{key}: no figure is named '{name}': {did_you_mean(name, known)}choose one of {choices}")


def write_metrics_json(path: str | Path, metrics: Metrics) -> None:
    """Write flat `metrics` to `path` as one JSON object, whole or not at all; NaN and infinities become null.

    Raises UserError where the file cannot be written.
    """
    valid = {
        tag: None if isinstance(value, float) and not math.isfinite(value) else value for tag, value in metrics.items()
    }
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(valid, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def print_summary(metrics: Metrics, folder: str | Path, console: Console | None = None) -> None:
    """Print the tables, the run's folder and the command that opens TensorBoard on it, to stdout by default.

    In plain ASCII where the terminal's encoding is not UTF-8; 80 columns are enough.
    """
    console = console or Console()
    for table in summary_tables(metrics):
        console.print(table)
    ce = ", ".join(
        f"{name} {_cell(metrics, f'val/ce_{key}', '.4f')}"
        for name, key in (("clean", "clean"), ("both spliced", "both"), ("zero-ablated", "zero_output"))
    )
    lines = [
        f"cross-entropy  {ce} nats",
        f"speed          {_cell(metrics, 'time/tokens_per_second', ',.0f')} tokens/s, "
        f"{_cell(metrics, 'time/seconds', '.0f')} s in all, {_cell(metrics, 'run/steps', ',')} steps, "
        f"{_cell(metrics, 'run/tokens_seen', ',')} tokens",
        f"run            {folder}",
        f"TensorBoard    tensorboard --logdir {shlex.quote(str(Path(folder) / 'tensorboard'))}",
    ]
    for line in lines:
        encodable = line.encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(encodable, markup=False, highlight=False, soft_wrap=True)


def summary_tables(metrics: Metrics) -> list[Table]:
    """Return two tables: both SAEs side by side, and raw beside scale-free measures of the Jacobian.

    A figure that `metrics` lacks is shown as "-".
    """
    return [_sae_table(metrics), _jacobian_table(metrics)]


def _sae_table(metrics: Metrics) -> Table:
    table = Table(title="Held-out tokens", title_justify="left")
    table.add_column("", min_width=18)
    for name in ("input SAE", "output SAE", "both"):
        table.add_column(name, justify="right", min_width=10)
    for label, tag, form in _SAE_ROWS:
        cells = [_cell(metrics, tag + site, form) for site in ("input", "output", "both")]
        if tag + "both" not in metrics:
            cells[2] = ""
        table.add_row(label, *cells)
    return table


def _jacobian_table(metrics: Metrics) -> Table:
    table = Table(title="Jacobian, means over tokens", title_justify="left")
    table.add_column("raw: shrinks with scale", min_width=18)
    table.add_column("", justify="right", min_width=10)
    table.add_column("scale-free", min_width=18)
    table.add_column("", justify="right", min_width=10)
    for (raw, raw_key, raw_form), (free, free_key, free_form) in zip(_RAW_ROWS, _SCALE_FREE_ROWS, strict=True):
        table.add_row(
            raw,
            _cell(metrics, f"jacobian/{raw_key}", raw_form),
            free,
            _cell(metrics, f"jacobian/{free_key}", free_form),
        )
    return table


def _cell(metrics: Metrics, tag: str, form: str) -> str:
    value = metrics.get(tag)
    if value is None or isinstance(value, str):
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)
