"""The figure of a sweep: seconds and peak memory over how often a size was doubled."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.benchmarking.growth import Growth
from jsae_lightning.benchmarking.names import OURS, OURS_WITHOUT
from jsae_lightning.reporting.style import COLORS, FAINT, MARKERS, legend, new_figure, plain, styled, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(growth: Growth, path: Path) -> None:
    """Draw the sweep to a PNG file. Raises UserError where it cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(to_png(draw_growth(growth)))


@styled
def draw_growth(growth: Growth) -> "Figure":
    """Return two panels with a line for each size, with the penalty drawn through and without it dashed.

    Both axes are logarithmic; the grey line is what grows as fast as the size.
    """
    figure, (time, memory) = new_figure(2, 1, height=7.4, sharex=True)
    for number, (axis, points) in enumerate(growth.points.items()):
        factors = [getattr(point.shape, axis) / getattr(growth.base, axis) for point in points]
        for name, line in ((OURS, "-"), (OURS_WITHOUT, "--")):
            look: dict[str, Any] = {
                "color": COLORS[number],
                "marker": MARKERS[number],
                "linestyle": line,
                "markersize": 4,
            }
            label = f"{axis} (from {getattr(growth.base, axis):,})" if name == OURS else None
            time.plot(factors, [point.medians[name] for point in points], label=label, **look)
            peaks = [(f, peak) for f, p in zip(factors, points, strict=True) if (peak := p.peak_bytes[name])]
            memory.plot([f for f, _ in peaks], [peak / 1e6 for _, peak in peaks], **look)
    most = max(len(points) for points in growth.points.values())
    factors = [2.0**power for power in range(most)]
    first = growth.points[next(iter(growth.points))][0]
    for axes, start in ((time, first.medians[OURS]), (memory, (first.peak_bytes[OURS] or 0) / 1e6)):
        if start:
            axes.plot(factors, [start * factor for factor in factors], color=FAINT, linewidth=4, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.set_xticks(factors)
    time.set_ylabel("seconds a step")
    memory.set_ylabel("peak memory, MB")
    memory.set_xlabel("size, times that of the start")
    time.set_title("with the penalty (lines), without it (dashed)")
    legend(time, always=True)
    return figure
