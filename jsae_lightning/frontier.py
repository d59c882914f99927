"""What sparsity costs with each penalty: one frontier per penalty over the runs of a sweep.

jsae-frontier logs/sweeps/DATE                  # frontier.md, frontier.png, frontier.svg in it
jsae-frontier logs/runs --sparsity jacobian/edges_for_90 --loss 0.02

A penalty at a weight is a point: its sparsity (fewer effective edges are better) and the explained variance that it
lost, means over the runs that differ in their seeds alone,

    lost = max over the two SAEs of  EV(baseline) - EV(runs),      baseline: the runs with weight 0

(with a point for each run, the frontier would be one of the luckiest, and further off the more seeds there are). A
penalty's frontier are its points that no other of its points beats in both. Between two neighbours it is taken to be
a straight line, from the baseline on. Of runs that `jsae-eval` has judged, with their edge curves (`eval.parts`
includes `fidelity`), the frontier also says what area the sparser graph has: a penalty can make J sparser and its
graph a worse account of the computation.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.errors import UserError
from jsae_lightning.launch import exit_codes
from jsae_lightning.result_files import markdown_table
from jsae_lightning.sweep_folders import find_jobs, read_json
from jsae_lightning.training_settings import training_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jsae_lightning.reporting.figures_frontier import Curve

PROGRAM = "jsae-frontier"
EXPLAINED_VARIANCE = ("val/explained_variance_input", "val/explained_variance_output")
EFFECTIVE = "jacobian/effective_edges"
AREA = "fidelity/edge_kl_area_contribution"
"""Of RUN/eval/eval.json: the area under the KL edge curve, edges ranked by |J s|."""
LOSSES = (0.01, 0.02, 0.05, 0.1)
"""Losses of explained variance at which the table reads the frontiers."""


@dataclass(frozen=True)
class Point:
    """One finished run."""

    name: str
    penalty: str
    """Its name, with what else sets its penalty apart from the default settings."""
    coef: float
    metrics: dict[str, float]
    """Those of metrics.json, and AREA if there is one."""
    setting: dict[str, Any]
    """What must be the same for all: the MLP, the widths and k, the tokens seen, where the MLP is linearised, the data
    and how much of it was held out, learning rates and the weights of the other losses."""


def frontier(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Return the points (lost, edges, ...) that no other beats in both, by rising loss: the cloud's lower left edge.

    What follows the two rides along.
    """
    best: list[tuple[float, ...]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def read_at(points: Sequence[tuple[float, ...]], loss: float, column: int = 1) -> float:
    """Return what the frontier of `points` (lost, edges, ...) has in a column at a loss, straight between neighbours.

    NaN below the frontier's first point; its last value beyond its last one, as no more was tried.
    """
    edge = frontier(points)
    if not edge or loss < edge[0][0]:
        return math.nan
    for here, there in zip(edge, edge[1:], strict=False):
        if loss <= there[0]:
            return here[column] + (loss - here[0]) / (there[0] - here[0]) * (there[column] - here[column])
    return edge[-1][column]


def read_points(folders: Sequence[str | Path]) -> list[Point]:
    """Return a point for each finished run in the folders; raise UserError if there is none."""
    points = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder: give that of a sweep, or one that holds runs")
        points += [point for job in find_jobs(folder) if (point := _read_point(job.folder, job.name)) is not None]
    if not points:
        raise UserError(f"{folders[0]}: no finished run in it (metrics.json and sae_pair/): let a sweep end first")
    _check_alike(points)
    return points


def split_baseline(points: Sequence[Point]) -> tuple[dict[str, float], dict[str, list[Point]]]:
    """Return the baseline's metrics, means over the runs of weight 0, and the other points by penalty.

    Raises UserError without such a run.
    """
    baseline = [point.metrics for point in points if point.coef == 0]
    if not baseline:
        raise UserError("no run of weight 0 to compare with: add one by jacobian.coef=0 (experiment=baseline/...)")
    means = _means(baseline, baseline[0])
    others: dict[str, list[Point]] = {}
    for point in sorted((point for point in points if point.coef > 0), key=lambda point: point.coef):
        others.setdefault(point.penalty, []).append(point)
    return means, others


def lost(metrics: dict[str, float], baseline: dict[str, float]) -> float:
    """Return the explained variance that a run lost: the larger one of the two SAEs' losses, at least 0."""
    return max(0.0, *(baseline[key] - metrics[key] for key in EXPLAINED_VARIANCE))


def frontier_table(points: Sequence[Point], sparsity: Sequence[str], losses: Sequence[float] = LOSSES) -> str:
    """Return the edges that each penalty reaches at each loss, and how many times fewer than the baseline's.

    If all runs have been judged, also the area under the edge curve at those places of the first measure's frontier.
    """
    baseline, penalties = split_baseline(points)
    areas = list(losses) if _judged(points) else []
    header = ["penalty", "runs", *(f"{_short(key)} at {loss:g} EV lost" for key in sparsity for loss in losses)]
    header += [f"edge-curve area at {loss:g}" for loss in areas]
    rows = []
    for penalty, runs in penalties.items():
        cells = []
        for key in sparsity:
            places = _places(runs, baseline, key)
            cells += [f"{(value := read_at(places, loss)):.1f} ({baseline[key] / value:.2f}x)" for loss in losses]
        places = _places(runs, baseline, sparsity[0], *[AREA] * bool(areas))
        cells += [f"{read_at(places, loss, 2):.3f}" for loss in areas]
        rows.append([penalty, str(len(runs)), *cells])
    first = losses.index(0.02) if 0.02 in losses else 0
    rows.sort(key=lambda row: float(row[2 + first].split()[0]))
    none = ["none (weight 0)", str(sum(p.coef == 0 for p in points))]
    none += [f"{baseline[key]:.1f}" for key in sparsity for _ in losses] + [f"{baseline[AREA]:.3f}" for _ in areas]
    return markdown_table(header, [none, *rows], [False] + [True] * (len(header) - 1))


def _places(runs: Sequence[Point], baseline: dict[str, float], *keys: str) -> list[tuple[float, ...]]:
    """Return (lost, the means over seeds of these metrics) of each weight, the baseline's first."""
    first = (0.0, *(baseline[key] for key in keys))
    by_weight: dict[float, list[dict[str, float]]] = {}
    for run in runs:
        by_weight.setdefault(run.coef, []).append(run.metrics)
    means = [_means(metrics, (*EXPLAINED_VARIANCE, *keys)) for metrics in by_weight.values()]
    return [first, *((lost(metrics, baseline), *(metrics[key] for key in keys)) for metrics in means)]


def _means(runs: Sequence[dict[str, float]], keys: Iterable[str]) -> dict[str, float]:
    return {key: sum(run[key] for run in runs) / len(runs) for key in keys}


def _judged(points: Sequence[Point]) -> bool:
    return all(AREA in point.metrics for point in points)


def points_table(points: Sequence[Point], sparsity: Sequence[str]) -> str:
    """Return every run: penalty, weight, explained variances, what was lost, sparsity."""
    baseline, _ = split_baseline(points)
    area = ["edge-curve area"] if _judged(points) else []
    header = ["penalty", "weight", "EV in", "EV out", "EV lost", *map(_short, sparsity), *area]
    rows = [
        [
            point.penalty if point.coef else "none",
            f"{point.coef:g}",
            *(f"{point.metrics[key]:.4f}" for key in EXPLAINED_VARIANCE),
            f"{lost(point.metrics, baseline):.4f}",
            *(f"{point.metrics[key]:.2f}" for key in sparsity),
            *(f"{point.metrics[AREA]:.3f}" for _ in area),
        ]
        for point in sorted(points, key=lambda point: (point.coef > 0, point.penalty, point.coef))
    ]
    return markdown_table(header, rows, [False] + [True] * (len(header) - 1))


def frontier_figure(points: Sequence[Point], sparsity: Sequence[str] = (EFFECTIVE,)) -> "Figure":
    """Draw each penalty's points and frontier against the explained variance lost: a panel for each measure.

    If all runs have been judged, the last panel shows the areas under their edge curves; its lines join the runs of
    the first measure's frontier.
    """
    from jsae_lightning.reporting.figures_frontier import draw_panels

    baseline, penalties = split_baseline(points)
    panels = {_short(key): _curves(penalties, baseline, key, key) for key in sparsity}
    if _judged(points):
        panels["edge-curve area"] = _curves(penalties, baseline, sparsity[0], AREA)
    return draw_panels(panels, limits={"edge-curve area": (-1.0, 1.0)})


def _curves(penalties: dict[str, list[Point]], baseline: dict[str, float], key: str, shown: str) -> "dict[str, Curve]":
    """Return each penalty's points, and those of them on the frontier of `key`, both as (lost, shown)."""
    curves = {}
    for penalty, runs in sorted(penalties.items()):
        places = _places(runs, baseline, key, shown)
        curves[penalty] = tuple([(place[0], place[2]) for place in some] for some in (places[1:], frontier(places)))
    return curves  # type: ignore[return-value]


def main() -> None:
    """Console script `jsae-frontier`."""
    with exit_codes(PROGRAM):
        given = _arguments()
        points = read_points(given.folders)
        for key in (*given.sparsity, *EXPLAINED_VARIANCE):
            if missing := [point.name for point in points if key not in point.metrics]:
                raise UserError(f"{missing[0]}: metrics.json has no {key}: choose another key of metrics.json")
        table = frontier_table(points, given.sparsity, given.loss)
        out = given.out or given.folders[0]
        with atomic_file(out / "frontier.md") as temporary:
            temporary.write_text(f"{table}\n\n{points_table(points, given.sparsity)}\n", encoding="utf-8")
        figure = frontier_figure(points, [given.sparsity[0], *given.sparsity[2:]])
        for suffix in ("png", "svg"):
            with atomic_file(out / f"frontier.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix)
        print(table)
        print(f"frontiers of {len(points)} runs: {out / 'frontier'}.md, .png, .svg")


def _read_point(folder: Path, name: str) -> Point | None:
    try:
        config = json.loads((folder / "sae_pair" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    metrics = read_json(folder / "metrics.json")
    if not isinstance(metrics, dict) or "jacobian" not in config:
        return None
    numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    area = _area(folder)
    numbers |= {} if area is None else {AREA: area}
    setting = {"model.mlp_hash": config.get("model", {}).get("mlp_hash")} | training_settings(config)
    setting |= {
        f"{sae}.{key}": config.get(sae, {}).get(key) for sae in ("input_sae", "output_sae") for key in ("d_sae", "k")
    }
    setting["jacobian.at"] = config["jacobian"].get("at", "input")
    setting["input_sae.subtract_b_dec"] = config.get("input_sae", {}).get("subtract_b_dec")
    setting["held-out tokens"] = _held_out_tokens(folder, config.get("data", {}))
    return Point(name, penalty_name(config["jacobian"]), float(config["jacobian"]["coef"]), numbers, setting)


def _area(folder: Path) -> float | None:
    """Return what `jsae-eval` found in its default place; None if it has not, or not drawn edge curves."""
    content: Any = read_json(folder / "eval" / "eval.json")
    for key in ("figures", AREA, "mean"):
        content = content.get(key) if isinstance(content, dict) else None
    return float(content) if isinstance(content, int | float) else None


def _check_alike(points: Sequence[Point]) -> None:
    """Refuse runs whose explained variance and edges cannot be compared."""
    known: dict[str, tuple[Any, str]] = {}
    for point in points:
        for key, value in point.setting.items():  # an older export does not tell its whole recipe
            other, name = known.setdefault(key, (value, point.name))
            if value != other:
                raise UserError(
                    f"{point.name}: {key} is {value}, but {other} in {name}: give folders of runs that share their "
                    "MLP, widths, k, jacobian.at, recipe, data and number of tokens"
                )


def _held_out_tokens(folder: Path, data: dict[str, Any]) -> int | None:
    """How many tokens the run's metrics are of, at most: its sequences times their length; None if not known."""
    sequences, length = data.get("val_sequences"), data.get("context_length")
    if sequences is None or length is None:
        return None
    try:
        config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    chosen = config.get("eval", {}).get("num_sequences") if isinstance(config, dict) else None
    return int(length) * min(int(sequences), sequences if chosen is None else int(chosen))


def penalty_name(jacobian: dict[str, Any]) -> str:
    """Return a penalty's name, and those of its settings that are not the defaults."""
    usual = {"at": "input", "edges": "jacobian", "token_fraction": 1.0}
    usual |= {"warmup_fraction": 0.05, "decay_fraction": 0.0}
    unusual = [f"{key}={jacobian[key]}" for key, value in usual.items() if jacobian.get(key, value) != value]
    unusual += [f"{key}={value:g}" for key, value in (jacobian.get("params") or {}).items()]
    return ", ".join([str(jacobian["penalty"]), *unusual])


def _short(key: str) -> str:
    return key.split("/", 1)[1].replace("_", " ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="folders of sweeps, or that hold runs")
    parser.add_argument(
        "--sparsity",
        metavar="KEY",
        nargs="+",
        default=[EFFECTIVE, "jacobian/effective_edges_per_output", "jacobian/edges_for_90"],
        help="keys of metrics.json of which less is sparser; the first one is drawn",
    )
    parser.add_argument("--loss", metavar="EV", nargs="+", type=float, default=list(LOSSES), help="losses to read at")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the first folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
