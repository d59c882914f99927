"""Figures of the Jacobian itself: thresholds, distributions, scale-free measures, heat maps. Data in, Figure out."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jsae_lightning.reporting.readers import Judged
from jsae_lightning.reporting.style import (
    COLOR_MAP,
    COLORS,
    LINES,
    MARKERS,
    edges_axis,
    legend,
    log_axis,
    new_figure,
    plain,
    short,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RAW, RMS = "share_above_", "rms_share_above_"
MEASURES = (
    ("effective_edges", "effective edges"),
    ("hoyer", "Hoyer sparsity"),
    ("gini", "Gini coefficient"),
)


def thresholds_of(runs: Sequence[Judged], measure: str) -> list[str]:
    """Return the thresholds for which some run has `jacobian/<measure><threshold>`, as they are written, in order."""
    pattern = re.compile(rf"jacobian/{re.escape(measure)}([0-9.e-]+)")
    found = {match[1] for run in runs for key in run.figures if (match := pattern.fullmatch(key))}
    return sorted(found, key=float)


@styled
def threshold_bars(runs: Sequence[Judged], measure: str = RAW) -> "Figure":
    """Bars of the share of entries above each threshold, runs side by side, whiskers of one standard error."""
    thresholds = thresholds_of(runs, measure)
    figure, (axes,) = new_figure(height=3.4 + 0.25 * len(runs))
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        keys = [f"jacobian/{measure}{threshold}" for threshold in thresholds]
        places = np.arange(len(thresholds)) + (number - (len(runs) - 1) / 2) * width
        heights = [100 * _known(run.mean(key)) for key in keys]
        errors = [100 * (run.error(key) or 0.0) for key in keys]
        axes.bar(places, heights, width * 0.94, yerr=errors, label=short(run.name), ecolor="#7f7f7f", **_bar(number))
    axes.set_xticks(range(len(thresholds)), thresholds)
    axes.set_xlabel("threshold on |J|" if measure == RAW else "threshold on |J| / rms of the token")
    axes.set_ylabel("entries above it, %")
    axes.grid(visible=False, axis="x")
    legend(axes)
    return figure


@styled
def measure_bars(runs: Sequence[Judged]) -> "Figure":
    """One row of bars for each scale-free measure: runs below each other, whiskers of one standard error."""
    shown = [(key, label) for key, label in MEASURES if any(run.mean(f"jacobian/{key}") is not None for run in runs)]
    figure, axes_list = new_figure(len(shown), 1, height=len(shown) * (0.75 + 0.26 * len(runs)) + 0.3)
    for axes, (key, label) in zip(axes_list, shown, strict=True):
        _horizontal_bars(axes, runs, f"jacobian/{key}", label)
    return figure


@styled
def random_model_bars(runs: Sequence[Judged], threshold: str) -> "Figure":
    """Raw share and effective edges for language models as they are and with weights drawn anew."""
    figure, axes_list = new_figure(2, 1, height=2 * (0.9 + 0.3 * len(runs)) + 0.3)
    keys = ((f"jacobian/{RAW}{threshold}", f"share of entries above {threshold}"), ("jacobian/effective_edges", None))
    for axes, (key, label) in zip(axes_list, keys, strict=True):
        _horizontal_bars(axes, runs, key, label or "effective edges")
    return figure


@styled
def abs_distribution(runs: Sequence[Judged], kind: str, *, cumulative: bool) -> "Figure":
    """|J| (`kind` abs) or |J| over the token's rms (`kind` rms): its histogram or its distribution function.

    The array `histogram_<kind>_input` or `_reconstruction` is chosen by the setting at which the pair was trained.
    Exact zeros are left out, and their share stands in the legend.
    """
    figure, (axes,) = new_figure(height=3.4 + 0.25 * len(runs))
    low, high = math.inf, 0.0
    for number, run in enumerate(runs):
        edges, counts = histogram(run, kind)
        zeros, counts = counts[0] / max(counts.sum(), 1), counts[1:]
        total = max(counts.sum(), 1.0)
        color, line = COLORS[number % len(COLORS)], LINES[number % len(LINES)]
        label = short(run.name) + (f" ({100 * zeros:.3g} % zeros)" if zeros else "")
        if cumulative:
            share = counts.cumsum()[:-1] / total
            axes.plot(edges, 100 * share, color=color, linestyle=line, label=label)
            inner = edges[(share > 0.001) & (share < 0.9999)]
        else:
            per_decade = counts[1:-1] / total / np.diff(np.log10(edges))
            axes.stairs(100 * per_decade, edges, color=color, linestyle=line, linewidth=1.8, label=label)
            inner = edges[:-1][per_decade > 1e-3 * max(per_decade.max(), 1e-30)]
        if len(inner):
            low, high = min(low, inner[0]), max(high, inner[-1] * 1.3)
    axes.set_xscale("log")
    if high > low:
        axes.set_xlim(low, high)
    log_axis(axes.xaxis)
    axes.set_xlabel("|J|" if kind == "abs" else "|J| / rms of the token")
    axes.set_ylabel("entries below, %" if cumulative else "entries per decade, %")
    axes.set_ylim(bottom=0)
    legend(axes, always=any(histogram(run, kind)[1][0] > 0 for run in runs))
    return figure


@styled
def top_share_curve(runs: Sequence[Judged]) -> "Figure":
    """The share of sum|J| in the m largest entries of a token, against m."""
    figure, (axes,) = new_figure(height=3.4 + 0.25 * len(runs))
    sizes: set[float] = set()
    for number, run in enumerate(runs):
        points = top_shares(run)
        sizes |= {float(m) for m, _, _ in points}
        axes.errorbar(
            [m for m, _, _ in points],
            [100 * share for _, share, _ in points],
            yerr=[100 * (error or 0.0) for _, _, error in points],
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            label=short(run.name),
        )
    axes.set_xscale("log")
    edges_axis(axes.xaxis, sorted(sizes))
    axes.set_ylim(0, 103)
    axes.set_xlabel("largest entries of a token, m")
    axes.set_ylabel("share of sum |J|, %")
    legend(axes)
    return figure


@styled
def heat_maps(run: Judged, *, normalized: bool, limit: int = 8) -> "Figure":
    """Maps of |J| of example tokens on one log colour scale; `normalized`: each divided by its root mean square."""
    from matplotlib.colors import LogNorm

    maps = np.abs(run.arrays["heatmap"][:limit].astype(np.float64))
    if normalized:
        scale = np.sqrt((maps**2).mean(axis=(1, 2), keepdims=True))
        maps = maps / np.where(scale > 0, scale, 1)
    positive = maps[maps > 0]
    high = float(positive.max()) if len(positive) else 1.0
    low = max(float(np.quantile(positive, 0.05)) if len(positive) else high / 10, high / 1e4)
    norm = LogNorm(low if low < high else high / 10, high)
    rows = math.ceil(len(maps) / 2)
    figure, axes_list = new_figure(rows, 2, height=0.9 + 2.25 * rows)
    positions = run.arrays.get("heatmap_position")
    image = None
    for number, axes in enumerate(axes_list):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        if number >= len(maps):
            axes.set_visible(False)
            continue
        values = np.where(maps[number] > 0, maps[number], np.nan)
        axes.set_facecolor("#b9b9b9")
        image = axes.imshow(values, norm=norm, cmap=COLOR_MAP, interpolation="nearest", aspect="auto")
        if positions is not None:
            axes.set_title(f"seq. {positions[number, 0]}, pos. {positions[number, 1]}")
    axes_list[max(0, 2 * (rows - 1))].set_xlabel("input latents")
    axes_list[0].set_ylabel("output latents")
    if image is not None:
        bar = figure.colorbar(image, ax=axes_list, location="bottom", shrink=0.9, extend="both", aspect=30)
        bar.set_label("|J| / rms of the token" if normalized else "|J|")
        log_axis(bar.ax.xaxis)
    return figure


def histogram(run: Judged, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and counts (see `jacobian_metrics.abs_histogram`) at the trained setting."""
    at = str(run.evaluation.get("at") or "input")
    return run.arrays["histogram_edges"].astype(np.float64), run.arrays[f"histogram_{kind}_{at}"].astype(np.float64)


