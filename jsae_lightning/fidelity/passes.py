"""The two passes over held-out sequences: random pairs and the graph's means on some, the curves on others.

Both work on one shard's sequences, give the same keys and shapes on every shard, and are to be summed over shards.
Entries named `group/...` have the groups of documents as their first dimension. Random draws depend on (seed, purpose,
sequence) only, so sums depend neither on batches nor on shards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.evaluation_progress import EvaluationProgress
from jsae_lightning.fidelity import ablation, curvature, edge_curves, linearity
from jsae_lightning.fidelity.edge_ranking import RANKINGS, edge_numbers
from jsae_lightning.fidelity.points import Points, batches, draw_entries, points_at
from jsae_lightning.held_out import HeldOut
from jsae_lightning.metrics import Sums, add_sums, with_prefix
from jsae_lightning.seeding import seeded_generator
from jsae_lightning.splicing import chunks, splice_at

MAX_SAMPLES = 4000
"""Tokens whose pairs are kept for figures, spread over all of them."""


@dataclass(frozen=True)
class Plan:
    """Who reads what; the same on every rank."""

    held_out: HeldOut
    groups: Int[Tensor, "sequences seq"]
    pair_sequences: list[int]
    """The sequences of the first pass."""
    pair_mask: Bool[Tensor, "sequences seq"]
    """The positions of the first pass."""
    curve_sequences: list[int]

    @property
    def num_groups(self) -> int:
        """Groups of documents."""
        return int(self.groups.max()) + 1

    @property
    def entries(self) -> tuple[int, int]:
        """(k_out, k_in)."""
        return self.held_out.pair.output_sae.k, self.held_out.pair.input_sae.k

    @property
    def numbers(self) -> list[int]:
        """The numbers of kept edges."""
        return edge_numbers(*self.entries)

    @property
    def sample_every(self) -> int:
        """One token in so many is kept for figures."""
        return max(1, -(-int(self.pair_mask.sum()) // MAX_SAMPLES))


@torch.no_grad()
def pair_sums(plan: Plan, shard: tuple[int, int]) -> Sums:
    """Return the sums of ablation, linearity, curvature (`group/...`), of the graph's means, and the samples.

    Samples are rows of one table for all shards, each filled by one of them and 0 on the others.
    """
    held_out, (rank, world_size) = plan.held_out, shard
    pair, device, dtype = held_out.pair, held_out.pair.input_sae.W_enc.device, held_out.pair.input_sae.W_enc.dtype
    number = (plan.pair_mask.flatten().cumsum(0) - 1).view_as(plan.pair_mask)  # of each token among those of the pass
    rows = -(-int(plan.pair_mask.sum()) // plan.sample_every)
    sums = _zero_pair_sums(plan, rows)
    share = plan.pair_sequences[rank::world_size]
    with (
        torch.autocast(device.type, enabled=False),
        EvaluationProgress("fidelity: pairs of latents", len(share), "sequences") as progress,
    ):
        for batch in batches(share, held_out.batch_sequences):
            mask = plan.pair_mask[batch]
            draws, random = (_draw(plan, batch, name)[mask].to(device) for name in ("entry", "edge"))
            mlp_in = held_out.language_model.mlp_in(held_out.tokens[batch].to(device)).to(dtype)[mask.to(device)]
            group, index = plan.groups[batch][mask].to(device), number[batch][mask].to(device)
            start = 0
            for x in chunks(mlp_in, pair_cost(plan)):
                some = slice(start, start + len(x))
                start += len(x)
                points = points_at(pair, held_out.mlp, x, held_out.at)
                sums = add_sums(sums, _studied(plan, points, draws[some], random[some], group[some], index[some], rows))
            progress.advance(len(batch))
    return sums


@torch.no_grad()
def curve_sums(plan: Plan, means: Float[Tensor, "rankings prefixes d_sae"], shard: tuple[int, int]) -> Sums:
    """Return the sums behind CE, KL and error of every ranking and number of edges (`group/...`)."""
    held_out, (rank, world_size) = plan.held_out, shard
    device = held_out.pair.input_sae.W_enc.device
    sums = _zero_curve_sums(plan)
    parts = list(batches(plan.curve_sequences[rank::world_size], held_out.batch_sequences))
    with (
        torch.autocast(device.type, enabled=False),
        EvaluationProgress("fidelity: edge curves", len(parts) * spliced_passes(plan), "forward passes") as progress,
    ):
        for batch in parts:
            sums = add_sums(sums, _curves_of_batch(plan, means, batch, progress.advance))
    return sums


def spliced_passes(plan: Plan) -> int:
    """Forward passes with an output spliced in that a batch of the curves takes: the SAE's, none, all, and some edges'.

    Some edges are others in every ranking.
    """
    return 3 + len(RANKINGS) * (len(plan.numbers) - 2)


def pair_cost(plan: Plan) -> int:
    """Elements of the largest temporary that a token needs."""
    pair, (k_out, k_in) = plan.held_out.pair, plan.entries
    return max(
        plan.held_out.mlp.d_mlp * max(k_out, k_in),
        len(RANKINGS) * (len(plan.numbers) + 1) * k_out * k_in,
        pair.input_sae.d_sae,
        pair.output_sae.d_sae,
        3 * linearity.GRID_POINTS,
    )


def _draw(plan: Plan, batch: list[int], purpose: str) -> Tensor:
    """Uniform numbers for every position of some sequences: `entry` (batch, seq) of J, `edge` (batch, seq, out, in)."""
    k_out, k_in = plan.entries
    seq, drawn = plan.held_out.tokens.shape[1], []
    for sequence in batch:
        generator = seeded_generator(plan.held_out.seed, "fidelity", purpose, sequence)
        if purpose == "entry":
            drawn.append(torch.randint(k_out * k_in, (seq,), generator=generator))
        else:
            drawn.append(torch.rand(seq, k_out, k_in, generator=generator))
    return torch.stack(drawn)


def _studied(
    plan: Plan,
    points: Points,
    draws: Int[Tensor, " tokens"],
    random: Float[Tensor, "tokens k_out k_in"],
    group: Int[Tensor, " tokens"],
    index: Int[Tensor, " tokens"],
    rows: int,
) -> Sums:
    """Sum everything of the first pass over some tokens."""
    pair, mlp = plan.held_out.pair, plan.held_out.mlp
    pairs, has_pair = draw_entries(points, draws)
    changes = ablation.predicted_and_measured(pair, mlp, points, pairs)
    moved, values = linearity.scalar_functions(pair, mlp, points, pairs)
    classes = linearity.classify(values, pairs.scale)
    second = curvature.second_derivatives(pair, mlp, points, pairs)
    share = curvature.curvature_share(pairs.jacobian, second, pairs.s_in)
    terms = with_prefix("linearity/", linearity.class_terms(classes))
    terms |= with_prefix("curvature/", curvature.curvature_terms(share))
    for name, change in changes.items():
        terms |= with_prefix(f"{name}/", ablation.regression_terms(*change))
    sums = {f"group/{key}": _by_group(value, group[has_pair], plan.num_groups) for key, value in terms.items()}
    kept = edge_curves.kept_edges(pair, mlp, points, random.to(points.x.dtype), plan.numbers)
    sums |= with_prefix("graph/", edge_curves.remainder_sums(points, kept.prefixes, pair.output_sae.d_sae))
    columns = {"latents": torch.stack([pairs.output, pairs.input], dim=1), "class": classes, "x": moved, "y": values}
    columns |= {"curvature": share.nan_to_num(0.0), "curved": ~share.isnan(), "present": torch.ones_like(share)}
    for name, (predicted, measured, alive) in changes.items():
        columns |= {f"{name}_predicted": predicted, f"{name}_measured": measured, f"{name}_alive": alive}
    sampled = index[has_pair] % plan.sample_every == 0
    slot = index[has_pair][sampled] // plan.sample_every
    for name, column in columns.items():
        table = torch.zeros(rows, *column.shape[1:], dtype=torch.float64, device=column.device)
        sums[f"sample/{name}"] = table.index_copy_(0, slot, column[sampled].double())
    return sums


def _curves_of_batch(
    plan: Plan, means: Float[Tensor, "rankings prefixes d_sae"], batch: list[int], advance: Callable[[int], None]
) -> Sums:
    held_out, pair, model = plan.held_out, plan.held_out.pair, plan.held_out.language_model
    device, dtype = pair.input_sae.W_enc.device, pair.input_sae.W_enc.dtype
    tokens, included = held_out.tokens[batch].to(device), held_out.included[batch].to(device)
    groups = plan.groups[batch].to(device)
    mlp_in = model.mlp_in(tokens).to(dtype)[included]
    random = _draw(plan, batch, "edge")[included.cpu()].to(device, dtype)
    studied = [points_at(pair, held_out.mlp, x, held_out.at) for x in chunks(mlp_in, pair_cost(plan))]
    sizes = [len(points.x) for points in studied]
    kept = [
        edge_curves.kept_edges(pair, held_out.mlp, points, draws, plan.numbers)
        for points, draws in zip(studied, random.split(sizes) if sizes else (), strict=True)
    ]
    positions = included[:, :-1].nonzero()
    of_position, of_token = groups[:, :-1][included[:, :-1]], groups[included]
    sums = _zero_curve_sums(plan)

    def add(key: str, where: tuple[int, ...], values: Tensor, group: Tensor) -> None:
        total = sums[f"group/{key}"]
        for index in where:
            total = total[:, index]  # a view
        total += _by_group(values, group, plan.num_groups)

    clean = model.logits(tokens)

    def losses(y: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "losses positions"]:
        logits = model.logits(tokens, replace_mlp_out=splice_at(included, lambda old: y.to(old.dtype)))
        advance(1)
        return edge_curves.position_losses(logits, clean, tokens, positions)

    true = torch.cat([mlp_in[:0], *(pair.output_sae.decode(points.latents_out) for points in studied)])
    add("tokens", (), torch.ones(len(true), device=device), of_token)
    add("true", (), true, of_token)
    add("true_squared", (), true.double().square().sum(dim=1), of_token)
    add("positions", (), torch.ones(len(positions), device=device), of_position)
    add("ce_clean", (), edge_curves.position_losses(clean, clean, tokens, positions)[0], of_position)
    for name, loss in zip(edge_curves.LOSSES, losses(true), strict=True):
        add(f"{name}_true", (), loss, of_position)
    shared: dict[int, Tensor] = {}  # no edges and all edges are the same in every ranking
    for e in range(len(plan.numbers)):
        for r in range(len(RANKINGS)):
            parts = [
                edge_curves.graph_outputs(pair, points, some.prefixes[r], some.counts[r, e], means[r].to(device))
                for points, some in zip(studied, kept, strict=True)
            ]
            y = torch.cat([mlp_in[:0], *parts])
            add("error_squared", (r, e), (y.double() - true.double()).square().sum(dim=1), of_token)
            if e in (0, len(plan.numbers) - 1):
                shared[e] = both = shared[e] if e in shared else losses(y)
            else:
                both = losses(y)
            for name, loss in zip(edge_curves.LOSSES, both, strict=True):
                add(name, (r, e), loss, of_position)
    return sums


def _by_group(values: Tensor, group: Int[Tensor, " rows"], num_groups: int) -> Tensor:
    """Sum rows by group, float64 (groups, ...)."""
    values = values.double()
    return values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, group, values)


def _zero_pair_sums(plan: Plan, rows: int) -> Sums:
    """All keys and shapes of the first pass as zeros, taken from a token that is all zeros."""
    pair, (k_out, k_in) = plan.held_out.pair, plan.entries
    token = pair.input_sae.W_enc.new_zeros(1, pair.d_model)
    points = points_at(pair, plan.held_out.mlp, token, plan.held_out.at)
    nothing = torch.zeros(1, dtype=torch.int64, device=token.device)
    sums = _studied(plan, points, nothing, token.new_zeros(1, k_out, k_in), nothing, nothing, rows)
    return {key: torch.zeros_like(value) for key, value in sums.items()}


def _zero_curve_sums(plan: Plan) -> Sums:
    pair = plan.held_out.pair
    grid = (len(RANKINGS), len(plan.numbers))
    shapes: dict[str, tuple[int, ...]] = {"ce": grid, "kl": grid, "error_squared": grid, "true": (pair.d_model,)}
    shapes |= dict.fromkeys(("tokens", "positions", "true_squared", "ce_clean", "ce_true", "kl_true"), ())
    zero = pair.input_sae.W_enc.new_zeros((), dtype=torch.float64)
    return {f"group/{key}": zero.new_zeros(plan.num_groups, *shape) for key, shape in shapes.items()}
