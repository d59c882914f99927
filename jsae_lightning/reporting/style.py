"""How figures look: colours that colour-blind people can tell apart, sizes, and the two formats they are kept in.

A figure is 5 inches wide with letters of 12 points, so that it can be read in a column of 360 pixels. In the page its
ink and paper follow the light or dark theme: they are drawn in two colours that stand for nothing else and that
`inline_svg` replaces by CSS variables.
"""

import re
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
INK, PAPER, FAINT = "#1b1f24", "#fefefe", "#c9ced6"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Okabe and Ito's, those put first that can be told from both papers; two greys at the end."""
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
COLOR_MAP = "cividis"

_SETTINGS: Any = {
    "text.parse_math": False,  # names hold "$" and mean it
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


def new_figure(rows: int = 1, columns: int = 1, *, height: float = 3.6, **more: Any) -> "tuple[Figure, list[Axes]]":
    """Return a figure in the report's style and its axes in reading order, without pyplot's global state."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), dpi=144, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, list(axes.flat)


def styled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Draw in the report's style: matplotlib reads some settings only when a thing is added to a figure."""
    from functools import wraps

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return wrapper


def plain(value: float, _position: Any = None) -> str:
    """Return a tick's text without mathematical markup: 0.001, 25, 1e-05."""
    return f"{value:g}"


def log_axis(axis: Any) -> None:
    """Label the decades of a log axis, every second one if there are many, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, numticks=6))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def edges_axis(axis: Any, values: list[float]) -> None:
    """Label a log axis of edge counts by at most six of the counts themselves."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    chosen = sorted(value for value in set(values) if value > 0)
    while len(chosen) > 5:
        chosen = chosen[::-1][::2][::-1]
    chosen += [0.0] if 0 in values else []
    axis.set_major_locator(FixedLocator(chosen))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def legend(axes: "Axes", *, always: bool = False) -> None:
    """Put a legend below the axes, where it hides nothing, if there is something to tell apart or `always`."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or (always and labels):
        columns = 2 if max(map(len, labels)) <= 18 else 1
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def short(name: str, length: int = 30) -> str:
    """Return a name's beginning and end if it is long."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}...{name[-(length // 2 - 2) :]}"


def to_png(figure: "Figure") -> bytes:
    """Return the figure as a PNG file."""
    png = _save(figure, "png")
    figure.set_layout_engine("none")  # everything has its place now: finding it anew would double the time
    return png


def to_svg(figure: "Figure") -> str:
    """Return the figure as an SVG file, the same for the same data."""
    return _save(figure, "svg").decode("utf-8")


def inline_svg(svg: str, *, title: str, key: str) -> str:
    """Return an SVG file as an element of a page: no header, no ids that another could have, colours of the theme.

    `title` is what a screen reader says; `key` is unique on the page.
    """
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", svg)  # matplotlib's names of groups: nothing refers to them
    svg = _without_repeated_ids(svg)
    svg = re.sub(r'(id="|href="#|url\(#)((?:image|[a-z])[0-9a-f]{6,})', rf"\1{key}-\2", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r"<svg", f'<svg role="img" aria-label="{escape(title)}"', svg, count=1)
    for color, variable in ((INK, "--ink"), (PAPER, "--paper"), (FAINT, "--line")):
        svg = re.sub(color, f"var({variable})", svg, flags=re.IGNORECASE)
    # Real letters inherit the page's font; one without an explicit fill would be black in the dark.
    return svg.replace("<text ", '<text fill="var(--ink)" ')


def _without_repeated_ids(svg: str) -> str:
    """Drop the ids of all definitions but the first of those that matplotlib repeats, the same, for each axes."""
    seen: set[str] = set()

    def first_only(match: re.Match[str]) -> str:
        known = match[1] in seen
        seen.add(match[1])
        return "" if known else match[0]

    return re.sub(r' id="([^"]+)"', first_only, svg)


def _save(figure: "Figure", kind: str) -> bytes:
    """Print by the canvas itself: `Figure.savefig` would draw everything once more before."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = BytesIO()
    settings: Any = {**_SETTINGS, "svg.hashsalt": "report"}
    with rc_context(settings):
        if kind == "svg":
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
        else:
            FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()