def has_histogram(run: Judged, kind: str) -> bool:
    """Whether the run's arrays hold what `histogram` reads."""
    at = str(run.evaluation.get("at") or "input")
    return "histogram_edges" in run.arrays and f"histogram_{kind}_{at}" in run.arrays


def top_shares(run: Judged) -> list[tuple[int, float, float | None]]:
    """Return (m, share, standard error) for each `jacobian/top_share_<m>`, by m."""
    prefix = "jacobian/top_share_"
    return sorted(
        (int(key.removeprefix(prefix)), value.mean, value.standard_error)
        for key, value in run.figures.items()
        if key.startswith(prefix) and key.removeprefix(prefix).isdecimal()
    )


def _horizontal_bars(axes: Any, runs: Sequence[Judged], key: str, label: str) -> None:
    heights = [_known(run.mean(key)) for run in runs]
    errors = [run.error(key) or 0.0 for run in runs]
    for number, (run, height, error) in enumerate(zip(runs, heights, errors, strict=True)):
        axes.barh(number, height, 0.8, xerr=error, ecolor="#7f7f7f", label=short(run.name), **_bar(number))
        if math.isfinite(height):
            axes.annotate(
                f"{height:.3g}", (height + error, number), xytext=(4, 0), textcoords="offset points", va="center"
            )
    axes.set_yticks(range(len(runs)), [short(run.name, 28) for run in runs])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_title(label, loc="left")
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(plain)


def _bar(number: int) -> dict[str, Any]:
    hatches = ("", "//", "..", "xx")
    return {
        "color": COLORS[number % len(COLORS)],
        "hatch": hatches[number // len(COLORS) % len(hatches)],
        "edgecolor": "#fefefe",
    }


def _known(value: float | None) -> float:
    return math.nan if value is None else value
