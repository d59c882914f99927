"""The global graph of a pair: which input latents drive which output latents, on average over held-out tokens.

    mean_abs_ij = sum_t |J_ij(t)| / #{t : i active},      mean_ij = sum_t J_ij(t) / #{t : i active}

over the counted tokens, with J_ij = 0 where j is inactive: for the average token on which output latent i is active,
how much input latent j matters. Farnik et al. (arXiv 2502.18147) judge single tokens; the average over tokens is ours.

Two passes over the tokens, each with one forward pass of the language model (up to the MLP) per batch: the first adds
up the pairs and keeps the latents' top contexts, the second reads the windows around them and the top edges' contexts.
Ranks share the sequences out; rank 0 writes the files.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning import graph_files
from jsae_lightning.contexts import TokenText, TopContexts, Windows, context_record, rounded
from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.edge_accumulator import MAX_PAIRS, EdgeAccumulator, LatentStatistics, gather_on_first_rank
from jsae_lightning.edge_contexts import EdgeContexts
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_progress import followed
from jsae_lightning.graph_files import GRAPHML_EDGES, load_graph, read_edges
from jsae_lightning.graph_summary import FIGURES, GraphSummary, summarize_graph
from jsae_lightning.grouped_evaluation import spaced
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jacobians import JACOBIAN_AT, jacobian_of_latents, linearization_point
from jsae_lightning.sae import Latents
from jsae_lightning.splicing import chunks

__all__ = ["load_graph", "read_edges", "run_graph", "sequences_of"]

SIDES = ("input", "output")


@dataclass(frozen=True)
class Sequence:
    """The included tokens of one sequence."""

    number: int
    position: Int[Tensor, " tokens"]
    mlp_in: Float[Tensor, "tokens d_model"]


@torch.no_grad()
def run_graph(
    held_out: HeldOut,
    folder: Path,
    *,
    tokens: int | None,
    top_edges: int,
    contexts: int = 8,
    edge_contexts: int = 4,
    max_pairs: int = MAX_PAIRS,
    graphml_edges: int = GRAPHML_EDGES,
) -> dict[str, float]:
    """Write `graph/` to `folder` and return the graph's figures; with several ranks, all must call it.

    Args:
        held_out: the pair, the model and the tokens; J is taken at `held_out.at`.
        folder: where `graph/` goes; with several ranks on a file system that they share.
        tokens: use so many of the included tokens, evenly spaced, as the Jacobian's figures do; None: all.
        top_edges: the edges with the largest sum of |J| over all tokens, so many, get contexts.
        contexts: sequences shown for each latent.
        edge_contexts: sequences shown for each top edge.
        max_pairs: rows in memory (see `edge_accumulator`); more pairs go through files in `graph/`.
        graphml_edges: edges in `graph.graphml`, those with the largest mean |J|.

    Returns:
        `graph/edges`, `graph/edges_for_90`, `graph/effective_edges`, `graph/effective_inputs_per_output`, `graph/gini`:
        see `graph_summary`; the same on every rank.

    Raises:
        UserError: `held_out.at` is unknown, a number is below its minimum, no token is counted.
    """
    mask = check_graph(held_out, tokens, top_edges=top_edges, contexts=contexts, edge_contexts=edge_contexts)
    rank, _ = rank_and_world_size()
    pair, target = held_out.pair, folder / "graph"
    parts = target / ".parts"
    if rank == 0:
        target.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    _wait_for_all(held_out)
    try:
        edges = EdgeAccumulator(pair.input_sae.d_sae, pair.output_sae.d_sae, parts / str(rank), max_pairs=max_pairs)
        statistics, top = _first_pass(held_out, mask, edges, contexts)
        totals = {side: statistics[side].reduced() for side in SIDES}
        whole = gather_on_first_rank(edges, parts)
        summary = summarize_graph(
            whole if rank == 0 else None, totals["output"]["count"], parts / "sorted", target, top_edges=top_edges
        )
        summary = _from_first_rank(summary, top_edges, held_out)
        edge_top = EdgeContexts(summary.top[:, :2].long(), edge_contexts, held_out)
        windows = _second_pass(held_out, mask, top, edge_top)
        if rank == 0:
            _write(held_out, target, mask, totals, summary, top, windows, edge_top, graphml_edges)
        _wait_for_all(held_out)
    finally:  # without waiting: after an error the other ranks are elsewhere
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
    return summary.figures


def check_graph(held_out: HeldOut, tokens: int | None, **numbers: int) -> Bool[Tensor, "sequences seq"]:
    """Return the mask of the tokens that `run_graph` counts; arguments and errors are its own."""
    if held_out.at not in JACOBIAN_AT:
        raise UserError(f"jacobian.at: '{held_out.at}' is not known: choose one of {', '.join(JACOBIAN_AT)}")
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name}: {number} is too few: give 1 or more")
    mask = spaced(held_out.included, tokens)
    if not mask.any():
        raise UserError(f"data: none of the {held_out.tokens.numel()} held-out positions counts: exclude fewer of them")
    return mask


def sequences_of(held_out: HeldOut, wanted: Bool[Tensor, " sequences"]) -> Iterator[Sequence]:
    """Yield this rank's share of the wanted sequences in rising order; one forward pass per `batch_sequences`."""
    weights, mine = held_out.pair.input_sae.W_enc, _share_of(held_out, wanted)
    for start in range(0, len(mine), held_out.batch_sequences):
        batch = mine[start : start + held_out.batch_sequences]
        with torch.autocast(weights.device.type, enabled=False):
            mlp_in = held_out.language_model.mlp_in(held_out.tokens[batch].to(weights.device)).to(weights.dtype)
        for number, x in zip(batch, mlp_in, strict=True):
            position = held_out.included[number].nonzero()[:, 0].to(weights.device)
            yield Sequence(number, position, x[position])


