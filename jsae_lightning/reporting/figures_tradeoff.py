"""Figures of a sweep over the penalty's weight: what sparsity costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsae_lightning.frontier import penalty_name
from jsae_lightning.reporting.readers import Judged, unique_names
from jsae_lightning.reporting.style import COLORS, LINES, MARKERS, legend, new_figure, plain, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
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


def lines_of(runs: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Return what a line may join, by label: runs that share MLP, k, penalty, `at` and edges, by weight.

    A run without a penalty begins the lines of every penalty on its MLP, k and `at`, or has one of its own where there
    is none. The label names the penalty, and the model and k where they differ.
    """
    ordered = sorted(runs, key=lambda run: run.coef or 0.0)
    bases = list(dict.fromkeys(_base(run) for run in ordered))
    lines: dict[tuple[Any, ...], list[Judged]] = {}
    for run in ordered:
        if run.coef:
            lines.setdefault((_base(run), _penalty(run)), []).append(run)
    for base in bases:
        start = [run for run in ordered if not run.coef and _base(run) == base]
        own = [key for key in lines if key[0] == base]
        for key in own:
            lines[key] = [*start, *lines[key]]
        if start and not own:
            lines[(base, "no penalty")] = start
    models = _models([members[-1] for members in lines.values()])
    labels = [penalty if len(bases) == 1 else f"{model}: {penalty}"
              for model, (_, penalty) in zip(models, lines, strict=True)]  # fmt: skip
    return dict(zip(unique_names(labels), lines.values(), strict=True))


@styled
def trade_off(runs: Sequence[Judged], key: str) -> "Figure":
    """Two panels, CE score and explained variance, against sparsity; points are labelled by the weight.

    One line per `lines_of`, never across penalties: a single one has a colour for each quality, several have a colour
    or dash each and a marker for each quality. Runs on random models are hollow and joined by nothing.
    """
    chosen = plotted(runs, key)
    lines = lines_of([run for run in chosen if not run.is_random])
    drawn = [run for run in chosen if run.is_random]
    figure, axes_list = new_figure(2, 1, height=8.2 + 0.3 * max(0, len(lines) - 1))
    for axes, (title, series) in zip(axes_list, QUALITIES, strict=True):
        for number, (quality, label) in enumerate(series):
            look: dict[str, Any] = {"marker": MARKERS[number]}
            for row, (name, members) in enumerate(lines.items()):
                points = _places(members, key, quality)
                if not points:
                    continue
                if len(lines) > 1:
                    look |= _line_look(row)
                else:
                    look |= {"color": COLORS[number]}
                axes.errorbar(
                    [x for x, _, _ in points],
                    [y for _, y, _ in points],
                    xerr=[_error(run, key) for _, _, run in points],
                    yerr=[run.error(quality) or 0.0 for _, _, run in points],
                    label=f"{name}, {label}" if len(lines) > 1 else label,
                    **look,
                )
            if hollow := _places(drawn, key, quality):
                axes.plot(
                    [x for x, _, _ in hollow],
                    [y for _, y, _ in hollow],
                    color=COLORS[-1] if len(lines) > 1 else COLORS[number],
                    linestyle="none",
                    marker=MARKERS[number],
                    markerfacecolor="none",
                    label="random models" if number == 0 else None,
                )
            if number == 0:
                offset = -18 if title == "CE score" else 9  # outside of the other curves
                for x, y, run in _places(chosen, key, quality):
                    axes.annotate(
                        f"{run.coef:g}", (x, y), xytext=(0, offset), textcoords="offset points", ha="center", zorder=5
                    )
        axes.margins(0.1, 0.16)
        axes.set_ylabel(title)
        axes.xaxis.set_major_formatter(plain)
        axes.set_xlabel("entries above .01 in one token" if key == SHARE else "effective edges of one token")
        _trade_off_legend(axes, [label for _, label in series], list(lines))
    return figure


def _trade_off_legend(axes: "Axes", qualities: Sequence[str], lines: Sequence[str]) -> None:
    """Name the qualities, or, with several lines, their colours and the qualities' markers once each."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if len(lines) > 1:
        entries: list[tuple[Artist, str]] = [
            (Line2D([], [], **_line_look(row)), name) for row, name in enumerate(lines)
        ]
        entries += [
            (Line2D([], [], color=COLORS[-1], linestyle="none", marker=MARKERS[number]), label)
            for number, label in enumerate(qualities)
        ]
        entries += [entry for entry in zip(handles, labels, strict=True) if entry[1] == "random models"]
        handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _places(runs: Sequence[Judged], key: str, quality: str) -> list[tuple[float, float, Judged]]:
    """Return (sparsity, quality, run) for the runs of which both are known."""
    return [
        (x, y, run) for run in runs if (x := sparsity(run, key)) is not None and (y := run.mean(quality)) is not None
    ]


def _line_look(row: int) -> dict[str, Any]:
    return {"color": COLORS[row % len(COLORS)], "linestyle": LINES[row // len(COLORS) % len(LINES)]}


def _base(run: Judged) -> tuple[Any, ...]:
    """What two pairs must share for a line between them, beside the penalty: MLP, k and latents of both SAEs, tokens of
    training, and where the MLP is linearised.
    """  # noqa: D205
    jacobian = run.pair.get("jacobian", {})
    sizes = [run.pair.get(f"{side}_sae", {}).get(key) for key in ("k", "d_sae") for side in ("input", "output")]
    return (run.pair.get("model", {}).get("mlp_hash"), *sizes, run.pair.get("tokens_seen"), jacobian.get("at"))


def _penalty(run: Judged) -> str:
    jacobian = run.pair.get("jacobian", {})
    return penalty_name(jacobian) if "penalty" in jacobian else "unknown penalty"


def _models(runs: Sequence[Judged]) -> list[str]:
    """The model, layer and k of each, and what else of their sizes is not the same in all of them."""
    extras = {
        " latents": [run.pair.get("input_sae", {}).get("d_sae") for run in runs],
        " tokens": [run.pair.get("tokens_seen") for run in runs],
    }
    names = []
    for number, run in enumerate(runs):
        model, k = run.pair.get("model", {}), run.pair.get("input_sae", {}).get("k")
        name = f"{Path(str(model.get('name'))).name} {model.get('layer')}, k={k}"
        for unit, values in extras.items():
            if len(set(values)) > 1 and values[number] is not None:
                name += f", {values[number]:,}{unit}"
        names.append(name)
    return names


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
