"""Results as Markdown tables, as they stand in README, and as files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.benchmarking.names import FLOOR, LABELS, SINGLE_DENSE
from jsae_lightning.benchmarking.shapes import Shape
from jsae_lightning.result_files import markdown_table

if TYPE_CHECKING:
    from jsae_lightning.benchmarking.comparison import Comparison

_RATIO_LABELS = {
    "published_over_ours": "ours is faster than the published formulation by a factor of",
    "ours_over_single_dense": "ours over one dense traditional SAE",
    "penalty_overhead": "the penalty adds to our pair's step",
    "penalty_overhead_quarter": "the same on every fourth step",
    "ours_over_floor": "ours over the floor",
}


def comparison_table(result: "Comparison") -> str:
    """Return one row for each contestant: seconds, ratios to the floor and to one dense SAE, speed, memory, loss."""
    seconds = result.medians
    rows = []
    for name, value in seconds.items():
        peak, loss = result.peak_bytes[name], result.losses.get(name)
        rows.append(
            [
                LABELS[name],
                f"{value:.4g}",
                _ratio(value, seconds.get(FLOOR)),
                _ratio(value, seconds.get(SINGLE_DENSE)),
                f"{result.shape.tokens / value:,.0f}",
                megabytes(peak),
                "" if loss is None else f"{loss:.4f}",
            ]
        )
    names = ["forward + backward", "seconds", "/ floor", "/ one SAE", "tokens/s", "peak MB", "loss"]
    return markdown_table(names, rows, [False, *[True] * 6])


def ratio_lines(ratios: dict[str, float | None]) -> list[str]:
    """Return a line for each ratio that was measured."""
    return [
        f"{label}: {f'{value:.0%}' if name.startswith('penalty') else f'{value:.2f}'}  ({name})"
        for name, label in _RATIO_LABELS.items()
        if (value := ratios.get(name)) is not None
    ]


def setting_lines(shape: Shape, versions: dict[str, Any]) -> list[str]:
    """Return what the figures were measured on, in two lines."""
    kind = "gated" if shape.gated else "plain"
    return [
        f"{shape.tokens:,} tokens, d_model {shape.d_model:,}, d_mlp {shape.d_mlp:,} ({kind}, {shape.activation}), "
        f"{shape.d_sae:,} latents, k {shape.k}; {versions['dtype']}, kernels {versions['kernels']}, "
        f"medians of {versions['repeats']}",
        f"{versions['device'] if versions['device'] != 'cpu' else versions['cpu']}, {versions['threads']} threads on "
        f"{versions['cores']} cores; torch {versions['torch']}, jsae_lightning {versions['jsae_lightning']}",
    ]


def megabytes(size: int | None) -> str:
    """Return bytes as a cell of a table."""
    return "-" if size is None else f"{size / 1e6:,.0f}"


def figure(value: float | None, form: str = ".3g") -> str:
    """Return a number as a cell of a table."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all. Raises UserError where the file cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_lines(lines: Sequence[str]) -> None:
    """Print to stdout; what is said meanwhile goes to stderr, so that tables can be piped into a file."""
    print("\n".join(lines), flush=True)


def _ratio(value: float, other: float | None) -> str:
    return "-" if other is None else f"{value / other:.2f}"
