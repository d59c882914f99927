"""Which figures a report has: each with its caption and alternative text, or a sentence on what to run to get it."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jsae_lightning.reporting import figures_fidelity, figures_graph, figures_jacobian, figures_tradeoff
from jsae_lightning.reporting.graph_reader import Graph
from jsae_lightning.reporting.readers import EVAL_FOLDER, EXPORT, Comparison, Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SERIES = 8
"""Runs in one figure: more colours could not be told apart."""


@dataclass(frozen=True)
class Item:
    """A figure of the report. `draw` is None if its data are missing; `text` then says what to run."""

    key: str
    title: str
    text: str
    """The caption: what is to be seen."""
    draw: "Callable[[], Figure] | None" = None
    alt: str = ""


def shown_runs(runs: Sequence[Judged]) -> list[Judged]:
    """Return the runs that figures show: at most MAX_SERIES, evenly spread, the first and the last included."""
    if len(runs) <= MAX_SERIES:
        return list(runs)
    step = (len(runs) - 1) / (MAX_SERIES - 1)
    return [runs[round(number * step)] for number in range(MAX_SERIES)]


def jacobian_items(runs: Sequence[Judged]) -> list[Item]:
    """The Jacobian of all runs together: raw thresholds, and beside them what scaling J cannot change."""
    runs = shown_runs(runs)
    items = []
    for measure, key, title, text in (
        (
            figures_jacobian.RAW,
            "thresholds",
            "Entries above thresholds",
            "How many of a token's k × k entries exceed a fixed threshold. Lower bars are sparser or merely smaller: "
            "a Jacobian that is only scaled down has low bars too. Compare with the figures that follow.",
        ),
        (
            figures_jacobian.RMS,
            "thresholds-normalised",
            "Entries above multiples of the token's root mean square",
            "The same after each token's J is divided by its root mean square, so that scale is gone. A sparse J has "
            "low bars at .5 and 1 and a high one at 4.",
        ),
    ):
        some = [run for run in runs if figures_jacobian.thresholds_of([run], measure)]
        items.append(
            _item(
                key,
                title,
                text,
                some,
                runs,
                partial(figures_jacobian.threshold_bars, some, measure),
            )
        )
    names = [f"jacobian/{key}" for key, _ in figures_jacobian.MEASURES]
    some = [run for run in runs if any(name in run.figures for name in names)]
    items.append(
        _item(
            "scale-free",
            "Scale-free measures",
            "Effective edges (Σ|J|)² / ΣJ² of a token: fewer is sparser. Hoyer sparsity and Gini coefficient: 0 if all "
            "entries are equal, towards 1 if few edges hold everything. None of them changes when J is scaled.",
            some,
            runs,
            lambda: figures_jacobian.measure_bars(some),
        )
    )
    with_top = [run for run in runs if figures_jacobian.top_shares(run)]
    items.append(
        _item(
            "top-shares",
            "Share of the largest entries",
            "What share of a token's Σ|J| its m largest entries hold. The higher the curve on the left, the sparser.",
            with_top,
            runs,
            lambda: figures_jacobian.top_share_curve(with_top),
        )
    )
    return items + _distribution_items(runs)


def _distribution_items(runs: Sequence[Judged]) -> list[Item]:
    items = []
    for kind, what in (("abs", "|J|"), ("rms", "|J| over the token's root mean square")):
        some = [run for run in runs if figures_jacobian.has_histogram(run, kind)]
        for cumulative, form, text in (
            (False, "Histogram", "How often each size occurs, on a log axis. A shift to the left is shrinkage; "
             "sparsity makes the distribution wider."),
            (True, "Cumulative distribution", "The share of the entries below a size, on a log axis. A curve that is "
             "only moved to the left is shrinkage; a flatter one is sparser."),
        ):  # fmt: skip
            items.append(
                _item(
                    f"{form.lower().split()[0]}-{kind}",
                    f"{form} of {what}",
                    text + (" Here scale is gone: only the shape differs." if kind == "rms" else ""),
                    some,
                    runs,
                    partial(figures_jacobian.abs_distribution, some, kind, cumulative=cumulative),
                )
            )
    return items


def comparison_items(runs: Sequence[Judged], comparison: Comparison | None) -> list[Item]:
    """What only several runs can show: trade-off, random models, the shrink-matched baseline."""
    items = []
    for key, name, what in (
        (figures_tradeoff.SHARE, "trade-off-raw", "entries above .01"),
        (figures_tradeoff.EFFECTIVE, "trade-off-scale-free", "effective edges"),
    ):
        title = f"What sparsity costs: against {what}"
        text = (
            "Each point is a run, labelled by the weight of the Jacobian penalty; lines join runs of one penalty on "
            "one model. Further left is sparser, higher is more faithful; look for the weight at "
            "which the curve falls off."
        )
        if figures_tradeoff.can_draw(runs, key):
            items.append(_item(name, title, text, runs, runs, partial(figures_tradeoff.trade_off, runs, key)))
        else:
            items.append(Item(name, title, "It needs runs of two weights: train a sweep over jacobian.coef, as in "
                              "`jsae-train -m jacobian.coef=0,0.5,1`, and report on its folder."))  # fmt: skip
    drawn = shown_runs(sorted(runs, key=lambda run: (run.is_random, run.coef or 0.0)))
    thresholds = figures_jacobian.thresholds_of(drawn, figures_jacobian.RAW)
    threshold = "0.01" if "0.01" in thresholds else (thresholds or ["0.01"])[0]
    title = "Against a language model of random weights"
    if {run.is_random for run in drawn} == {True, False} and thresholds:
        text = (
            "The same training on a language model whose weights were drawn anew. If its Jacobians are as sparse, "
            "sparsity says nothing about what the model has learnt."
        )
        items.append(
            _item(
                "random-models",
                title,
                text,
                drawn,
                drawn,
                lambda: figures_jacobian.random_model_bars([_named_by_kind(run) for run in drawn], threshold),
            )
        )
    else:
        items.append(Item("random-models", title, "It needs a run on the real model and one with "
                          "`model.random_weights=true`: train one and put it beside the others."))  # fmt: skip
    return [*items, _shrink_item(runs, comparison)]


def _shrink_item(runs: Sequence[Judged], comparison: Comparison | None) -> Item:
    """Raw thresholds of a sparse pair beside those of the baseline made as small."""
    title = "Against the shrunk baseline"
    rows = []
    matches = comparison.matches(runs) if comparison else []
    for own, match in matches:
        for key, figure in sorted(match["figures"].items()):
            prefix = f"jacobian/{figures_jacobian.RAW}"
            if key.startswith(prefix) and own.mean(key) is not None:
                label = own.name[:14] if len(matches) > 1 else ""
                rows.append((label, f"> {key.removeprefix(prefix)}", own.mean(key), figure.mean))
    rows = rows[:24]
    if not rows:
        command = "`jsae-eval --compare RUN BASELINE`"
        return Item("shrunk-baseline", title, f"It needs a comparison with a pair of weight 0: run {command}.")
    return Item(
        "shrunk-baseline",
        title,
        "The pair trained without the penalty, its J multiplied by the ratio of the means of |J|: as small as the "
        "sparse pair's, and no sparser than before. Where the bars agree, the penalty did no more than shrink.",
        lambda: figures_tradeoff.shrink_matched_bars(rows),
        f"Bars of the shares above {len(rows)} thresholds for the pair and for the shrunk baseline.",
    )


def fidelity_items(runs: Sequence[Judged]) -> list[Item]:
    """Linearity and curvature of all runs together."""
    runs = shown_runs(runs)
    classified = [run for run in runs if figures_fidelity.linearity_shares(run)]
    curved = [run for run in runs if len(run.arrays.get("second_derivatives", ()))]
    return [
        _item(
            "linearity",
            "How linear the functions are",
            "Output latents as functions of one input latent: linear, JumpReLU (0, then linear), or other. Flat ones, "
            "whose range is next to nothing, are counted apart.",
            classified,
            runs,
            lambda: figures_fidelity.linearity_bars(classified),
        ),
        _item(
            "second-derivatives",
            "Second derivatives",
            "How strongly these functions bend, in units in which scale is gone. Further left is closer to linear, "
            "and J at one point then holds further away.",
            curved,
            runs,
            lambda: figures_fidelity.second_derivatives(curved),
        ),
    ]


def run_items(run: Judged, graph: Graph | None, key: str) -> list[Item]:
    """What belongs to one run: heat maps, edge curves, ablations, example functions, the global graph."""
    items = []
    has_maps = len(run.arrays.get("heatmap", ())) > 0
    for normalized, name in ((False, "raw"), (True, "normalised")):
        items.append(
            _item(
                f"{key}heat-maps-{name}",
                f"J of example tokens{', each over its root mean square' if normalized else ''}",
                "|J| of tokens drawn at random: rows are active output latents, columns active input latents, grey is "
                "exactly 0. "
                + ("Scale is gone: bright spots on a dark map are real sparsity." if normalized else "One scale for "
                   "all maps; dark maps may be small rather than sparse."),
                [run] if has_maps else [],
                [run],
                partial(figures_jacobian.heat_maps, run, normalized=normalized),
            )
        )  # fmt: skip
    for curve, what in (
        ("edge_ce", "Cross-entropy"),
        ("edge_kl", "KL divergence"),
        ("edge_error", "Error of the MLP's output"),
    ):
        items.append(
            _item(
                f"{key}{curve.replace('_', '-')}",
                f"{what} against the edges kept",
                "The MLP replaced by its linearised graph of latents with only the strongest edges of each token. The "
                "sooner a curve falls, the more of the computation its few edges hold; `random` is the yardstick.",
                [run] if figures_fidelity.rankings_of(run, curve) else [],
                [run],
                partial(figures_fidelity.edge_curves, run, curve),
            )
        )
    for name, step, title in (
        ("ablation", "−J s", "Ablations: predicted and measured"),
        ("unit", "J × step", "Unit steps: predicted and measured"),
    ):
        items.append(_ablation_item(run, name, step, title, key))
    classes = run.arrays.get("linearity_class", ())
    items.append(
        _item(
            f"{key}example-functions",
            "Example functions",
            "An output latent (vertical) while one of its input latents (horizontal) is moved and all else is kept; "
            "the title names the class and input → output.",
            [run] if len(classes) and "linearity_x" in run.arrays else [],
            [run],
            lambda: figures_fidelity.example_functions(run),
        )
    )
    return items + _graph_items(run, graph, key)


def _ablation_item(run: Judged, name: str, step: str, title: str, key: str) -> Item:
    points = [run.arrays.get(f"{name}_{kind}") for kind in ("predicted", "measured")]
    found = points[0] is not None and points[1] is not None and len(points[0]) > 0
    text = "Each point is a random pair of active latents. If J tells what happens, the points lie on the dotted line."
    if found:
        slope, r2 = figures_fidelity.slope_and_r2(points[0], points[1])  # type: ignore[arg-type]
        if math.isfinite(slope) and math.isfinite(r2):
            text += f" Fitted through the origin: slope {slope:.3g}, R² {r2:.3g}, over {len(points[0]):,} pairs."  # type: ignore[arg-type]
    return _item(
        f"{key}{name}-scatter",
        title,
        text,
        [run] if found else [],
        [run],
        lambda: figures_fidelity.ablation_scatter(points[0], points[1], step=step),  # type: ignore[arg-type]
    )


def _graph_items(run: Judged, graph: Graph | None, key: str) -> list[Item]:
    some = [run] if graph is not None and len(graph.mean_abs) else []
    values = graph.mean_abs if graph is not None else None
    sums = graph.sum_abs if graph is not None else None
    return [
        _item(
            f"{key}edge-distribution",
            "Global graph: strength of its edges",
            "Mean |J| of each pair of latents that were active together, over the tokens where the output latent is "
            "active. In a sparse graph few pairs lie far to the right.",
            some,
            [run],
            lambda: figures_graph.edge_distribution(values),  # type: ignore[arg-type]
        ),
        _item(
            f"{key}cumulative-edges",
            "Global graph: share of the strongest edges",
            "How many of the strongest edges hold how much of all |J|, summed over tokens. The fewer, the sparser the "
            "graph as a whole.",
            some,
            [run],
            lambda: figures_graph.cumulative_edges(sums),  # type: ignore[arg-type]
        ),
    ]


def run_folder(run: Judged) -> str:
    """Return the folder to give to `jsae-eval`, quoted for a shell."""
    place = run.folder.parent if run.folder.name == EVAL_FOLDER else run.folder
    given = place if (place / EXPORT).is_dir() or run.folder.name == EVAL_FOLDER else "FOLDER"
    return shlex.quote(str(given)) if given != "FOLDER" else "FOLDER"


def _item(
    key: str, title: str, text: str, some: Sequence[Judged], runs: Sequence[Judged], draw: "Callable[[], Figure]"
) -> Item:
    if not some:
        return Item(
            key, title, f"Its data are not in the evaluation: run `jsae-eval {run_folder(runs[0])}` and report again."
        )
    names = ", ".join(run.name for run in some)
    return Item(key, title, text, draw, f"{title}: {names}.")


def _named_by_kind(run: Judged) -> Judged:
    from dataclasses import replace

    from jsae_lightning.reporting.tables import kind_text

    return replace(run, name=f"{run.own_name}: {kind_text(run)}")
