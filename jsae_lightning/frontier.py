"""What sparsity costs with each penalty: one frontier per penalty over the runs of a sweep.

jsae-frontier logs/sweeps/DATE                  # frontier.md, frontier.png, frontier.svg in it
jsae-frontier logs/runs --sparsity jacobian/edges_for_90 --loss 0.02

A run is a point: its sparsity (fewer effective edges are better) and the explained variance that it lost,

    lost = max over the two SAEs of  EV(baseline) - EV(run),      baseline: the runs with weight 0, averaged over seeds

A penalty's frontier are its points that no other of its points beats in both. Between two neighbours it is taken to be
a straight line, from the baseline on.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.errors import UserError
from jsae_lightning.launch import exit_codes
from jsae_lightning.result_files import markdown_table
from jsae_lightning.sweep_folders import find_jobs, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "jsae-frontier"
EXPLAINED_VARIANCE = ("val/explained_variance_input", "val/explained_variance_output")
EFFECTIVE = "jacobian/effective_edges"
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
    setting: dict[str, Any]
    """What must be the same for all: the MLP, the widths and k, the tokens seen, where the MLP is linearised, the data,
    and how much of it was held out."""


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (lost, edges) that no other beats in both, by rising loss: the lower left edge of the cloud."""
    best: list[tuple[float, float]] = []
    for lost, edges in sorted(points):
        if not best or edges < best[-1][1]:
            best.append((lost, edges))
    return best


def edges_at(points: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the edges that the frontier of `points` (lost, edges) reaches at a loss, straight between neighbours.

    NaN below the frontier's first point; its last value beyond its last one, as no more was tried.
    """
    edge = frontier(points)
    if not edge or loss < edge[0][0]:
        return math.nan
    for (lost, edges), (next_lost, next_edges) in zip(edge, edge[1:], strict=False):
        if loss <= next_lost:
            return edges + (loss - lost) / (next_lost - lost) * (next_edges - edges)
    return edge[-1][1]


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
    means = {key: sum(run[key] for run in baseline) / len(baseline) for key in baseline[0]}
    others: dict[str, list[Point]] = {}
    for point in sorted((point for point in points if point.coef > 0), key=lambda point: point.coef):
        others.setdefault(point.penalty, []).append(point)
    return means, others


def lost(point: Point, baseline: dict[str, float]) -> float:
    """Return the explained variance that a run lost: the larger one of the two SAEs' losses, at least 0."""
    return max(0.0, *(baseline[key] - point.metrics[key] for key in EXPLAINED_VARIANCE))


def frontier_table(points: Sequence[Point], sparsity: Sequence[str], losses: Sequence[float] = LOSSES) -> str:
    """Return the edges that each penalty reaches at each loss, and how many times fewer than the baseline's."""
    baseline, penalties = split_baseline(points)
    header = ["penalty", "runs", *(f"{_short(key)} at {loss:g} EV lost" for key in sparsity for loss in losses)]
    rows = []
    for penalty, runs in penalties.items():
        cells = []
        for key in sparsity:
            places = [(0.0, baseline[key]), *((lost(run, baseline), run.metrics[key]) for run in runs)]
            for loss in losses:
                value = edges_at(places, loss)
                cells.append(f"{value:.1f} ({baseline[key] / value:.2f}x)")
        rows.append([penalty, str(len(runs)), *cells])
    first = losses.index(0.02) if 0.02 in losses else 0
    rows.sort(key=lambda row: float(row[2 + first].split()[0]))
    none = ["none (weight 0)", str(sum(p.coef == 0 for p in points))]
    rows.insert(0, none + [f"{baseline[key]:.1f}" for key in sparsity for _ in losses])
    return markdown_table(header, rows, [False] + [True] * (len(header) - 1))


def points_table(points: Sequence[Point], sparsity: Sequence[str]) -> str:
    """Return every run: penalty, weight, explained variances, what was lost, sparsity."""
    baseline, _ = split_baseline(points)
    header = ["penalty", "weight", "EV in", "EV out", "EV lost", *map(_short, sparsity)]
    rows = [
        [
            point.penalty if point.coef else "none",
            f"{point.coef:g}",
            *(f"{point.metrics[key]:.4f}" for key in EXPLAINED_VARIANCE),
            f"{lost(point, baseline):.4f}",
            *(f"{point.metrics[key]:.2f}" for key in sparsity),
        ]
        for point in sorted(points, key=lambda point: (point.coef > 0, point.penalty, point.coef))
    ]
    return markdown_table(header, rows, [False] + [True] * (len(header) - 1))


def frontier_figure(points: Sequence[Point], sparsity: str = EFFECTIVE) -> "Figure":
    """Draw each penalty's points and frontier: edges (fewer is sparser) against the explained variance lost."""
    from jsae_lightning.reporting.style import COLORS, LINES, MARKERS, new_figure, styled

    baseline, penalties = split_baseline(points)

    @styled
    def draw() -> "Figure":
        figure, (axes,) = new_figure(height=4.8 + 0.22 * len(penalties))
        for number, (penalty, runs) in enumerate(sorted(penalties.items())):
            places = [(lost(run, baseline), run.metrics[sparsity]) for run in runs]
            edge = frontier([(0.0, baseline[sparsity]), *places])
            look: dict[str, Any] = {"color": COLORS[number % len(COLORS)]}
            axes.plot(*zip(*edge, strict=True), linestyle=LINES[number // len(COLORS) % len(LINES)], **look)
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*places, strict=True), linestyle="none", marker=marker, label=penalty, **look)
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlim(0, None)
        ticks = [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("explained variance lost")
        axes.set_ylabel(_short(sparsity))
        axes.axvline(0.02, linestyle=":", color="#7f7f7f", linewidth=1)
        figure.legend(loc="outside lower center", ncols=2 if max(map(len, penalties)) <= 18 else 1)
        return figure

    return draw()


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
        figure = frontier_figure(points, given.sparsity[0])
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
    setting = {"model.mlp_hash": config.get("model", {}).get("mlp_hash"), "tokens_seen": config.get("tokens_seen")}
    setting |= {
        f"{sae}.{key}": config.get(sae, {}).get(key) for sae in ("input_sae", "output_sae") for key in ("d_sae", "k")
    }
    setting["jacobian.at"] = config["jacobian"].get("at", "input")
    data = config.get("data", {})
    setting |= {f"data.{key}": data.get(key) for key in ("source", "path", "name")}
    setting["held-out tokens"] = _held_out_tokens(folder, data)
    return Point(name, penalty_name(config["jacobian"]), float(config["jacobian"]["coef"]), numbers, setting)


def _check_alike(points: Sequence[Point]) -> None:
    """Refuse runs whose explained variance and edges cannot be compared."""
    first = points[0]
    for point in points[1:]:
        for key, value in first.setting.items():
            if point.setting[key] != value:
                raise UserError(
                    f"{point.name}: {key} is {point.setting[key]}, but {value} in {first.name}: give folders of "
                    "runs that share their MLP, widths, k, jacobian.at, data and number of tokens"
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
    usual |= {"warmup_fraction": 0.05, "decay_fraction": 0.0, "params": {}}
    unusual = [f"{key}={jacobian[key]}" for key, value in usual.items() if jacobian.get(key, value) != value]
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
