"""Read what an evaluation has written, and find the evaluations of a folder.

A folder that is given may be a run's or an export's (with `eval/` in it), an evaluation's own (with `eval.json`), a
comparison's (`comparison.json` and what it names), or one with runs below it: a sweep's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jsae_lightning.errors import UserError
from jsae_lightning.override_values import override_values
from jsae_lightning.sweep_folders import JobFolder, find_jobs, read_json

FORMAT_VERSION = 1
EVAL, EVAL_FOLDER = "eval.json", "eval"
COMPARISON, COMPARISON_FOLDER = "comparison.json", "comparison"
EXPORT = "sae_pair"
JSAE, TRADITIONAL = "jsae", "traditional"


@dataclass(frozen=True)
class Number:
    """A figure and its standard error; None where it has none."""

    mean: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in the order of the file, those without a finite y left out; `standard_error` None if unknown."""

    x: list[float]
    y: list[float]
    standard_error: list[float | None]


@dataclass(frozen=True)
class Judged:
    """One evaluated pair. `arrays` and `curves` hold whatever there is; nothing in them is required."""

    name: str
    """Under which the report shows it."""
    own_name: str
    """Under which the evaluation and a comparison know it."""
    folder: Path
    """Of the evaluation: the one that holds `eval.json`."""
    kind: str
    random_weights: bool | str
    pair: dict[str, Any]
    evaluation: dict[str, Any]
    figures: dict[str, Number]
    curves: dict[str, Curve]
    arrays: dict[str, np.ndarray]
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def coef(self) -> float | None:
        """The weight of the Jacobian penalty; None if the export does not say."""
        return number(self.pair.get("jacobian", {}).get("coef"))

    @property
    def entries(self) -> int:
        """The entries of one token's Jacobian, k_out k_in; 0 if unknown."""
        return int(np.prod([int(self.pair.get(f"{side}_sae", {}).get("k") or 0) for side in ("input", "output")]))

    @property
    def is_random(self) -> bool:
        """Whether the language model's weights were drawn anew."""
        return bool(self.random_weights)

    def mean(self, key: str) -> float | None:
        """The figure `key`; None if there is none."""
        return self.figures[key].mean if key in self.figures else None

    def error(self, key: str) -> float | None:
        """The standard error of the figure `key`; None if it has none."""
        return self.figures[key].standard_error if key in self.figures else None


