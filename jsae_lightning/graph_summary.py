"""From sums over tokens to a graph: edges in the order of their strength, and what describes all of them together.

With the weights w_ij = sum_t |J_ij(t)| of the E pairs of latents that were active on a common token:

    graph/edges                         E
    graph/edges_for_90                  the smallest number of edges that hold 90 % of sum w
    graph/effective_edges               (sum w)^2 / sum w^2
    graph/effective_inputs_per_output   mean over outputs i with w_i. > 0 of (sum_j w_ij)^2 / sum_j w_ij^2
    graph/gini                          of the E weights, 0 if all are equal

All but the first do not change when J is multiplied by a number. Two external sorts, so in bounded memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.edge_accumulator import EdgeAccumulator
from jsae_lightning.graph_files import EDGES, strongest_first, write_edges
from jsae_lightning.metrics import ratio
from jsae_lightning.sorted_runs import KEY, Block, SortedRuns, sort_block

FIGURES = (
    "graph/edges",
    "graph/edges_for_90",
    "graph/effective_edges",
    "graph/effective_inputs_per_output",
    "graph/gini",
)
_SLACK = 1e-9  # of a sum's rounding, so that exactly 90 % is 90 %


@dataclass(frozen=True)
class GraphSummary:
    """A graph's size, strongest edges and figures."""

    num_edges: int
    top: Float[Tensor, "edges 5"]
    """The edges with the largest sum of |J|: output, input, count, mean_abs, mean; float64."""
    figures: dict[str, float]
    """Under the keys FIGURES; NaN for what a graph without weight does not have."""


def summarize_graph(
    edges: EdgeAccumulator | None,
    count_out: Int[Tensor, " d_out"],
    scratch: Path,
    target: Path,
    *,
    top_edges: int,
) -> GraphSummary | None:
    """Write `edges.parquet` to `target` and return the summary; nothing for the ranks that have no edges (None).

    Args:
        edges: all pairs.
        count_out: tokens on which each output latent is active.
        scratch: a folder for the files of the sorts.
        target: the folder `graph`.
        top_edges: how many edges the summary names.
    """
    if edges is None:
        return None
    by_mean = SortedRuns(scratch / "mean", edges.max_pairs // 2)
    by_sum = SortedRuns(scratch / "sum", edges.max_pairs // 2)
    per_output = torch.zeros(2, edges.d_out, dtype=torch.float64)
    rows = 0
    for block in edges.pairs():
        output = block[KEY] // edges.d_in
        sum_abs = block["sum_abs"]
        per_output[0].index_add_(0, output, sum_abs)
        per_output[1].index_add_(0, output, sum_abs.square())
        row = torch.arange(rows, rows + len(output))
        rows += len(output)
        table = {
            "output": output.int(),
            "input": (block[KEY] % edges.d_in).int(),
            "count": block["count"],
            "mean_abs": (sum_abs / count_out[output]).float(),
            "mean": (block["sum"] / count_out[output]).float(),
        }
        by_mean.add(sort_block({KEY: strongest_first(table["mean_abs"], row)} | table))
        by_sum.add(sort_block({KEY: strongest_first(sum_abs, row), "sum_abs": sum_abs} | table))
    write_edges(target / EDGES, by_mean.merged())
    total, squares = per_output.sum(dim=1).tolist()
    needed, gini, top = _by_weight(by_sum.merged(), total, rows, top_edges)
    used = per_output[0] > 0
    effective = per_output[0][used].square() / per_output[1][used]
    inputs_per_output = ratio(effective.sum().item(), float(used.sum()))
    figures = (float(rows), needed, ratio(total**2, squares), inputs_per_output, gini)
    return GraphSummary(rows, top, dict(zip(FIGURES, figures, strict=True)))


def _by_weight(
    blocks: Iterator[Block], total: float, num_edges: int, top_edges: int
) -> tuple[float, float, Float[Tensor, "edges 5"]]:
    """Go through the edges by falling weight: those needed for 90 %, the Gini coefficient, the first `top_edges`."""
    needed, held, ranked, done = float("nan"), 0.0, 0.0, 0
    top = [torch.zeros(0, 5, dtype=torch.float64)]
    for block in blocks:
        weight = block["sum_abs"]
        if done < top_edges:
            names = ("output", "input", "count", "mean_abs", "mean")
            top.append(torch.stack([block[name][: top_edges - done].double() for name in names], dim=1))
        cumulative = held + weight.cumsum(0)
        if needed != needed and total > 0 and cumulative[-1] >= 0.9 * (1 - _SLACK) * total:
            needed = float(done + int((cumulative < 0.9 * (1 - _SLACK) * total).sum()) + 1)
        ranked += float((torch.arange(done + 1, done + len(weight) + 1, dtype=torch.float64) * weight).sum())
        held, done = float(cumulative[-1]), done + len(weight)
    gini = ratio(num_edges + 1.0, float(num_edges)) - ratio(2 * ranked, num_edges * total)
    return needed, gini, torch.cat(top)
