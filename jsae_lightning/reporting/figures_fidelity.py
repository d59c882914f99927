"""Figures of whether the sparse graph is the computation: edge curves, ablations, linearity, curvature."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jsae_lightning.reporting.readers import Judged
from jsae_lightning.reporting.style import COLORS, LINES, MARKERS, edges_axis, legend, log_axis, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKINGS = ("contribution", "jacobian", "integrated_gradients", "random")
CURVES = {"edge_ce": "cross-entropy, nats", "edge_kl": "KL divergence, nats", "edge_error": "relative error"}
CLASSES = ("linear", "jump_relu", "flat", "other")
CLASS_NAMES = {"linear": "linear", "jump_relu": "JumpReLU", "flat": "flat", "other": "other"}


def rankings_of(run: Judged, curve: str) -> list[str]:
    """Return the rankings for which the run has the curve, known ones first."""
    found = [key.removeprefix(f"{curve}/") for key in run.curves if key.startswith(f"{curve}/")]
    return sorted(found, key=lambda name: (RANKINGS.index(name) if name in RANKINGS else len(RANKINGS), name))


@styled
def edge_curves(run: Judged, curve: str) -> "Figure":
    """A measure of the spliced model against the edges kept per token, one line for each ranking of the edges."""
    figure, (axes,) = new_figure(height=4.1)
    counts: set[float] = set()
    for number, ranking in enumerate(rankings_of(run, curve)):
        points = run.curves[f"{curve}/{ranking}"]
        shown = [(x, y, e) for x, y, e in zip(points.x, points.y, points.standard_error, strict=True)]
        counts |= {x for x, _, _ in shown}
        axes.errorbar(
            [x for x, _, _ in shown],
            [y for _, y, _ in shown],
            yerr=[e or 0.0 for _, _, e in shown],
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=LINES[number % len(LINES)],
            label=ranking.replace("_", " "),
        )
    judged_output = "f(x_hat)" if run.evaluation.get("at") == "reconstruction" else "the true output"
    for key, label, line in (
        ("clean", "language model as it is", ":"),
        ("true", f"output SAE on {judged_output}", "-."),
    ):
        level = run.mean(f"fidelity/{curve}_{key}")
        if level is not None:
            axes.axhline(level, color="#7f7f7f", linestyle=line, linewidth=1.2, label=label)
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)  # no edge at all is a point too
    axes.set_xlim(left=-0.1)
    edges_axis(axes.xaxis, sorted(counts))
    axes.set_xlabel("edges kept per token")
    axes.set_ylabel(CURVES[curve])
    legend(axes)
    return figure


def slope_and_r2(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Return the least-squares slope through the origin of `measured` on `predicted`, and R^2 about the mean.

        slope = sum p m / sum p^2,    R^2 = 1 - sum (m - slope p)^2 / sum (m - mean m)^2

    NaN where a denominator is 0.
    """
    p, m = predicted.astype(np.float64), measured.astype(np.float64)
    squares, spread = float((p * p).sum()), float(((m - m.mean()) ** 2).sum()) if len(m) else 0.0
    slope = float((p * m).sum()) / squares if squares else math.nan
    r2 = 1 - float(((m - slope * p) ** 2).sum()) / spread if spread else math.nan
    return slope, r2


@styled
def ablation_scatter(predicted: np.ndarray, measured: np.ndarray, *, step: str) -> "Figure":
    """Measured change of an output latent against the predicted one, the line of equality, and the fitted slope."""
    figure, (axes,) = new_figure(height=4.4)
    slope, _ = slope_and_r2(predicted, measured)
    axes.plot(
        predicted, measured, linestyle="none", marker="o", markersize=3, color=COLORS[0], alpha=0.4, rasterized=True
    )
    reach = float(np.abs(predicted).max()) if len(predicted) else 1.0
    line = np.array([-reach, reach])
    axes.plot(line, line, color="#7f7f7f", linestyle=":", label="as predicted: slope 1")
    if math.isfinite(slope):
        axes.plot(line, slope * line, color=COLORS[1], label=f"fitted: slope {slope:.3g}")
    axes.set_xlabel(f"predicted change, {step}")
    axes.set_ylabel("measured change")
    axes.locator_params(nbins=5)
    legend(axes)
    return figure


