"""What is sparser, and what is only smaller: pairs against pairs without the penalty, and against random models.

A threshold on |J| falls below more entries when J is merely scaled down. So each pair with a penalty is compared with
the traditional pair (coefficient 0) of the same model and layer twice: as it is, and shrink-matched,

    J_matched = scale * J_traditional,      scale = mean|J| / mean|J_traditional|       (means over tokens and entries)

which is as small on average and no sparser than it was. The shares of J_matched above a threshold t are those of
J_traditional above t / scale, read off its `fine_histogram`; scale-free measures are those of J_traditional.

Two evaluations with the same `tokens_hash` judged the same positions in the same groups of documents: then differences
are paired, and their standard errors are those of the differences of the leave-one-out figures (`jackknife`). Otherwise
the standard errors add up as for independent samples.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_files import read_record
from jsae_lightning.fine_histogram import counts_above
from jsae_lightning.jackknife import Figure, standard_error
from jsae_lightning.jacobian_metrics import RAW_THRESHOLDS

FORMAT_VERSION = 1
MEAN_ABS = "jacobian/mean_abs"


@dataclass(frozen=True)
class JudgedPair:
    """An evaluation, read back."""

    name: str
    path: Path
    """Of `eval.json`."""
    record: dict[str, Any]
    replicates: dict[str, Tensor]
    """By figure: its value without one of the groups, float64 (groups,)."""
    histograms: Int[Tensor, "groups bins"]
    entries: Int[Tensor, " groups"]

    @property
    def mlp(self) -> str:
        """The hash of the MLP's weights: the same for one model under two paths, another for each drawn model."""
        return self.record["pair"]["model"]["mlp_hash"]

    @property
    def architecture(self) -> tuple[Any, ...]:
        """What a trained model and one of random weights have in common: name, revision, layer, synthetic spec."""
        model = self.record["pair"]["model"]
        return tuple(model.get(key) for key in ("name", "revision", "layer", "synthetic"))

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two pairs must share to be compared, whatever the model: k, latents, and where the MLP is linearised."""
        pair = self.record["pair"]
        sizes = [pair[f"{site}_sae"][key] for key in ("k", "d_sae") for site in ("input", "output")]
        return (*sizes, self.record["evaluation"]["at"])

    @property
    def weights(self) -> Any:
        """`random_weights` of the language model: false, true or full."""
        return self.record["random_weights"]

    @property
    def is_traditional(self) -> bool:
        """Whether the pair was trained without a penalty."""
        return self.record["kind"] == "traditional"

    def figure(self, key: str) -> Figure:
        """Return a figure, NaN where it is not known."""
        found = self.record["figures"].get(key, {})
        mean, error = found.get("mean"), found.get("standard_error")
        return Figure(math.nan if mean is None else mean, math.nan if error is None else error)


@dataclass(frozen=True)
class ShrinkMatched:
    """A pair against another one whose Jacobian is scaled to the same mean magnitude."""

    run: JudgedPair
    baseline: JudgedPair
    scale: Figure
    figures: dict[str, Figure]
    """The scaled baseline's `jacobian/...`."""
    remaining: dict[str, Figure]
    """For each raw threshold's share: the run's less the scaled baseline's; what shrinkage does not explain."""
    resolution: dict[str, float]
    """For each raw threshold's share: by how much reading it off a histogram may be wrong."""