def _share_of(held_out: HeldOut, wanted: Bool[Tensor, " sequences"]) -> list[int]:
    rank, world_size = rank_and_world_size()
    return [number for number in range(rank, len(held_out.tokens), world_size) if wanted[number]]


def followed_sequences(held_out: HeldOut, wanted: Bool[Tensor, " sequences"], name: str) -> Iterator[Sequence]:
    """Yield what `sequences_of` does, and show how far the pass `name` is."""
    return followed(sequences_of(held_out, wanted), name, len(_share_of(held_out, wanted)), "sequences")


def latents_of(held_out: HeldOut, x: Float[Tensor, "tokens d_model"]) -> dict[str, Latents]:
    """Return both SAEs' latents at the point where the Jacobian is taken, in bounded memory."""
    pair, mlp = held_out.pair, held_out.mlp
    sides: dict[str, list[Latents]] = {side: [] for side in SIDES}
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks(x, max(pair.input_sae.d_sae, pair.output_sae.d_sae, mlp.d_mlp)):
            latents_in = pair.input_sae.encode(chunk)
            point = linearization_point(pair, chunk, latents_in, held_out.at)
            sides["input"].append(latents_in)
            sides["output"].append(pair.output_sae.encode(mlp(point)))
    return {
        side: Latents(torch.cat([part.values for part in found]), torch.cat([part.indices for part in found]))
        for side, found in sides.items()
    }


def _first_pass(
    held_out: HeldOut, mask: Bool[Tensor, "sequences seq"], edges: EdgeAccumulator, n: int
) -> tuple[dict[str, LatentStatistics], dict[str, TopContexts]]:
    """Add up the edges and the latents' statistics, and keep the latents' top contexts, merged over ranks."""
    pair, mlp = held_out.pair, held_out.mlp
    device = pair.input_sae.W_enc.device
    widths = {side: sae.d_sae for side, sae in pair.named_saes()}
    statistics = {side: LatentStatistics(width, device) for side, width in widths.items()}
    top = {side: TopContexts(width, n, device) for side, width in widths.items()}
    for sequence in followed_sequences(held_out, mask.any(dim=1), "graph: edges"):
        counts = mask[sequence.number].to(device)[sequence.position]
        x, position = sequence.mlp_in[counts], sequence.position[counts]
        latents = latents_of(held_out, x)
        for side in SIDES:
            statistics[side].add(latents[side])
            top[side].add_latents(latents[side], sequence.number, position)
        size = max(1, len(chunks(x, mlp.d_mlp * max(pair.input_sae.k, pair.output_sae.k))[0]))
        for start in range(0, len(x), size):
            part = {side: Latents(*(tensor[start : start + size] for tensor in latents[side])) for side in SIDES}
            with torch.autocast(device.type, enabled=False):
                some = x[start : start + size]
                edges.add(jacobian_of_latents(pair, mlp, some, part["input"], part["output"], at=held_out.at))
    for side in SIDES:
        top[side].merge_ranks()
    return statistics, top


