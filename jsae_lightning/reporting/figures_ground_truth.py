"""A found graph beside the true one, for synthetic models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jsae_lightning.ground_truth import GroundTruth
from jsae_lightning.reporting.style import COLOR_MAP, COLORS, LINES, legend, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def precision_recall_curves(truths: Mapping[str, GroundTruth]) -> "Figure":
    """Precision against recall of the found edges, strongest first; dotted: the precision of a random ranking."""
    figure, (axes,) = new_figure(height=3.6 + 0.25 * len(truths))
    for number, (name, truth) in enumerate(truths.items()):
        color = COLORS[number % len(COLORS)]
        axes.plot(
            truth.curve.recall.numpy(),
            truth.curve.precision.numpy(),
            color=color,
            linestyle=LINES[number % len(LINES)],
            label=f"{name}: average precision {truth.curve.average_precision:.2f}",
        )
        axes.axhline(truth.figures["ground_truth/base_rate"], color=color, linestyle=":", linewidth=1.0)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("recall: true edges that are kept")
    axes.set_ylabel("precision: kept edges that are true")
    legend(axes, always=True)
    return figure


def found_in_true_order(truth: GroundTruth) -> np.ndarray:
    """Return the found edges' weights in the order of the true features, float64 (n_out, n_in).

    NaN where no latent stands for the output or the input feature.
    """
    rows, columns = truth.matching_out.latent_of, truth.matching_in.latent_of
    found = truth.found[rows.clamp_min(0)][:, columns.clamp_min(0)].numpy().copy()
    found[(rows < 0).numpy()] = np.nan
    found[:, (columns < 0).numpy()] = np.nan
    return found


@styled
def graph_matrices(truth: GroundTruth) -> "Figure":
    """The true graph above the found one, the latents in the order of the features that they stand for.

    Each is divided by its largest entry. Grey: a feature that no latent stands for. White dots mark the true edges.
    """
    figure, axes_list = new_figure(2, 1, height=6.4)
    true = truth.true.numpy()
    for axes, values, title in zip(
        axes_list, (true, found_in_true_order(truth)), ("true graph", "found graph"), strict=True
    ):
        largest = np.nanmax(values) if np.isfinite(values).any() else 1.0
        axes.set_facecolor("#b9b9b9")
        image = axes.imshow(
            values / (largest or 1.0), vmin=0, vmax=1, cmap=COLOR_MAP, interpolation="nearest", aspect="auto"
        )
        axes.set_title(title, loc="left")
        axes.set_ylabel("output features")
        axes.grid(visible=False)
    rows, columns = np.nonzero(true > 0)
    axes_list[1].plot(columns, rows, linestyle="none", marker="o", markersize=2, color="#fefefe")
    axes_list[1].set_xlabel("input features")
    bar = figure.colorbar(image, ax=axes_list, location="bottom", shrink=0.9, aspect=30)
    bar.set_label("mean |J| / its largest")
    return figure
