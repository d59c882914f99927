"""The parts of an evaluation: each measures a pair on the same held-out tokens, and all end up in one folder.

To add one, add its name to `evaluate_config.PARTS` and its function to `PART_FUNCTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jsae_lightning.distributed import rank_and_world_size
from jsae_lightning.evaluation_progress import EvaluationProgress
from jsae_lightning.grouped_evaluation import evaluate_groups, heat_maps
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jackknife import Figure
from jsae_lightning.penalties import Penalty


@dataclass(frozen=True)
class Task:
    """What a part gets beside the pair and its tokens; the same on every rank."""

    held_out: HeldOut
    groups: Int[Tensor, "sequences seq"]
    """Each position's group of documents, for `jackknife`."""
    jacobian_tokens: int | None
    penalty: Penalty
    folder: Path
    """Where a part may write files of its own, on rank 0 only."""


@dataclass
class PartResult:
    """What a part found; the same on every rank."""

    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float] | None]] = field(default_factory=dict)
    """By name: `x`, `y`, and `standard_error` or None, lists of the same length."""
    arrays: dict[str, Tensor] = field(default_factory=dict)
    """For `arrays.safetensors`."""
    replicates: dict[str, Tensor] = field(default_factory=dict)
    """By figure: its value without one of the groups, float64 (groups,); for differences of two pairs."""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors with the groups in front, for `groups.safetensors`."""


Part = Callable[[Task], PartResult]


def run_figures(task: Task) -> PartResult:
    """Measure everything that training's evaluation measures, with standard errors, histograms and heat maps."""
    rank, world_size = rank_and_world_size()
    total = len(range(rank, len(task.held_out.tokens), world_size))
    with EvaluationProgress("figures", total, "sequences") as progress:
        found = evaluate_groups(
            task.held_out,
            task.groups,
            jacobian_tokens=task.jacobian_tokens,
            penalty=task.penalty,
            on_sequences=progress.advance,
        )
    maps, positions = heat_maps(task.held_out)
    return PartResult(
        figures=found.figures,
        arrays=found.arrays | {"heatmap": maps, "heatmap_position": positions},
        replicates=dict(zip(found.figures, found.replicates.T, strict=True)),
        groups={"fine_histograms": _narrow(found.fine_histograms), "entries": found.entries},
    )


def _narrow(counts: Tensor) -> Tensor:
    """Return counts as int32, half the size, where they all fit."""
    return counts.to(torch.int32) if int(counts.max()) < 2**31 else counts


PART_FUNCTIONS: dict[str, Part] = {"figures": run_figures}


def run_part(name: str, task: Task) -> PartResult:
    """Run one of the parts; with several ranks, all must call it."""
    return PART_FUNCTIONS[name](task)


def merge(results: dict[str, PartResult]) -> PartResult:
    """Put the findings of all parts into one; ValueError if two have the same figure, curve or array."""
    merged = PartResult()
    for name, result in results.items():
        for kind in ("figures", "curves", "arrays", "replicates", "groups"):
            there: dict[str, Any] = getattr(merged, kind)
            if twice := set(there) & set(getattr(result, kind)):
                raise ValueError(f"part {name}: {kind} has {min(twice)}, and so has another part")
            there |= getattr(result, kind)
    return merged