def read_judged(path: Path) -> JudgedPair:
    """Read the evaluation whose `eval.json` is at `path`; UserError if it is damaged or incomplete."""
    from safetensors import SafetensorError, safe_open

    record = read_record(path)
    groups = path.parent / "groups.safetensors"
    try:
        with safe_open(str(groups), framework="pt") as file:
            names = json.loads(file.metadata()["figures"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        replicates = {
            figure: column
            for tensor, figures in names.items()
            for figure, column in zip(figures, tensors[tensor].T, strict=True)
        }
        return JudgedPair(record["name"], path, record, replicates, tensors["fine_histograms"], tensors["entries"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{groups}: what comparisons need is missing ({error}): remove {path} and evaluate again, with the part "
            "figures"
        ) from error


def is_paired(a: JudgedPair, b: JudgedPair) -> bool:
    """Whether both judged the same positions, in the same groups of documents."""
    hashes = {judged.record["evaluation"]["tokens_hash"] for judged in (a, b)}
    return len(hashes) == 1 and len(a.entries) == len(b.entries)


def difference(a: JudgedPair, b: JudgedPair, key: str) -> Figure:
    """Return a's figure less b's, with the standard error of the difference: paired where that is possible."""
    mean = a.figure(key).mean - b.figure(key).mean
    ours, theirs = a.replicates.get(key), b.replicates.get(key)
    if is_paired(a, b) and ours is not None and theirs is not None and len(ours) == len(theirs):
        return Figure(mean, standard_error(ours - theirs))
    return Figure(mean, math.hypot(a.figure(key).standard_error, b.figure(key).standard_error))


def relative_difference(a: JudgedPair, b: JudgedPair, key: str) -> Figure:
    """Return a's figure over b's, less 1, with its standard error: paired where that is possible.

    Independent samples: r sqrt((se_a / a)^2 + (se_b / b)^2), r being the ratio. NaN where b's figure is 0.
    """
    x, y = a.figure(key), b.figure(key)
    if not y.mean:
        return Figure(math.nan, math.nan)
    mean = x.mean / y.mean - 1
    ours, theirs = a.replicates.get(key), b.replicates.get(key)
    if is_paired(a, b) and ours is not None and theirs is not None and len(ours) == len(theirs):
        return Figure(mean, standard_error(ours / theirs))
    error = math.hypot(x.standard_error / y.mean, x.mean * y.standard_error / y.mean**2)
    return Figure(mean, error)


def find_baseline(judged: JudgedPair, others: Sequence[JudgedPair]) -> JudgedPair | None:
    """Return the traditional pair of the same MLP, k, latents and `at` (the most alike, if several), or None.

    It is the weights of the MLP that must be the same, not the name of the model: drawn models share a name.
    """
    if judged.is_traditional:
        return None
    own = (judged.mlp, judged.weights, judged.setting)
    found = [other for other in others if other.is_traditional and (other.mlp, other.weights, other.setting) == own]
    return max(found, key=lambda other: _likeness(judged, other), default=None)


def find_random(judged: JudgedPair, others: Sequence[JudgedPair]) -> JudgedPair | None:
    """Return the pair of the same kind on the same model with random weights, for one on the trained model.

    The same model is here one of the same name, revision, layer and synthetic spec, as its weights are not.
    """
    if judged.weights:
        return None
    own = (judged.architecture, judged.setting, judged.is_traditional)
    found = [o for o in others if o.weights and (o.architecture, o.setting, o.is_traditional) == own]
    return max(found, key=lambda other: _likeness(judged, other), default=None)


def shrink_match(run: JudgedPair, baseline: JudgedPair) -> ShrinkMatched | None:
    """Scale the baseline's Jacobian to the mean magnitude of the run's; None where either is unknown or 0.

    Standard errors are paired where both judged the same tokens, so that the scale varies with the groups as well.
    """
    ours, theirs = run.figure(MEAN_ABS).mean, baseline.figure(MEAN_ABS).mean
    if not (ours > 0 and theirs > 0):
        return None
    keys = [f"jacobian/share_above_{threshold:g}" for threshold in RAW_THRESHOLDS]
    whole = baseline.histograms.sum(dim=0), int(baseline.entries.sum())
    scale = ours / theirs
    read = {key: _share(*whole, t / scale) for key, t in zip(keys, RAW_THRESHOLDS, strict=True)}
    matched = _Resampled(run, baseline)
    figures = {}
    for key in (name for name in baseline.record["figures"] if name.startswith("jacobian/")):
        figures[key] = baseline.figure(key)
    figures[MEAN_ABS] = run.figure(MEAN_ABS)
    remaining = {}
    for key, threshold in zip(keys, RAW_THRESHOLDS, strict=True):
        mean = read[key][0]
        figures[key] = Figure(mean, matched.error(lambda s, h, n, own, t=threshold: _share(h, n, t / s)[0], key))
        rest = matched.error(lambda s, h, n, own, t=threshold: own - _share(h, n, t / s)[0], key)
        remaining[key] = Figure(run.figure(key).mean - mean, rest)
    scale_error = matched.error(lambda s, h, n, own: s, keys[0])
    resolution = {key: wrong for key, (_, wrong) in read.items()}
    return ShrinkMatched(run, baseline, Figure(scale, scale_error), figures, remaining, resolution)


class _Resampled:
    """Evaluates a function of (scale, histogram, entries, the run's own figure) without one of the groups at a time."""

    def __init__(self, run: JudgedPair, baseline: JudgedPair) -> None:
        self._run, self._baseline = run, baseline
        total, entries = baseline.histograms.sum(dim=0), int(baseline.entries.sum())
        self._whole = (total, entries)
        self._without = [
            (total - histogram, entries - int(count))
            for histogram, count in zip(baseline.histograms, baseline.entries, strict=True)
        ]

    def error(self, function: Any, key: str) -> float:
        """Return the standard error of function(scale, histogram, entries, figure `key` of the run)."""
        run, baseline = self._run, self._baseline
        own, ours, theirs = run.figure(key).mean, run.figure(MEAN_ABS).mean, baseline.figure(MEAN_ABS).mean
        if not {key, MEAN_ABS} <= run.replicates.keys() or MEAN_ABS not in baseline.replicates:
            return math.nan
        our_means, their_means = run.replicates[MEAN_ABS].tolist(), baseline.replicates[MEAN_ABS].tolist()
        our_figures = run.replicates[key].tolist()
        if min(len(our_means), len(their_means)) < 2:
            return math.nan
        if is_paired(run, baseline):
            rows = zip(our_means, their_means, self._without, our_figures, strict=True)
            return _error([function(a / b, *without, figure) for a, b, without, figure in rows])
        of_run = [function(a / theirs, *self._whole, figure) for a, figure in zip(our_means, our_figures, strict=True)]
        of_baseline = [function(ours / b, *without, own) for b, without in zip(their_means, self._without, strict=True)]
        return math.hypot(_error(of_run), _error(of_baseline))


def compare(judged: Sequence[JudgedPair]) -> tuple[dict[str, Any], list[ShrinkMatched]]:
    """Return the content of `comparison.json` and the shrink-matched comparisons that it is about.

    Every pair with a penalty is matched with its baseline, every one on a trained model with its like on random
    weights.
    """
    from jsae_lightning.comparison_findings import all_findings, verdict_of
    from jsae_lightning.evaluation_files import figures_to_json, finite

    judged = distinct_names(judged)
    matched = []
    for run in judged:
        for other in (find_baseline(run, judged), find_random(run, judged)):
            if other is not None and (found := shrink_match(run, other)) is not None:
                matched.append(found)
    runs = []
    for run in judged:
        baseline = find_baseline(run, judged)
        runs.append(
            {
                "name": run.name,
                "folder": run.record["folder"],
                "eval": str(run.path),
                "kind": run.record["kind"],
                "random_weights": run.weights,
                "baseline": None if baseline is None else baseline.name,
            }
        )
    entries = [
        {
            "run": entry.run.name,
            "baseline": entry.baseline.name,
            "scale": entry.scale.mean,
            "scale_standard_error": entry.scale.standard_error,
            "paired": is_paired(entry.run, entry.baseline),
            "figures": figures_to_json(entry.figures),
            "remaining": figures_to_json(entry.remaining),
            "resolution": entry.resolution,
        }
        for entry in matched
    ]
    record = {
        "format_version": FORMAT_VERSION,
        "runs": runs,
        "shrink_matched": entries,
        "verdicts": [verdict_of(entry) for entry in matched],
        "findings": all_findings(judged, matched),
    }
    return finite(record), matched


def distinct_names(judged: Sequence[JudgedPair]) -> list[JudgedPair]:
    """Give evaluations of the same name longer ones: with the folder above, or else the path."""
    for longer in (lambda path: f"{path.parent.parent.parent.name}/{path.parent.parent.name}", str):
        counts = Counter(entry.name for entry in judged)
        judged = [e if counts[e.name] == 1 else replace(e, name=longer(e.path.absolute())) for e in judged]
    return list(judged)


def _likeness(judged: JudgedPair, other: JudgedPair) -> int:
    """How much of the rest of two pairs' settings is the same."""
    ours, theirs = judged.record["pair"], other.record["pair"]
    same = [ours.get(key) == theirs.get(key) for key in ("tokens_seen", "seed", "data")]
    same += [ours["jacobian"].get(key) == theirs["jacobian"].get(key) for key in ("penalty", "coef")]
    return sum(same)


def _share(histogram: Tensor, entries: int, threshold: float) -> tuple[float, float]:
    above, wrong = counts_above(histogram, threshold)
    return above / entries, wrong / entries


def _error(values: list[float]) -> float:
    return standard_error(torch.tensor(values, dtype=torch.float64))
