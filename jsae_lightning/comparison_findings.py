"""A comparison in sentences with numbers: what is shrinkage, what is sparsification, and what they cost.

That a difference is not beyond its error does not make it none. So entries are "smaller, not fewer" only where the 95 %
interval (TOLERANCE standard errors to both sides) of the effective edges' relative difference lies within +-EQUAL, and
all of a share's difference is shrinkage only where the interval of what remains, widened by what the histogram does not
resolve, lies within +-NEGLIGIBLE of the whole difference. Fewer than MIN_GROUPS groups of documents say nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

from jsae_lightning.comparison import (
    JudgedPair,
    ShrinkMatched,
    difference,
    find_baseline,
    is_paired,
    relative_difference,
)
from jsae_lightning.jackknife import Figure
from jsae_lightning.training_settings import training_settings

TOLERANCE = 2.0
"""A difference counts where it is more than so many of its standard errors."""
EQUAL = 0.05
"""Two pairs have equally many effective edges if the interval of the relative difference is within so much of 0."""
NEGLIGIBLE = 0.1
"""Of a share's difference: what remains beside shrinkage does not matter if its interval is within so much of 0."""
ROUNDING = 1e-5
"""Relative differences below this are rounding of float32, however small their standard errors are."""
MIN_GROUPS = 8
"""Of documents: a standard error from fewer is too uncertain to go by."""

_EFFECTIVE = "jacobian/effective_edges"
_SHARES = ("jacobian/share_above_0.01", "jacobian/share_above_0.02")
_MEASURES = (  # label, key, which way is sparser, format
    ("effective edges", _EFFECTIVE, -1, ".1f"),
    ("edges for 90 % of an output", "jacobian/edges_for_90", -1, ".2f"),
    ("Gini", "jacobian/gini", 1, ".4f"),
    ("Hoyer", "jacobian/hoyer", 1, ".4f"),
)
_COSTS = (
    ("explained variance of the input SAE", "val/explained_variance_input"),
    ("of the output SAE", "val/explained_variance_output"),
    ("CE score with both spliced", "val/ce_score_both"),
)


def all_findings(judged: Sequence[JudgedPair], matched: Sequence[ShrinkMatched]) -> list[str]:
    """Return all findings about pairs with distinct names and what they are matched with, in the order of the pairs."""
    findings = []
    for run in judged:
        if not run.is_traditional and find_baseline(run, judged) is None:
            findings.append(
                f"{run.name}: none of the pairs given is a traditional one (jacobian.coef=0) on the same MLP "
                "weights, of the same k, number of latents and jacobian.at, so nothing tells shrinkage from "
                "sparsification here."
            )
        for entry in matched:
            if entry.run is run:
                findings += findings_of(entry)
    return findings


def findings_of(entry: ShrinkMatched) -> list[str]:
    """Return the sentences about one pair and the one that it is matched with."""
    run, baseline = entry.run, entry.baseline
    is_control = run.weights != baseline.weights
    what = "random weights" if is_control else "traditional"
    lines = [
        f"{run.name} against {baseline.name} ({what}): mean |J| is {_figure(run.figure('jacobian/mean_abs'), '.4g')} "
        f"against {_figure(baseline.figure('jacobian/mean_abs'), '.4g')}, "
        f"a factor of {_figure(entry.scale, '.4g')}. "
        + (
            "Both were judged on the same tokens: standard errors of differences are paired."
            if is_paired(run, baseline)
            else "They were judged on different tokens: differences have the standard errors of "
            "independent samples (the same overrides, such as eval.tokens, for all of them would pair them)."
        )
    ]
    if differing := other_differences(run, baseline):
        lines.append(
            f"{run.name} and {baseline.name} were not trained alike otherwise: {'; '.join(differing)}. What follows "
            "may be due to that."
        )
    lines += [_share_finding(entry, key, what) for key in _SHARES if key in entry.figures]
    measures = [_measure(run, baseline, measure)[0] for measure in _MEASURES]
    lines.append(f"{run.name}, scale-free: " + "; ".join(measures) + ".")
    lines.append(verdict_of(entry))
    if not is_control:
        costs = [
            f"{label} {_number(run.figure(key).mean, '.4f')} against {_number(baseline.figure(key).mean, '.4f')} "
            f"({_signed(difference(run, baseline, key), '.4f')})"
            for label, key in _COSTS
        ]
        lines.append(f"{run.name}, cost: " + "; ".join(costs) + ".")
    return lines


def other_differences(run: JudgedPair, baseline: JudgedPair) -> list[str]:
    """Return what differs between the trainings of two pairs beside what they are compared for, and the seed.

    That is the penalty against a traditional pair, and the weights of the language model against a control. What one of
    the exports does not tell, as older ones do not tell their recipe, is left out.
    """
    ours, theirs = (_training(judged, run.weights == baseline.weights) for judged in (run, baseline))
    return [f"{key} {ours[key]} against {theirs[key]}" for key in ours if key in theirs and ours[key] != theirs[key]]


def _training(judged: JudgedPair, may_differ_in_penalty: bool) -> dict[str, Any]:
    jacobian = judged.record["pair"]["jacobian"]
    penalty = {f"jacobian.{key}": jacobian.get(key) for key in ("penalty", "params", "coef")}
    return training_settings(judged.record["pair"]) | ({} if may_differ_in_penalty else penalty)


def verdict_of(entry: ShrinkMatched) -> str:
    """Return the sentence that says whether one pair is sparser than the other beyond shrinkage."""
    run, baseline = entry.run, entry.baseline
    directions = [_measure(run, baseline, measure)[1] for measure in _MEASURES]
    return _verdict(directions, run, baseline, run.weights != baseline.weights)


