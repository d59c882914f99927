"""Explanations of latents and their scores, as others made them: read, checked line by line, written for the report."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsae_lightning.errors import UserError
from jsae_lightning.graph_files import write_jsonl

FIELDS = ("side", "latent", "explanation", "score", "scorer")
_SIDES = ("input", "output")


@dataclass(frozen=True)
class Interpretation:
    """What one explainer and scorer made of a latent."""

    side: str
    latent: int
    explanation: str | None = None
    score: float | None = None
    scorer: str | None = None


def load_scores(path: Path, num_latents: Mapping[str, int] | None = None) -> list[Interpretation]:
    """Read `.jsonl` (an object a line) or `.csv` (a header line) with side, latent, explanation, score, scorer.

    `side` is input or output, `latent` an integer >= 0 (below `num_latents[side]`, if given), `score` any finite
    number; explanation, score and scorer may be missing, null or (CSV) empty, but not both of explanation and score.
    Other fields are ignored.

    Raises:
        UserError: naming file, line and field, for anything else, and for a latent that has two lines of one scorer.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: is neither .jsonl nor .csv: rename it after what it holds")
    if path.is_dir():
        raise UserError(f"{path}: is a folder: give a .jsonl or .csv file")
    try:
        rows = list(_json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file: check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    found: list[Interpretation] = []
    seen: dict[tuple[str, int, str | None], int] = {}
    for line, row in rows:
        item = _checked(row, f"{path}: line {line}")
        if num_latents is not None and item.latent >= num_latents[item.side]:
            raise UserError(
                f"{path}: line {line}: latent: {item.latent}, but this pair's {item.side} latents are 0 to "
                f"{num_latents[item.side] - 1}: the scores are another pair's"
            )
        key = (item.side, item.latent, item.scorer)
        if key in seen:
            raise UserError(
                f"{path}: line {line}: {item.side} latent {item.latent} has line {seen[key]} already: keep one, "
                "or name different scorers in the field scorer"
            )
        seen[key] = line
        found.append(item)
    if not found:
        raise UserError(f"{path}: holds no line with a latent: check the file")
    return found


def write_scores(scores: list[Interpretation], path: Path) -> Path:
    """Write `scores.jsonl`: a line for each, with all FIELDS, null where there is nothing; return the path."""
    write_jsonl(path, (asdict(item) for item in scores))
    return path


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}: line {line}: is no valid JSON ({error}): give one object a line") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {line}: is {text.strip()[:40]}, not a JSON object: give one a line")
            yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for field in ("side", "latent"):
            if field not in (reader.fieldnames or ()):
                raise UserError(
                    f"{path}: line 1: has no column {field}: start with the line side,latent,explanation,score"
                )
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}: line {reader.line_num}: has more columns than line 1: put text with commas in quotes"
                )
            yield reader.line_num, {name: None if value == "" else value for name, value in row.items()}


def _checked(row: dict[str, Any], where: str) -> Interpretation:
    side = row.get("side")
    if side not in _SIDES:
        raise UserError(f"{where}: side: {_shown(side)} is neither input nor output: give one of them")
    latent = _number(row.get("latent"))
    if latent is None or latent < 0 or not latent.is_integer():
        raise UserError(f"{where}: latent: {_shown(row.get('latent'))} is not an integer of 0 or more: give its index")
    score = None
    if row.get("score") is not None:
        score = _number(row["score"])
        if score is None:
            raise UserError(
                f"{where}: score: {_shown(row['score'])} is not a finite number: leave it out if there is none"
            )
    texts = {}
    for field in ("explanation", "scorer"):
        texts[field] = row.get(field)
        if texts[field] is not None and not isinstance(texts[field], str):
            raise UserError(f"{where}: {field}: {_shown(texts[field])} is not text: put it in quotes")
    if score is None and texts["explanation"] is None:
        raise UserError(f"{where}: explanation: is missing, and so is score: give one of them or remove the line")
    return Interpretation(side, int(latent), texts["explanation"], score, texts["scorer"])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]
