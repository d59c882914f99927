"""Standard errors of figures that are ratios of sums, over documents, by the delete-a-group jackknife.

Neighbouring tokens of one document resemble each other, so tokens are no independent sample, but documents are nearly
one. They are dealt to G contiguous groups; with theta_g the figure on all groups but g,

    standard error = sqrt((G - 1) / G * sum_g (theta_g - mean_g theta_g)^2)

(Efron and Stein 1981; for groups, Kott 2001). For a mean over groups of equal size it is the classical standard error
of the mean, s / sqrt(G). It asks nothing of a figure but that it is smooth in its sums; the share of dead latents,
which jumps when the only group in which a latent fires is left out, has a rough error only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.metrics import Sums


@dataclass(frozen=True)
class Figure:
    """A figure on all tokens, and its standard error over documents (NaN if there are fewer than two groups)."""

    mean: float
    standard_error: float


def document_groups(document: Int[Tensor, "sequences seq"], num_groups: int) -> Int[Tensor, "sequences seq"]:
    """Return each position's group: G = min(num_groups, D) contiguous groups of as many of the D documents each.

    group = floor(document * G / D), int64, for documents numbered from 0. Raises ValueError if `num_groups` < 1.
    """
    if num_groups < 1:
        raise ValueError(f"{num_groups} groups: there must be at least one")
    num_documents = int(document.max()) + 1
    return document * min(num_groups, num_documents) // num_documents


def jackknife(
    group_sums: list[Sums], figures: Callable[[Sums], dict[str, float]]
) -> dict[str, tuple[Figure, Float[Tensor, " groups"]]]:
    """Return every figure of the total of `group_sums` with its standard error; see the module's docstring.

    Args:
        group_sums: one dict of additive sums for each group, all with the same keys and shapes. A group without any
            data, whose sums are all zero, does not count as one.
        figures: turns such sums into figures by name; figures that are NaN on the total are NaN here.

    Returns:
        By name, the figure and its leave-one-out values, float64, one for each group that counts.
    """
    total, without = leave_one_out(group_sums, figures)
    found = {}
    for name, mean in total.items():
        replicates = torch.tensor([replicate[name] for replicate in without], dtype=torch.float64)
        found[name] = Figure(mean, standard_error(replicates)), replicates
    return found


def leave_one_out(
    group_sums: list[Sums], figures: Callable[[Sums], dict[str, float]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the figures of the total, and those of the total without each group that holds data; see `jackknife`."""
    total = group_sums[0]
    for sums in group_sums[1:]:
        total = {key: value + sums[key] for key, value in total.items()}
    filled = [sums for sums in group_sums if any(bool((value != 0).any()) for value in sums.values())]
    if len(filled) < 2:
        return figures(total), []
    return figures(total), [figures({key: value - sums[key] for key, value in total.items()}) for sums in filled]


def standard_error(replicates: Float[Tensor, " groups"]) -> float:
    """Return sqrt((G - 1) / G * sum_g (theta_g - mean theta)^2) of the leave-one-out figures theta; NaN if G < 2.

    The difference of two figures that were measured on the same groups has the standard error of the difference of
    their replicates, in which what both share cancels.
    """
    num_groups = len(replicates)
    if num_groups < 2:
        return math.nan
    deviations = replicates.double() - replicates.double().mean()
    return math.sqrt((num_groups - 1) / num_groups * float(deviations.square().sum()))