def linearity_shares(run: Judged) -> dict[str, float]:
    """Return the shares of the classes among all functions; nothing if they are not known.

    Of the figures, `fidelity/flat_share` is of all functions, `fidelity/<class>_share` of those that are not flat.
    """
    found = {name: run.mean(f"fidelity/{name}_share") for name in CLASSES}
    flat = found.pop("flat")
    if flat is None:
        return {}
    return {name: (1 - flat) * (share or 0.0) for name, share in found.items()} | {"flat": flat}


@styled
def linearity_bars(runs: Sequence[Judged]) -> "Figure":
    """Bars of 100 % for each run, divided into linear, JumpReLU, flat and other functions."""
    figure, (axes,) = new_figure(height=1.7 + 0.4 * len(runs))
    left = np.zeros(len(runs))
    for number, name in enumerate(CLASSES):
        shares = np.array([100 * linearity_shares(run).get(name, 0.0) for run in runs])
        color, hatch = (COLORS[0], COLORS[4], "#b9b9b9", COLORS[3])[number], ("", "//", "", "..")[number]
        axes.barh(
            range(len(runs)),
            shares,
            0.7,
            left=left,
            color=color,
            hatch=hatch,
            edgecolor="#fefefe",
            label=CLASS_NAMES[name],
        )
        for row, (start, share) in enumerate(zip(left, shares, strict=True)):
            if share >= 9:
                axes.text(
                    start + share / 2,
                    row,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color="#111111",
                    bbox={"facecolor": "#f7f7f7", "edgecolor": "none", "pad": 1.5},
                )
        left += shares
    axes.set_yticks(range(len(runs)), [run.name[:22] for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("functions, %")
    axes.grid(visible=False)
    legend(axes)
    return figure


@styled
def example_functions(run: Judged, limit: int = 12) -> "Figure":
    """Small panels: an output latent's value while one input latent is moved, the first examples of each class."""
    classes = run.arrays["linearity_class"]
    chosen = _spread_over_classes(classes, limit)
    rows = math.ceil(len(chosen) / 2)
    figure, axes_list = new_figure(rows, 2, height=0.3 + 1.75 * rows)
    latents = run.arrays.get("linearity_latents")
    for axes, number in zip(axes_list, [*chosen, *[None] * (len(axes_list) - len(chosen))], strict=True):
        if number is None:
            axes.set_visible(False)
            continue
        kind = int(classes[number])
        axes.plot(
            run.arrays["linearity_x"][number],
            run.arrays["linearity_y"][number],
            color=(COLORS[0], COLORS[4], "#7f7f7f", COLORS[3])[kind % 4],
        )
        pair = f" {latents[number, 1]} → {latents[number, 0]}" if latents is not None else ""
        axes.set_title(f"{CLASS_NAMES[CLASSES[kind % 4]]}{pair}", loc="left")
        axes.locator_params(nbins=3)
    return figure


@styled
def second_derivatives(runs: Sequence[Judged]) -> "Figure":
    """The distribution function of the scale-free second derivatives on a log axis."""
    figure, (axes,) = new_figure(height=3.4 + 0.25 * len(runs))
    for number, run in enumerate(runs):
        values = np.sort(np.abs(run.arrays["second_derivatives"].astype(np.float64)))
        values = values[np.isfinite(values)]
        share = 100 * np.arange(1, len(values) + 1) / max(len(values), 1)
        positive = values > 0
        axes.plot(
            values[positive],
            share[positive],
            color=COLORS[number % len(COLORS)],
            linestyle=LINES[number % len(LINES)],
            label=run.name[:30],
        )
    axes.set_xscale("log")
    log_axis(axes.xaxis)
    axes.set_ylim(0, 103)
    axes.set_xlabel("|second derivative|, scale-free")
    axes.set_ylabel("functions below, %")
    legend(axes)
    return figure


def _spread_over_classes(classes: np.ndarray, limit: int) -> list[int]:
    """Return the first examples of each class in turn, so that rare classes are seen too, in the order of classes."""
    queues = [list(np.flatnonzero(classes == number)) for number in range(len(CLASSES))]
    chosen: list[int] = []
    while len(chosen) < min(limit, len(classes)) and any(queues):
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen.append(int(queue.pop(0)))
    return sorted(chosen, key=lambda number: (int(classes[number]), number))
