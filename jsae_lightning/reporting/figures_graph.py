"""Figures of the global graph: how the mean |J| is distributed over pairs of latents."""

from typing import TYPE_CHECKING

import numpy as np

from jsae_lightning.reporting.style import COLORS, log_axis, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def edge_distribution(mean_abs: np.ndarray) -> "Figure":
    """A histogram on log axes of mean |J| over the pairs that were seen active together."""
    positive = mean_abs[mean_abs > 0].astype(np.float64)
    figure, (axes,) = new_figure()
    if len(positive):
        low, high = positive.min(), positive.max()
        bins = np.logspace(np.log10(low) - 0.05, np.log10(high) + 0.05, 41).tolist()
        axes.hist(positive, bins=bins, color=COLORS[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    axes.set_xlabel("mean |J| of a pair of latents")
    axes.set_ylabel("pairs")
    return figure


def cumulative_share(sum_abs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of edges 1, 2, ... (at most 400 of them, spread on a log scale) and the share of the total of
    |J| that so many of the strongest hold, from each edge's sum of |J| over tokens.
    """  # noqa: D205
    values = np.sort(sum_abs.astype(np.float64))[::-1]
    total = values.sum()
    if not len(values) or total <= 0:
        return np.empty(0), np.empty(0)
    counts = np.unique(np.geomspace(1, len(values), 400).round().astype(np.int64))
    return counts, values.cumsum()[counts - 1] / total


@styled
def cumulative_edges(sum_abs: np.ndarray) -> "Figure":
    """The share of all |J|, summed over tokens, in the strongest edges, against their number."""
    counts, share = cumulative_share(sum_abs)
    figure, (axes,) = new_figure()
    axes.plot(counts, 100 * share, color=COLORS[0])
    for level in (50, 90, 99):
        if len(share):
            first = int(np.argmax(share >= level / 100))
            axes.plot(counts[first], 100 * share[first], "o", color=COLORS[1])
            axes.annotate(
                f"{level} %: {counts[first]:,}",
                (counts[first], 100 * share[first]),
                xytext=(-8, 2),
                textcoords="offset points",
                ha="right",
            )
    axes.set_xscale("log")
    log_axis(axes.xaxis)
    axes.set_ylim(0, 105)
    axes.set_xlabel("strongest edges of the global graph")
    axes.set_ylabel("share of the sum of |J|, %")
    return figure