def _second_pass(
    held_out: HeldOut, mask: Bool[Tensor, "sequences seq"], top: dict[str, TopContexts], edge_top: EdgeContexts
) -> dict[str, Windows]:
    """Read the windows of the top contexts, and find and read those of the top edges, merged over ranks."""
    windows = {side: Windows(top[side]) for side in SIDES}
    for sequence in followed_sequences(held_out, mask.any(dim=1), "graph: contexts"):
        latents = latents_of(held_out, sequence.mlp_in)
        for side in SIDES:
            windows[side].read(latents[side], sequence.number, sequence.position)
        if len(edge_top.edges):
            counts = mask[sequence.number].to(sequence.position.device)[sequence.position]
            with torch.autocast(sequence.mlp_in.device.type, enabled=False):
                edge_top.add(
                    sequence.mlp_in, latents["output"], latents["input"], sequence.number, sequence.position, counts
                )
    for side in SIDES:
        windows[side].merge_ranks()
    edge_top.top.merge_ranks()
    return windows


def _write(
    held_out: HeldOut,
    target: Path,
    mask: Bool[Tensor, "sequences seq"],
    totals: dict[str, dict[str, Tensor]],
    summary: GraphSummary,
    top: dict[str, TopContexts],
    windows: dict[str, Windows],
    edge_top: EdgeContexts,
    graphml_edges: int,
) -> None:
    """Write all files but `edges.parquet`, which is there already."""
    text = TokenText(held_out.tokenizer)
    graph_files.write_latents(target / graph_files.LATENTS, totals)
    records = (
        record
        for side in SIDES
        for record in context_records(held_out, text, side, totals[side]["count"], top[side], windows[side])
    )
    num_latents = sum(len(totals[side]["count"]) for side in SIDES)
    graph_files.write_jsonl(
        target / "contexts.jsonl", followed(records, "graph: contexts written", num_latents, "latents")
    )
    figures = [
        {"output": int(i), "input": int(j), "mean_abs": rounded([a])[0], "mean": rounded([m])[0], "count": int(n)}
        for i, j, n, a, m in summary.top.tolist()
    ]
    graph_files.write_jsonl(target / "edge_contexts.jsonl", edge_top.records(text, figures))
    graph = load_graph(target, max_edges=graphml_edges)
    graph_files.write_graphml(target / graph_files.GRAPHML, graph)
    graph_files.write_json(
        target / graph_files.GRAPH,
        {
            "format_version": graph_files.FORMAT_VERSION,
            "tokens": int(mask.sum()),
            "at": held_out.at,
            "d_sae_input": held_out.pair.input_sae.d_sae,
            "d_sae_output": held_out.pair.output_sae.d_sae,
            "num_edges": summary.num_edges,
            "kept_edges": summary.num_edges,
            "graphml_edges": graph.number_of_edges(),
            "note": "edges.parquet holds every pair of latents that was active on a common token; graph.graphml "
            "those with the largest mean |J|; edge_contexts.jsonl those with the largest sum of |J| over tokens",
        },
    )


def context_records(
    held_out: HeldOut, text: TokenText, side: str, count: Int[Tensor, " d_sae"], top: TopContexts, windows: Windows
) -> Iterator[dict[str, Any]]:
    """Yield the record of each latent of a side, with its top contexts: none for one that is never active."""
    values, counts = windows.values.cpu(), count.tolist()
    places = [top.columns[name].tolist() for name in ("sequence", "position")]
    for latent, (sequences, positions) in enumerate(zip(*places, strict=True)):
        examples = [
            context_record(
                text, held_out.tokens, held_out.document, sequence, position, {"activations": values[latent, place]}
            )
            for place, (sequence, position) in enumerate(zip(sequences, positions, strict=True))
            if sequence >= 0
        ]
        yield {"side": side, "latent": latent, "count": counts[latent], "examples": examples}


def _wait_for_all(held_out: HeldOut) -> None:
    all_reduce_sum({"barrier": torch.zeros(1, device=held_out.pair.input_sae.W_enc.device)})


def _from_first_rank(summary: GraphSummary | None, top_edges: int, held_out: HeldOut) -> GraphSummary:
    """Return rank 0's summary on every rank, by adding it to zeros."""
    device = held_out.pair.input_sae.W_enc.device
    top = torch.zeros(top_edges, 5, dtype=torch.float64)
    numbers = torch.zeros(2 + len(FIGURES), dtype=torch.float64)
    if summary is not None:
        top[: len(summary.top)] = summary.top
        numbers = torch.tensor([summary.num_edges, len(summary.top), *summary.figures.values()], dtype=torch.float64)
    found = all_reduce_sum({"top": top.to(device), "numbers": numbers.to(device)})
    num_edges, kept, *figures = found["numbers"].tolist()
    return GraphSummary(int(num_edges), found["top"][: int(kept)].cpu(), dict(zip(FIGURES, figures, strict=True)))
