"""The parts of an evaluation: each measures a pair on the same held-out tokens, and all end up in one folder.

To add one, add its name to `evaluate_config.PARTS` and its function to `PART_FUNCTIONS`; what it needs of the task is
checked by `runnable_parts`, before the first part runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jsae_lightning.distributed import rank_and_world_size
from jsae_lightning.evaluation_progress import EvaluationProgress
from jsae_lightning.fidelity import run_fidelity
from jsae_lightning.fidelity.run import MIN_SEQUENCES, make_plan, usable_sequences
from jsae_lightning.graph import check_graph, run_graph
from jsae_lightning.ground_truth import run_ground_truth
from jsae_lightning.grouped_evaluation import check_included, evaluate_groups, heat_maps
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jackknife import Figure
from jsae_lightning.jacobians import EdgePenalty


@dataclass(frozen=True)
class Task:
    """What a part gets beside the pair and its tokens; the same on every rank."""

    held_out: HeldOut
    groups: Int[Tensor, "sequences seq"]
    """Each position's group of documents, for `jackknife`."""
    jacobian_tokens: int | None
    """Of the held-out ones, spread over them; None: all."""
    penalty: EdgePenalty
    folder: Path
    """Where a part may write files of its own, on rank 0 only."""
    fidelity_tokens: int
    curve_sequences: int
    contexts: int
    """Contexts of each latent and, half as many, of each top edge."""
    top_edges: int

    @property
    def edge_contexts(self) -> int:
        """Contexts of each top edge."""
        return max(1, self.contexts // 2)


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
        replicates=found.replicates,
        groups={"fine_histograms": _narrow(found.fine_histograms), "entries": found.entries},
    )


def _narrow(counts: Tensor) -> Tensor:
    """Return counts as int32, half the size, where they all fit."""
    return counts.to(torch.int32) if int(counts.max()) < 2**31 else counts


def measure_fidelity(task: Task) -> PartResult:
    """Ask whether the sparse graph is the computation."""
    found = run_fidelity(task.held_out, task.groups, tokens=task.fidelity_tokens, curve_sequences=task.curve_sequences)
    return PartResult(figures=found.figures, curves=found.curves, arrays=found.arrays, replicates=found.replicates)


def measure_graph(task: Task) -> PartResult:
    """Write the global graph with the contexts of its latents and edges."""
    figures = run_graph(
        task.held_out,
        task.folder,
        tokens=task.jacobian_tokens,
        top_edges=task.top_edges,
        contexts=task.contexts,
        edge_contexts=task.edge_contexts,
    )
    return PartResult(figures={name: Figure(value, math.nan) for name, value in figures.items()})


def measure_ground_truth(task: Task) -> PartResult:
    """Compare the found graph with the known one of a synthetic model."""
    found = run_ground_truth(task.held_out)
    curve = {"x": found.curve.recall.tolist(), "y": found.curve.precision.tolist(), "standard_error": None}
    return PartResult(
        figures={name: Figure(value, math.nan) for name, value in found.figures.items()},
        curves={"ground_truth/precision_recall": curve},
    )


PART_FUNCTIONS: dict[str, Part] = {
    "figures": run_figures,
    "fidelity": measure_fidelity,
    "graph": measure_graph,
    "ground_truth": measure_ground_truth,
}


def runnable_parts(names: Sequence[str], task: Task, *, are_chosen: bool) -> tuple[list[str], str | None]:
    """Return the parts that can run, and a remark if one is left out; so no part fails after another has run.

    Fidelity is left out where there are too few sequences for it, unless the user has chosen the parts (`are_chosen`).

    Raises:
        UserError: what any of the parts would raise of the task.
    """
    held_out, runnable = task.held_out, list(names)
    remark: str | None = None
    check_included(held_out)
    if "fidelity" in runnable and not are_chosen and (count := len(usable_sequences(held_out))) < MIN_SEQUENCES:
        runnable.remove("fidelity")
        remark = f"fidelity is left out: it needs {MIN_SEQUENCES} sequences or more, and {count} is judged"
    if "fidelity" in runnable:
        make_plan(held_out, task.groups, task.fidelity_tokens, task.curve_sequences)
    if "graph" in runnable:
        numbers = {"top_edges": task.top_edges, "contexts": task.contexts, "edge_contexts": task.edge_contexts}
        check_graph(held_out, task.jacobian_tokens, **numbers)
    return runnable, remark


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
