"""One page on a pair or on a sweep of pairs: tables, the paper's figures, and an explorer of the graph of latents.

jsae-report logs/runs/DATE                     # report/report.html in it, evaluating the pair first if need be
jsae-report logs/sweeps/DATE eval.tokens=1e5   # all pairs of a sweep, with the trade-off between them
jsae-report logs/runs/DATE --no-evaluate --out page
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jsae_lightning.errors import UserError
from jsae_lightning.launch import exit_codes
from jsae_lightning.reporting.readers import (
    COMPARISON_FOLDER,
    EVAL,
    EVAL_FOLDER,
    EXPORT,
    Found,
    find_evaluations,
)
from jsae_lightning.sweep_folders import read_json

PROGRAM = "jsae-report"


def main() -> None:
    """Console script `jsae-report`."""
    with exit_codes(PROGRAM):
        given = _arguments(sys.argv[1:])
        write_report(given.folder, given.overrides, out=given.out, evaluate=given.evaluate)


def write_report(
    folder: str | Path, overrides: Sequence[str] = (), *, out: str | Path | None = None, evaluate: bool = True
) -> Path:
    """Write `report.html` and `figures/` on a folder to `out` and return the page's path.

    Args:
        folder: of a run, an exported pair, an evaluation, a comparison or a sweep.
        overrides: of `conf/eval.yaml`, for pairs that are evaluated here; those evaluated otherwise are judged again.
        out: where to write; None: `report/` in `folder`.
        evaluate: whether to evaluate finished pairs that have not been yet, or whose weights have changed since, and
            to compare the pairs of a sweep.

    Raises:
        UserError: there is nothing to report on, or something in it is damaged.
    """
    from jsae_lightning.reporting.building import build_report

    folder = Path(folder)
    if overrides and not evaluate:
        raise UserError(f"{overrides[0]}: with --no-evaluate nothing is evaluated: leave one of the two out")
    found = find_evaluations(folder)
    notes = _evaluate(found, overrides) if evaluate else _stale_notes(found)
    found = find_evaluations(folder)
    if not found.evaluated:
        where = found.missing[0].folder if found.missing else folder
        raise UserError(f"{folder}: no pair in it has been evaluated: {(notes or [f'run jsae-eval {where}'])[0]}")
    if evaluate and found.is_sweep and len(found.evaluated) > 1:
        notes += _compare(folder, found, overrides)
        found = find_evaluations(folder)
    if not evaluate or not notes:
        notes += [f"{job.name} has not been evaluated: run `jsae-eval {job.folder}`." for job in found.missing]
    path, missing = build_report(folder, found, Path(out) if out is not None else folder / "report", notes)
    for note in notes:
        print(note)
    if missing:
        print(f"without data: {', '.join(dict.fromkeys(missing))}; the page says what to run")
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB), figures: {path.parent / 'figures'}", flush=True)
    return path


def _evaluate(found: Found, overrides: Sequence[str]) -> list[str]:
    """Evaluate pairs that have not been or have changed since, and all of them if there are overrides.

    In a sweep, one failure does not stop the others. Returns sentences on what could not be evaluated.
    """
    wanted = [(job.name, job.folder) for job in found.missing]
    evaluated = [path for path, _ in found.evaluated if path.name == EVAL_FOLDER]
    again = evaluated if overrides else [path for path in evaluated if _has_changed(path)]
    wanted = [*((path.parent.name, path.parent) for path in again), *wanted]
    notes = []
    for name, place in wanted:
        if not _has_pair(place):
            notes.append(f"{name} has no exported pair yet: let its training end, then report again.")
            continue
        from jsae_lightning.evaluate import evaluate_folder

        try:
            evaluate_folder(place, list(overrides))
        except UserError as error:
            if not found.is_sweep:
                raise
            notes.append(f"{name} could not be evaluated: {error}.")
    return notes


def _stale_notes(found: Found) -> list[str]:
    """Return a sentence on each pair whose weights have changed since its evaluation."""
    return [
        f"{path.parent.name} was trained on after its evaluation, whose figures are of its earlier weights: run "
        f"`jsae-eval {path.parent}`."
        for path, _ in found.evaluated
        if path.name == EVAL_FOLDER and _has_changed(path)
    ]


def _has_changed(evaluation: Path) -> bool:
    """Whether the pair beside an evaluation has other weights than those judged; False where that is not known."""
    run = evaluation.parent
    weights = next((place / "model.safetensors" for place in (run / EXPORT, run) if _is_export(place)), None)
    if weights is None or not weights.is_file():
        return False
    record = read_json(evaluation / EVAL)
    judged = record.get("evaluation") if isinstance(record, dict) else None
    judged_hash = judged.get("pair_hash") if isinstance(judged, dict) else None
    with weights.open("rb") as file:
        return judged_hash is not None and judged_hash != hashlib.file_digest(file, "sha256").hexdigest()


def _compare(folder: Path, found: Found, overrides: Sequence[str]) -> list[str]:
    """Compare the pairs of a sweep if there is no comparison or one is older than an evaluation."""
    evaluations = [path / "eval.json" for path, _ in found.evaluated]
    newest = max(path.stat().st_mtime for path in evaluations)
    if found.comparison is not None and found.comparison.stat().st_mtime >= newest:
        return []
    places = [path.parent for path, _ in found.evaluated if path.name == EVAL_FOLDER]
    if len(places) < 2:
        return []
    from jsae_lightning.comparison_files import compare_folders

    try:
        compare_folders([str(place) for place in places], list(overrides), out=str(folder / COMPARISON_FOLDER))
    except UserError as error:
        return [f"The pairs could not be compared: {error}."]
    return []


def _has_pair(folder: Path) -> bool:
    return _is_export(folder / EXPORT) or _is_export(folder)


def _is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file()


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: give {PROGRAM} DIR first, then options; see {PROGRAM} --help")


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=PROGRAM,
        description="One self-contained page on a pair or on a sweep of pairs: tables with standard errors, the "
        "figures of the paper beside scale-free ones, and an explorer of the graph of latents.",
        epilog="Exit codes: 0 done; 2 a mistake in the arguments or a damaged file; 1 anything else.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a run, an export, an evaluation or a sweep")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="settings of the evaluation (conf/eval.yaml)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="write report.html and figures/ there (default: DIR/report)"
    )
    parser.add_argument(
        "--no-evaluate", dest="evaluate", action="store_false", help="use only the evaluations that are there"
    )
    given = parser.parse_intermixed_args(list(arguments))
    if wrong := [text for text in given.overrides if "=" not in text and not text.startswith("~")]:
        raise UserError(f"{wrong[0]}: is no override: give one folder, then KEY=VALUE")
    return given


if __name__ == "__main__":
    main()
