"""The frontiers of penalties: what sparsity costs in explained variance, a panel for each measure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jsae_lightning.reporting.style import COLORS, LINES, MARKERS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[list[tuple[float, float]], list[tuple[float, float]]]
"""A penalty's points, and the line through those on its frontier: (explained variance lost, measure)."""

_TICKS = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@styled
def draw_panels(panels: Mapping[str, dict[str, Curve]], limits: Mapping[str, tuple[float, float]]) -> "Figure":
    """Draw panels (measure: its curves by penalty) below each other; a penalty looks the same in all.

    `limits` of a measure: what lies beyond them is not shown.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure, every_axes = new_figure(rows=len(panels), height=3.2 * len(panels) + 1 + 0.22 * len(names), sharex=True)
    for axes, (measure, curves) in zip(every_axes, panels.items(), strict=True):
        for number, name in enumerate(names):
            points, line = curves[name]
            look: dict[str, Any] = {"color": COLORS[number % len(COLORS)]}
            axes.plot(*zip(*line, strict=True), linestyle=LINES[number // len(COLORS) % len(LINES)], **look)
            marker = MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
            label = name if axes is every_axes[0] else None
            axes.plot(*zip(*points, strict=True), linestyle="none", marker=marker, markersize=5, label=label, **look)
        axes.set_ylabel(measure)
        axes.axvline(0.02, linestyle=":", color="#7f7f7f", linewidth=1)
        if measure in limits:
            (bottom, top), (lowest, highest) = axes.get_ylim(), limits[measure]
            axes.set_ylim(max(bottom, lowest), min(top, highest))
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(0, None)
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.set_xlabel("explained variance lost")
    figure.legend(loc="outside lower center", ncols=2 if max(map(len, names)) <= 18 else 1)
    return figure