@dataclass(frozen=True)
class Comparison:
    """What `comparison.json` says: sentences, and the shrink-matched baselines."""

    verdicts: list[str]
    """Which pair is sparser than which beyond shrinkage."""
    findings: list[str]
    """The numbers behind the verdicts."""
    shrink_matched: list[dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    """By the name that it gives them."""

    def matches(self, runs: Sequence[Judged]) -> list[tuple[Judged, dict[str, Any]]]:
        """Return the runs that have a shrink-matched baseline on the same language model, with what is known of it."""
        folders = {run.folder.resolve(): run for run in runs}
        found = []
        for match in self.shrink_matched:
            own, other = (self.runs.get(str(match.get(key)), {}) for key in ("run", "baseline"))
            run = folders.get(Path(str(own.get("eval"))).resolve().parent)
            if run is not None and own.get("random_weights") == other.get("random_weights"):
                found.append((run, match))
        return found


@dataclass(frozen=True)
class Found:
    """The evaluations of a folder, and the runs that have none yet."""

    evaluated: list[tuple[Path, dict[str, Any]]]
    """Folders that hold an `eval.json`, each with its job's overrides."""
    missing: list[JobFolder]
    comparison: Path | None
    is_sweep: bool


def find_evaluations(folder: Path) -> Found:
    """Return the evaluations in `folder`; raise UserError if it is none of the kinds that the module names."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: give a run's, an evaluation's, an export's or a sweep's")
    comparison = _comparison_in(folder)
    if (folder / EVAL).is_file():
        return Found([(folder, {})], [], comparison, False)
    if (folder / EXPORT).is_dir() or (folder / "config.json").is_file() or (folder / EVAL_FOLDER / EVAL).is_file():
        job = JobFolder(".", folder)
        if (folder / EVAL_FOLDER / EVAL).is_file():
            return Found([(folder / EVAL_FOLDER, {})], [], comparison, False)
        return Found([], [job], comparison, False)
    if (folder / COMPARISON).is_file():
        return Found(_compared(folder / COMPARISON), [], comparison, True)
    jobs = find_jobs(folder)
    if not jobs:
        raise UserError(
            f"{folder}: there is neither {EVAL_FOLDER}/{EVAL} nor a run in it: "
            "give the folder of a run, an exported pair, an evaluation or a sweep"
        )
    evaluated, missing = [], []
    for job in jobs:
        if (job.folder / EVAL_FOLDER / EVAL).is_file():
            evaluated.append((job.folder / EVAL_FOLDER, dict(override_values(job.overrides or []))))
        else:
            missing.append(job)
    return Found(evaluated, missing, comparison, True)


def read_evaluation(folder: Path, overrides: dict[str, Any] | None = None, name: str | None = None) -> Judged:
    """Read `eval.json` and `arrays.safetensors`; raise UserError if the former is missing or damaged."""
    path = folder / EVAL
    content = _read_object(path)
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {content.get('format_version')} is not {FORMAT_VERSION}: evaluate the pair again"
        )
    pair = _dict(content.get("pair"))
    coef = number(_dict(pair.get("jacobian")).get("coef"))
    own_name = str(content.get("name") or folder.parent.name)
    return Judged(
        name=name or own_name,
        own_name=own_name,
        folder=folder,
        kind=str(content.get("kind") or (TRADITIONAL if coef == 0 else JSAE)),
        random_weights=content.get("random_weights") or False,
        pair=pair,
        evaluation=_dict(content.get("evaluation")),
        figures=_figures(_dict(content.get("figures"))),
        curves={key: curve for key, value in _dict(content.get("curves")).items() if (curve := _curve(value)).x},
        arrays=read_arrays(folder / "arrays.safetensors"),
        overrides=overrides or {},
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an evaluation; none if there is no such file; raise UserError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or no safetensors file ({error}): evaluate the pair again") from error


def read_comparison(path: Path | None) -> Comparison | None:
    """Read a `comparison.json`; None if there is none; raise UserError if it is damaged."""
    if path is None:
        return None
    content = _read_object(path)
    verdicts, findings = (
        [str(text) for text in content.get(key) or [] if str(text).strip()] for key in ("verdicts", "findings")
    )
    shrunk = [item for item in content.get("shrink_matched") or [] if isinstance(item, dict)]
    for item in shrunk:
        item["figures"] = _figures(_dict(item.get("figures")))
    runs = {str(item.get("name")): item for item in content.get("runs") or [] if isinstance(item, dict)}
    return Comparison(verdicts, [text for text in findings if text not in verdicts], shrunk, runs)


def read_json_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, at most `limit`; none if it is missing; lines that are damaged are left
    out.
    """  # noqa: D205
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if limit is not None and len(rows) >= limit:
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else, numbers in text included."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names with ` (2)`, ` (3)` behind those that came before."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _comparison_in(folder: Path) -> Path | None:
    """The comparison in a folder, in the one below it, or beside it if it speaks of this run."""
    for path in (folder / COMPARISON, folder / COMPARISON_FOLDER / COMPARISON):
        if path.is_file():
            return path
    run = folder.parent if folder.name == EVAL_FOLDER else folder
    path = run.resolve().parent / COMPARISON_FOLDER / COMPARISON
    own = {(run / EVAL_FOLDER / EVAL).resolve(), (folder / EVAL).resolve()}
    content = read_json(path) if path.is_file() else None
    runs = content.get("runs") if isinstance(content, dict) else None
    named = {Path(str(item.get("eval"))).resolve() for item in runs or [] if isinstance(item, dict)}
    return path if own & named else None


def _compared(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    places: list[tuple[Path, dict[str, Any]]] = []
    for item in _read_object(path).get("runs") or []:
        given = Path(str(_dict(item).get("eval")))
        choices = [given, path.parent / given]
        found = next((choice.parent for choice in choices if choice.is_file()), None)
        if found is None:
            raise UserError(f"{path}: {given}: there is no such file any more: compare the runs again")
        places.append((found, {}))
    return places


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): evaluate the pair first with jsae-eval") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({error}): evaluate the pair again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object: evaluate the pair again")
    return content


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _figures(content: dict[str, Any]) -> dict[str, Number]:
    figures = {}
    for key, value in content.items():
        mean = number(_dict(value).get("mean"))
        if mean is not None:
            figures[key] = Number(mean, number(value.get("standard_error")))
    return figures


def _curve(value: Any) -> Curve:
    value = _dict(value)
    xs, ys = value.get("x") or [], value.get("y") or []
    errors = value.get("standard_error") or [None] * len(ys)
    points = [
        (x, y, number(error))
        for x, y, error in zip(map(number, xs), map(number, ys), errors, strict=False)
        if x is not None and y is not None
    ]
    return Curve([p[0] for p in points], [p[1] for p in points], [p[2] for p in points])
