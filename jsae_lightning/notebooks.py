"""What the notebooks in `notebooks/` need beside the rest of the package: training by the command line, and tables."""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsae_lightning.errors import UserError
from jsae_lightning.reporting.readers import Judged, read_json_lines
from jsae_lightning.result_files import markdown_table

# tqdm looks for notebook widgets, which nothing here shows.
warnings.filterwarnings("ignore", message="IProgress not found")

PEAK = 6
"""Tokens shown before and after a context's peak."""


def scratch_folder() -> Path:
    """Return a new temporary folder; it is the reader's to keep or to remove."""
    return Path(tempfile.mkdtemp(prefix="jsae-"))


def train(folder: Path, overrides: Sequence[str]) -> Path:
    """Run `jsae-train OVERRIDES` in a process of its own into `folder`, and return that.

    Raises UserError with the last line that the process printed, if it fails.
    """
    _train([*overrides, f"hydra.run.dir={folder}"], folder)
    return folder


def sweep(folder: Path, overrides: Sequence[str]) -> Path:
    """Run `jsae-train -m OVERRIDES`, two jobs at a time, into `folder`, and return that; errors as for `train`."""
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    _train(["-m", *launcher, *overrides, f"hydra.sweep.dir={folder}"], folder)
    return folder


def job_folders(sweep_folder: Path) -> list[Path]:
    """Return the folders of a sweep's finished jobs, in their order; UserError if there is none."""
    from jsae_lightning.sweep_folders import find_jobs

    folders = [job.folder for job in find_jobs(sweep_folder) if (job.folder / "sae_pair").is_dir()]
    if not folders:
        raise UserError(f"{sweep_folder}: holds no finished run: give the folder of a sweep")
    return folders


def figures_table(runs: Mapping[str, Judged], rows: Mapping[str, str], form: str = ".4g") -> str:
    """Return a Markdown table: a row for each of `rows` (label to figure), a column for each run, with errors."""
    lines = [[label, *(_cell(run, key, form) for run in runs.values())] for label, key in rows.items()]
    return markdown_table(["", *runs], lines, [False, *(True for _ in runs)])


def edge_contexts(evaluation: Path, edges: int = 5, limit: int = 2) -> str:
    """Return, as Markdown, where the strongest edges of an evaluation's global graph have their largest |J|.

    Args:
        evaluation: folder with `graph/edge_contexts.jsonl`.
        edges: so many of the strongest.
        limit: examples of each.
    """
    lines = []
    for row in read_json_lines(evaluation / "graph" / "edge_contexts.jsonl", edges):
        lines.append(f"* input {row['input']} → output {row['output']}, mean abs J {row['mean_abs']:.3g}")
        lines += [f"    * {example_text(example)}" for example in row["examples"][:limit]]
    return "\n".join(lines)


def latent_contexts(evaluation: Path, side: str, latent: int, limit: int = 3) -> str:
    """Return, as Markdown, the texts on which a latent (`side` input or output) is most active."""
    for row in read_json_lines(evaluation / "graph" / "contexts.jsonl"):
        if (row["side"], row["latent"]) == (side, latent):
            examples = row["examples"][:limit]
            return "\n".join(f"* {example_text(example)}" for example in examples)
    return "* (not active on the evaluated tokens)"


def example_text(example: Mapping[str, Any]) -> str:
    """Return the tokens around a context's peak as Markdown, the peak in bold, line breaks as signs."""
    peak = example["peak"]
    before, after = (
        "".join(example["tokens"][slice(*ends)]) for ends in ((max(0, peak - PEAK), peak), (peak + 1, peak + 1 + PEAK))
    )
    return f"{_literal(before)}**{_literal(example['tokens'][peak])}**{_literal(after)}"


def _cell(run: Judged, key: str, form: str) -> str:
    mean, error = run.mean(key), run.error(key)
    if mean is None:
        return "-"
    return format(mean, form) + (f" ± {error:.2g}" if error else "")


def _literal(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(f"&#{ord(sign)};" if sign in "\\`*_{}[]()<>#+-!|$~&" or sign == " " else sign for sign in shown)


def _train(arguments: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "jsae_lightning.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise UserError(f"{folder}: training failed with exit code {done.returncode}: {said}")
