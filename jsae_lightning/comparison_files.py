"""`jsae-eval --compare`: evaluate what is not evaluated yet, and write `comparison.json` and `comparison.md`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.comparison import JudgedPair, ShrinkMatched, compare, distinct_names, is_paired, read_judged
from jsae_lightning.distributed import rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_files import figures_to_json
from jsae_lightning.evaluation_tables import cell
from jsae_lightning.result_files import markdown_table

MOST_SHOWN = 8
"""Pairs of which all is printed; of more only where it stands."""

_ROWS = (
    ("explained variance, input SAE", "val/explained_variance_input", ".4f"),
    ("explained variance, output SAE", "val/explained_variance_output", ".4f"),
    ("CE score, both", "val/ce_score_both", ".4f"),
    ("KL score, both", "val/kl_score_both", ".4f"),
    ("dead latents, input SAE", "val/dead_share_input", ".2%"),
    ("dead latents, output SAE", "val/dead_share_output", ".2%"),
    ("mean abs J", "jacobian/mean_abs", ".4g"),
    ("abs J > 0.005", "jacobian/share_above_0.005", ".2%"),
    ("abs J > 0.01", "jacobian/share_above_0.01", ".2%"),
    ("abs J > 0.015", "jacobian/share_above_0.015", ".2%"),
    ("abs J > 0.02", "jacobian/share_above_0.02", ".2%"),
    ("effective edges", "jacobian/effective_edges", ".2f"),
    ("edges for 90 % of an output", "jacobian/edges_for_90", ".3f"),
    ("abs J > rms", "jacobian/rms_share_above_1", ".2%"),
    ("abs J > max / 10", "jacobian/max_share_above_0.1", ".2%"),
    ("Hoyer", "jacobian/hoyer", ".4f"),
    ("Gini", "jacobian/gini", ".4f"),
    ("kurtosis", "jacobian/kurtosis", ".4g"),
)


def compare_folders(
    folders: Sequence[str], overrides: Sequence[str], *, out: str | None = None, config_dirs: Sequence[str] = ()
) -> Path:
    """Evaluate the pairs that have no results of these settings, compare all; return the path of `comparison.json`.

    Args:
        folders: of runs or exported pairs, at least two, each once.
        overrides: of `conf/eval.yaml`, for all of them.
        out: folder of the comparison; None: `comparison/` beside the first pair's folder.
        config_dirs: folders with the user's own presets.

    Raises:
        UserError: a folder that comes twice, pairs of one model that were judged on different data, and everything that
            `evaluate.evaluate_folder` raises.
    """
    from jsae_lightning.console import show
    from jsae_lightning.evaluate import evaluate_folder

    resolved = [Path(folder).resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{folders[index]}: is given twice: give each pair once")
    if any(override.startswith("eval.out=") for override in overrides):
        raise UserError("eval.out: has no meaning for several pairs: give --out DIR for the comparison")
    judged = [read_judged(evaluate_folder(folder, overrides, config_dirs=config_dirs)) for folder in folders]
    check_same_data(judged)
    target = Path(out) if out else resolved[0].parent / "comparison"
    if rank_and_world_size()[0] == 0:
        text = write_comparison(target, judged)
        if len(judged) > MOST_SHOWN:
            text = f"the tables of {len(judged)} pairs, each against each, are in {target / 'comparison.md'}"
        show([text, f"comparison: {target / 'comparison.json'}"])
    return target / "comparison.json"


def check_same_data(judged: Sequence[JudgedPair]) -> None:
    """Raise UserError if two pairs on one model were judged on different data or with other positions left out.

    Models of another architecture may need other data; their pairs are not matched with each other. How much of the
    data was judged may differ: differences then have the errors of independent samples.
    """
    for index, run in enumerate(judged):
        for other in judged[:index]:
            if (run.mlp != other.mlp and run.architecture != other.architecture) or is_paired(run, other):
                continue
            ours, theirs = (entry.record["evaluation"].get("settings", {}) for entry in (run, other))
            for key in sorted(ours.keys() | theirs.keys()):
                if _is_of_data(key) and ours.get(key) != theirs.get(key):
                    raise UserError(
                        f"{key}: {run.record['folder']} was judged with {ours.get(key)}, {other.record['folder']} with "
                        f"{theirs.get(key)}: give both the same overrides, such as {key}=..."
                    )


def _is_of_data(key: str) -> bool:
    """Whether a setting decides which data and positions are judged, and not only how many."""
    return key == "eval.exclude_first_position" or (key.startswith("data.") and key != "data.val_sequences")


def write_comparison(folder: Path, judged: Sequence[JudgedPair]) -> str:
    """Write `comparison.json` and `comparison.md`, each whole or not at all; return the text of the latter."""
    record, matched = compare(judged)
    markdown = comparison_markdown(record, distinct_names(judged), matched)
    with atomic_file(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_file(folder / "comparison.md") as temporary:
        temporary.write_text(markdown, encoding="utf-8")
    return markdown


def comparison_markdown(record: dict[str, Any], judged: Sequence[JudgedPair], matched: Sequence[ShrinkMatched]) -> str:
    """Return the content of `comparison.md`: findings, the pairs side by side, shrink-matched pairs."""
    lines = ["# Comparison", "", *(f"* **{verdict}**" for verdict in record["verdicts"]), "", "## Findings", ""]
    lines += [*(f"* {finding}" for finding in record["findings"]), ""]
    lines += ["## Pairs", "", "+- is the standard error over documents.", ""]
    rows = [[label, *(cell(run.record["figures"], key, form) for run in judged)] for label, key, form in _ROWS]
    kinds = [["kind", *(_kind(run) for run in judged)]]
    lines.append(markdown_table(["", *(run.name for run in judged)], kinds + rows, [False, *(True for _ in judged)]))
    for entry in matched:
        lines += ["", f"## {entry.run.name} against {entry.baseline.name}, shrink-matched", ""]
        lines += [f"J of {entry.baseline.name} times {entry.scale.mean:.4g} has the same mean magnitude.", ""]
        scaled = figures_to_json(entry.figures)
        rows = [
            [label, *(cell(figures, key, form) for figures in (_figures(entry.run), scaled, _figures(entry.baseline)))]
            for label, key, form in _ROWS
            if key.startswith("jacobian/")
        ]
        names = ["", entry.run.name, f"{entry.baseline.name}, scaled", entry.baseline.name]
        lines.append(markdown_table(names, rows, [False, True, True, True]))
        wrong = max(entry.resolution.values())
        lines += ["", f"Shares of the scaled pair are read off a histogram, to within {wrong * 100:.2g} points."]
    return "\n".join(lines).rstrip("\n") + "\n"


def _figures(run: JudgedPair) -> dict[str, dict[str, float | None]]:
    return run.record["figures"]


def _kind(run: JudgedPair) -> str:
    return run.record["kind"] + (", random weights" if run.weights else "")
