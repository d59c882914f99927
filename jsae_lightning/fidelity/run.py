"""All of fidelity in one call."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.fidelity import ablation, curvature, edge_curves, linearity
from jsae_lightning.fidelity.edge_ranking import RANKINGS
from jsae_lightning.fidelity.passes import Plan, curve_sums, pair_sums
from jsae_lightning.fidelity.points import spread
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jackknife import Figure, jackknife
from jsae_lightning.jacobians import JACOBIAN_AT
from jsae_lightning.metrics import Sums, without_prefix

EXAMPLES_PER_CLASS = 6
MIN_SEQUENCES = 2


@dataclass(frozen=True)
class FidelityResult:
    """What `run_fidelity` found, the same on every rank; tensors are on the CPU."""

    figures: dict[str, Figure]
    """Keys `fidelity/...`."""
    replicates: dict[str, Tensor]
    """By figure: its value without one of the groups that hold data, float64; for differences of two pairs."""
    curves: dict[str, dict[str, list[float] | None]]
    """`edge_ce/<ranking>`, `edge_kl/<ranking>`, `edge_error/<ranking>`: lists `x` (edges kept), `y`, `standard_error`.

    A NaN stands for what cannot be told.
    """
    arrays: dict[str, Tensor]
    """Samples for figures: `ablation_*`, `unit_*`, `linearity_*`, `second_derivatives`."""


def run_fidelity(
    held_out: HeldOut,
    groups: Int[Tensor, "sequences seq"],
    *,
    tokens: int = 8192,
    curve_sequences: int = 16,
) -> FidelityResult:
    """Measure whether the sparse graph is the computation; with several ranks, all must call it.

    Args:
        held_out: the pair, its MLP and language model, tokens; the graph is studied at `held_out.at`.
        groups: each position's group of documents, for standard errors (`jackknife.document_groups`).
        tokens: about how many tokens give a random pair each and, together, the means of the graph; they are whole
            sequences, spread over the held-out ones, and the last one is cut.
        curve_sequences: sequences of the edge curves, spread likewise and disjoint from those (at most half of all); no
            document of theirs is among those either, unless none is left then.
            Each costs 4 (n - 1) + 4 forward passes of the language model, n the number of values of E above 0.

    Returns:
        Figures with standard errors over documents, curves, and samples. The standard errors of the curves take the
        means of the graph as given.

    Raises:
        UserError: fewer than two sequences have included positions, `at` is unknown, or a number is below 1.
    """
    plan = make_plan(held_out, groups, tokens, curve_sequences)
    shard = rank_and_world_size()
    first = all_reduce_sum(pair_sums(plan, shard))
    means = edge_curves.remainder_means(without_prefix("graph/", first))
    second = all_reduce_sum(curve_sums(plan, means, shard))
    of_pairs, of_curves = _by_group(first), _by_group(second)
    found = jackknife(of_pairs, pair_figures)
    found |= jackknife(of_curves, lambda sums: edge_curves.curve_figures(sums, plan.numbers))
    return FidelityResult(
        figures={f"fidelity/{name}": figure for name, (figure, _) in found.items()},
        replicates={f"fidelity/{name}": replicates for name, (_, replicates) in found.items()},
        curves=_curves(of_curves, plan.numbers),
        arrays=_arrays({key: value.cpu() for key, value in without_prefix("sample/", first).items()}),
    )


def make_plan(held_out: HeldOut, groups: Int[Tensor, "sequences seq"], tokens: int, curve_sequences: int) -> Plan:
    """Deal sequences to the two passes; the arguments and errors are those of `run_fidelity`.

    The first pass, whose means stand for dropped edges in the second, leaves out every sequence that has a document in
    common with one of the curves'. Where that leaves none (few documents, longer than the gaps between the curves'
    sequences) it takes the other sequences of the same documents.
    """
    if held_out.at not in JACOBIAN_AT:
        raise UserError(f"jacobian.at: '{held_out.at}' is not known: choose one of {', '.join(JACOBIAN_AT)}")
    for name, number in (("tokens", tokens), ("curve_sequences", curve_sequences)):
        if number < 1:
            raise UserError(
                f"fidelity.{name}: {number} is below 1: give at least 1, or leave this part out (eval.parts)"
            )
    usable = usable_sequences(held_out)
    if len(usable) < MIN_SEQUENCES:
        raise UserError(
            f"data: {len(usable)} held-out sequences have included positions: fidelity needs {MIN_SEQUENCES} or more, "
            "some for the graph's means and others for the curves: judge more tokens, or leave it out by "
            "eval.parts=[figures,graph]"
        )
    for_curves = [usable[index] for index in spread(len(usable), min(curve_sequences, len(usable) // 2))]
    taken = set(for_curves)
    rest = [sequence for sequence in usable if sequence not in taken]
    shared = torch.isin(held_out.document[rest], held_out.document[for_curves]).any(dim=1)
    rest = [sequence for sequence, is_shared in zip(rest, shared.tolist(), strict=True) if not is_shared] or rest
    # Just as many whole sequences as hold the tokens; the surplus is cut from the last one.
    per_sequence = held_out.included[rest].sum().item() / len(rest)
    wanted = min(len(rest), -(-tokens // max(1, int(per_sequence))))
    for_pairs = [rest[index] for index in spread(len(rest), wanted)]
    mask = torch.zeros_like(held_out.included)
    mask[for_pairs] = held_out.included[for_pairs]
    mask &= mask.flatten().cumsum(0).view_as(mask) <= tokens
    return Plan(held_out, groups, [s for s in for_pairs if mask[s].any()], mask, for_curves)


def usable_sequences(held_out: HeldOut) -> list[int]:
    """Return the sequences with included positions, of which `run_fidelity` needs MIN_SEQUENCES."""
    numbers: list[int] = held_out.included.any(dim=1).nonzero()[:, 0].tolist()
    return numbers


def pair_figures(sums: Sums) -> dict[str, float]:
    """Turn the totals of the random pairs into figures, without the prefix `fidelity/`."""
    figures: dict[str, float] = {}
    for name in ablation.INTERVENTIONS:
        found = ablation.regression_figures(without_prefix(f"{name}/", sums))
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    figures["drop_out_share"] = figures.pop("ablation_drop_out_share")
    figures |= linearity.class_figures(without_prefix("linearity/", sums))
    return figures | curvature.curvature_figures(without_prefix("curvature/", sums))


def _by_group(sums: Sums) -> list[Sums]:
    grouped = {key: value.cpu() for key, value in without_prefix("group/", sums).items()}
    return [{key: value[group] for key, value in grouped.items()} for group in range(len(next(iter(grouped.values()))))]


def _curves(group_sums: list[Sums], numbers: list[int]) -> dict[str, dict[str, list[float] | None]]:
    def flat(sums: Sums) -> dict[str, float]:
        return {
            f"{kind} {r} {e}": value.item()
            for kind, table in edge_curves.curve_values(sums).items()
            for r, row in enumerate(table)
            for e, value in enumerate(row)
        }

    figures = {name: figure for name, (figure, _) in jackknife(group_sums, flat).items()}
    curves: dict[str, dict[str, list[float] | None]] = {}
    for kind in ("ce", "kl", "error"):
        for r, name in enumerate(RANKINGS):
            points = [figures[f"{kind} {r} {e}"] for e in range(len(numbers))]
            curves[f"edge_{kind}/{name}"] = {
                "x": [float(number) for number in numbers],
                "y": [point.mean for point in points],
                "standard_error": [point.standard_error for point in points],
            }
    return curves


def _arrays(samples: Sums) -> dict[str, Tensor]:
    present = samples["present"] > 0
    arrays = {}
    for name in ablation.INTERVENTIONS:
        alive = present & (samples[f"{name}_alive"] > 0)
        for side in ("predicted", "measured"):
            arrays[f"{name}_{side}"] = samples[f"{name}_{side}"][alive].float()
    arrays["second_derivatives"] = samples["curvature"][present & (samples["curved"] > 0)].float()
    chosen = torch.cat([_first(present & (samples["class"] == number)) for number in range(len(linearity.CLASSES))])
    arrays["linearity_x"] = samples["x"][chosen].float()
    arrays["linearity_y"] = samples["y"][chosen].float()
    arrays["linearity_class"] = samples["class"][chosen].long()
    arrays["linearity_latents"] = samples["latents"][chosen].long()
    return arrays


def _first(mask: Tensor) -> Tensor:
    return mask.nonzero()[:EXAMPLES_PER_CLASS, 0]