def direction(change: Figure) -> int:
    """Return the sign of a difference, 0 if it is within TOLERANCE standard errors or its error is not known."""
    if not math.isfinite(change.standard_error) or abs(change.mean) <= TOLERANCE * change.standard_error:
        return 0
    return 0 if change.mean == 0 else round(math.copysign(1, change.mean))


def _share_finding(entry: ShrinkMatched, key: str, what: str) -> str:
    threshold = key.rsplit("_", 1)[1]
    ours, theirs, matched = entry.run.figure(key), entry.baseline.figure(key), entry.figures[key]
    remaining, total = entry.remaining[key], ours.mean - theirs.mean
    return (
        f"{entry.run.name}, share of |J| > {threshold}: {_percent(ours.mean)} against "
        f"{_percent(theirs.mean)} ({what}); "
        f"{entry.baseline.name} scaled by {_number(entry.scale.mean, '.3g')} shows {_percent(matched.mean)}, so of a "
        f"difference of {_points(total)} points {_points(total - remaining.mean)} are shrinkage and "
        f"{_points(remaining.mean)} +- {_points(remaining.standard_error, sign=False)} are not: "
        + _judge_remaining(remaining, total, entry.resolution[key], _groups(entry.run, entry.baseline))
    )


def _judge_remaining(remaining: Figure, total: float, resolution: float, groups: int) -> str:
    """Return what to make of the part of a share's difference that shrinkage does not explain; see the module."""
    if groups < MIN_GROUPS or not math.isfinite(remaining.standard_error):
        return "too few documents for a standard error to go by."
    sign = direction(remaining)
    if abs(remaining.mean) > resolution and sign:
        return "fewer entries are above it than shrinkage explains." if sign < 0 else (
            "shrinkage alone would leave fewer above it."
        )  # fmt: skip
    most = abs(remaining.mean) + resolution + TOLERANCE * remaining.standard_error
    end = "this cannot be told apart from shrinkage."
    if most <= NEGLIGIBLE * abs(total):
        end = f"all of it is shrinkage (with 95 % confidence, to within {NEGLIGIBLE:.0%} of the difference)."
    if abs(remaining.mean) <= resolution:
        end += f" What remains is below the {_points(resolution, sign=False)} points that the histogram resolves."
    return end


def _measure(run: JudgedPair, baseline: JudgedPair, measure: tuple[str, str, int, str]) -> tuple[str, int | None]:
    """Return the text about a scale-free measure, and 1 (sparser), -1 (less sparse), 0 (neither), None (unknown)."""
    label, key, sparser, form = measure
    change = difference(run, baseline, key)
    text = f"{label} {_figure(run.figure(key), form)} against {_figure(baseline.figure(key), form)}"
    if not math.isfinite(change.standard_error):
        return f"{text} (no standard error)", None
    found = direction(change) * sparser if abs(change.mean) > ROUNDING * abs(baseline.figure(key).mean) else 0
    word = {1: "sparser", -1: "less sparse", 0: "no difference"}[found]
    return f"{text} ({_signed(change, form)}: {word})", found


def _verdict(directions: list[int | None], run: JudgedPair, baseline: JudgedPair, is_control: bool) -> str:
    known = [value for value in directions if value is not None]
    than = f"{baseline.name}" + (" on random weights" if is_control else "")
    groups = _groups(run, baseline)
    if not known or groups < MIN_GROUPS:
        return (
            f"{run.name}: too few documents to say whether it is sparser than {than} ({groups} groups of documents, "
            f"at least {MIN_GROUPS} are needed)."
        )
    change = relative_difference(run, baseline, _EFFECTIVE)
    edges = f"effective edges {_relative(change)}"
    counts = f"{sum(v > 0 for v in known)} of {len(known)} scale-free measures say sparser, " + (
        f"{sum(v < 0 for v in known)} less sparse"
    )
    if all(value > 0 for value in known):
        return f"{run.name} is sparser than {than} beyond shrinkage ({edges}; {counts})."
    if all(value < 0 for value in known):
        return f"{run.name} is less sparse than {than} once shrinkage is taken out ({edges}; {counts})."
    if any(known):
        return f"{run.name} against {than}: the scale-free measures do not agree ({edges}; {counts})."
    most = abs(change.mean) + TOLERANCE * change.standard_error
    smaller = direction(difference(run, baseline, "jacobian/mean_abs")) < 0
    end = ": its entries are smaller, not fewer" if smaller and most <= EQUAL else ""
    excluded = f"differences up to {most * 100:.1f} % are not excluded" if math.isfinite(most) else "error unknown"
    return (
        f"{run.name} against {than}: no difference beyond {TOLERANCE:g} standard errors in any of {len(known)} "
        f"scale-free measures{end} ({edges}; {excluded})."
    )


def _groups(run: JudgedPair, baseline: JudgedPair) -> int:
    return min(len(run.entries), len(baseline.entries))


def _relative(change: Figure) -> str:
    return f"{change.mean * 100:+.1f} %" if math.isfinite(change.mean) else "-"


def _figure(figure: Figure, form: str) -> str:
    error = figure.standard_error
    return _number(figure.mean, form) + (f" +- {error:.2g}" if math.isfinite(error) else "")


def _signed(change: Figure, form: str) -> str:
    error = change.standard_error
    return _number(change.mean, f"+{form}") + (f" +- {error:.2g}" if math.isfinite(error) else "")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %" if math.isfinite(share) else "-"


def _points(share: float, *, sign: bool = True) -> str:
    return format(share * 100, "+.2f" if sign else ".2f") if math.isfinite(share) else "-"
