"""Figures of a sweep over the penalty's weight: what sparsity costs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jsae_lightning.reporting.readers import Judged
from jsae_lightning.reporting.style import COLORS, MARKERS, legend, new_figure, plain, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = "jacobian/share_above_0.01"
EFFECTIVE = "jacobian/effective_edges"
QUALITIES = (
    (
        "CE score",
        (
            ("val/ce_score_both", "both SAEs"),
            ("val/ce_score_input", "input SAE"),
            ("val/ce_score_output", "output SAE"),
        ),
    ),
    (
        "explained variance",
        (("val/explained_variance_input", "input SAE"), ("val/explained_variance_output", "output SAE")),
    ),
)


def sparsity(run: Judged, key: str) -> float | None:
    """Return a run's place on the axis: entries of one token above .01, or its effective edges."""
    value = run.mean(key)
    return value * run.entries if value is not None and key == SHARE else value


def can_draw(runs: Sequence[Judged], key: str) -> bool:
    """Whether two runs of different weights have what the figure needs."""
    return len({run.coef for run in plotted(runs, key)}) > 1


def plotted(runs: Sequence[Judged], key: str) -> list[Judged]:
    """Return the runs that have a place on the axis and a weight, by weight."""
    known = [run for run in runs if sparsity(run, key) is not None and run.coef is not None]
    return sorted(known, key=lambda run: run.coef or 0.0)


@styled
def trade_off(runs: Sequence[Judged], key: str) -> "Figure":
    """Two panels, CE score and explained variance, against sparsity; points of a curve are labelled by the weight."""
    figure, axes_list = new_figure(2, 1, height=8.2)
    chosen = plotted(runs, key)
    for axes, (title, series) in zip(axes_list, QUALITIES, strict=True):
        for number, (quality, label) in enumerate(series):
            points = [
                (place, height, run)
                for run in chosen
                if (place := sparsity(run, key)) is not None and (height := run.mean(quality)) is not None
            ]
            if not points:
                continue
            real = [point for point in points if not point[2].is_random]
            style: dict[str, Any] = {"color": COLORS[number], "marker": MARKERS[number]}
            axes.errorbar(
                [p[0] for p in real],
                [p[1] for p in real],
                xerr=[_error(run, key) for _, _, run in real],
                yerr=[run.error(quality) or 0.0 for _, _, run in real],
                label=label,
                **style,
            )
            drawn = [point for point in points if point[2].is_random]
            if drawn:
                axes.plot(
                    [p[0] for p in drawn],
                    [p[1] for p in drawn],
                    linestyle="none",
                    markerfacecolor="none",
                    label="random models" if number == 0 else None,
                    **style,
                )
            if number == 0:
                offset = -18 if title == "CE score" else 9  # outside of the other curves
                for x, y, run in points:
                    axes.annotate(
                        f"{run.coef:g}", (x, y), xytext=(0, offset), textcoords="offset points", ha="center", zorder=5
                    )
        axes.margins(0.1, 0.16)
        axes.set_ylabel(title)
        axes.xaxis.set_major_formatter(plain)
        axes.set_xlabel("entries above .01 in one token" if key == SHARE else "effective edges of one token")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


@styled
def shrink_matched_bars(rows: Sequence[tuple[str, str, float | None, float | None]]) -> "Figure":
    """Pairs of bars: (label, measure, sparse pair's value, the shrunk baseline's value), in %."""
    figure, (axes,) = new_figure(height=1.7 + 0.62 * len(rows))
    for number, (_, _, own, shrunk) in enumerate(rows):
        for offset, value, name, color in (
            (-0.2, own, "this pair", COLORS[0]),
            (0.2, shrunk, "baseline, shrunk", COLORS[1]),
        ):
            if value is not None:
                axes.barh(number + offset, 100 * value, 0.38, color=color, label=name if number == 0 else None)
    axes.set_yticks(range(len(rows)), [f"{label}{': ' if label else ''}{measure}" for label, measure, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the entries, %")
    axes.grid(visible=False, axis="y")
    legend(axes)
    return figure


def _error(run: Judged, key: str) -> float:
    error = run.error(key) or 0.0
    return error * run.entries if key == SHARE else error
