"""What automated interpretability reads: examples of latents, out of a pair and held-out tokens.

One JSON object a line and latent. The names of the groups of examples are those of a `NeuronRecord` of OpenAI's
`neuron_explainer` ("Language models can explain neurons in language models", 2023), whose explainers and simulators
take {tokens, activations} records; `not_active` and the quantiles are what the detection and fuzzing scorers of
EleutherAI's delphi ("Automatically Interpreting Millions of Features", arXiv 2410.13928) tell apart.

    side, latent, count        which latent, and on how many of the counted tokens it is active
    density                    count / tokens
    max_activation             the largest of its activations
    neuron_id                  {"layer_index", "neuron_index"}: the language model's layer (null if unknown), the latent
    most_positive_activation_records   the sequences with the highest peaks, highest first
    random_sample_by_quantile  `quantiles` lists: sequences on which it is active, a uniform sample, in equal groups by
                               their peak's activation, lowest group first (fewer where it is active on few sequences)
    quantile_boundaries        the lowest peak of each group but the first
    random_sample              windows around random tokens, whether it is active there or not
    not_active                 windows around other random tokens, in all of which it is inactive

Each example is {tokens (strings that join to the text), token_ids, activations, peak (index of the window's centre),
sequence, position, document}; a window is that of `contexts`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from jsae_lightning.contexts import (
    AFTER,
    BEFORE,
    TokenText,
    TopContexts,
    Windows,
    context_record,
    rounded,
    window_values,
)
from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.edge_accumulator import LatentStatistics
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_files import EXPLANATIONS
from jsae_lightning.evaluation_progress import followed
from jsae_lightning.graph import SIDES, followed_sequences, latents_of
from jsae_lightning.graph_files import write_jsonl
from jsae_lightning.grouped_evaluation import spaced
from jsae_lightning.held_out import HeldOut

QUANTILES = 5


@torch.no_grad()
def export_autointerp(
    held_out: HeldOut,
    folder: Path,
    *,
    latents: int | None,
    examples: int,
    quantiles: int = QUANTILES,
    tokens: int | None = None,
) -> dict[str, Path]:
    """Write `autointerp/input.jsonl` and `output.jsonl` to `folder`; with several ranks, all must call it.

    Args:
        held_out: the pair, the model and the tokens.
        folder: an evaluation's folder.
        latents: so many of each side, drawn at random by `held_out.seed` among those that are ever active; None: all.
        examples: in each group of examples.
        quantiles: groups of activating examples beside the top ones.
        tokens: use so many of the included tokens, evenly spaced; None: all.

    Returns:
        The path of each side's file.

    Raises:
        UserError: a number is below 1, or no token is counted.
    """
    for name, number in (("latents", latents), ("examples", examples), ("quantiles", quantiles)):
        if number is not None and number < 1:
            raise UserError(f"{name}: {number} is too few: give 1 or more")
    mask = spaced(held_out.included, tokens)
    if not mask.any():
        raise UserError(f"data: none of the {held_out.tokens.numel()} held-out positions counts: exclude fewer of them")
    statistics, top, sample = _first_pass(held_out, mask, examples, quantiles)
    totals = {side: statistics[side].reduced() for side in SIDES}
    chosen = {side: _choose(totals[side]["count"], latents, held_out.seed + n) for n, side in enumerate(SIDES)}
    pool = random_positions(mask, 4 * examples, held_out.seed)
    windows, random_windows = _second_pass(held_out, mask, {"top": top, "sample": sample}, pool, chosen)
    paths = {side: folder / EXPLANATIONS / f"{side}.jsonl" for side in SIDES}
    if rank_and_world_size()[0] == 0:
        for side in SIDES:
            writer = _Writer(held_out, side, examples, quantiles, int(mask.sum()), pool)
            records = (
                writer.record(latent, totals[side], windows["top"][side], windows["sample"][side], around)
                for latent, around in zip(chosen[side].tolist(), random_windows[side].cpu(), strict=True)
            )
            write_jsonl(paths[side], followed(records, f"autointerp: {side}", len(chosen[side]), "latents"))
    return paths


def random_positions(mask: Bool[Tensor, "sequences seq"], n: int, seed: int) -> Int[Tensor, "n 2"]:
    """Return (sequence, position) of `n` counted tokens drawn without replacement, or of all if they are fewer."""
    places = mask.nonzero()
    return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n]]


def _choose(count: Int[Tensor, " d_sae"], latents: int | None, seed: int) -> Int[Tensor, " latents"]:
    """Return the latents to export, in rising order."""
    alive = count.nonzero()[:, 0]
    if latents is not None:
        alive = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:latents]]
    return alive.sort().values


def priorities(rows: Int[Tensor, " m"], sequence: int, seed: int) -> Tensor:
    """Return a pseudo-random number in [0, 1) for each (row, sequence), the same on every rank and in every order.

    The sequences with the highest numbers are a uniform sample. Mixes the bits as in a 32-bit finaliser of
    MurmurHash3, in int64 so that no product overflows.
    """
    low = 2**32 - 1
    x = (rows * 2654435761 + sequence * 40503 + seed * 97) & low
    for factor in (0x45D9F3B, 0x45D9F3B):
        x = ((x ^ (x >> 16)) * factor) & low
    return ((x ^ (x >> 16)) >> 8).float() / 2**24


def _first_pass(
    held_out: HeldOut, mask: Bool[Tensor, "sequences seq"], examples: int, quantiles: int
) -> tuple[dict[str, LatentStatistics], dict[str, TopContexts], dict[str, TopContexts]]:
    """Return each side's statistics, top contexts, and a uniform sample of the sequences where a latent is active."""
    device = held_out.pair.input_sae.W_enc.device
    widths = {side: sae.d_sae for side, sae in held_out.pair.named_saes()}
    statistics = {side: LatentStatistics(width, device) for side, width in widths.items()}
    top = {side: TopContexts(width, examples, device) for side, width in widths.items()}
    sample = {side: TopContexts(width, examples * quantiles, device) for side, width in widths.items()}
    for sequence in followed_sequences(held_out, mask.any(dim=1), "autointerp: examples"):
        counts = mask[sequence.number].to(device)[sequence.position]
        position = sequence.position[counts]
        for side, found in latents_of(held_out, sequence.mlp_in[counts]).items():
            statistics[side].add(found)
            top[side].add_latents(found, sequence.number, position)
            sample[side].add_latents(
                found, sequence.number, position, lambda rows, number: priorities(rows, number, held_out.seed)
            )
    for side in SIDES:
        top[side].merge_ranks()
        sample[side].merge_ranks()
    return statistics, top, sample


def _second_pass(
    held_out: HeldOut,
    mask: Bool[Tensor, "sequences seq"],
    tables: dict[str, dict[str, TopContexts]],
    pool: Int[Tensor, "n 2"],
    chosen: dict[str, Int[Tensor, " latents"]],
) -> tuple[dict[str, dict[str, Windows]], dict[str, Tensor]]:
    """Read the windows of both tables, and all chosen latents' activations around the random tokens `pool`."""
    device = held_out.pair.input_sae.W_enc.device
    windows = {name: {side: Windows(tables[name][side]) for side in SIDES} for name in tables}
    around = {side: torch.zeros(len(chosen[side]), len(pool), BEFORE + 1 + AFTER, device=device) for side in SIDES}
    pool = pool.to(device)
    for sequence in followed_sequences(held_out, mask.any(dim=1), "autointerp: windows"):
        for side, found in latents_of(held_out, sequence.mlp_in).items():
            for name in tables:
                windows[name][side].read(found, sequence.number, sequence.position)
            d_sae = len(windows["top"][side].values)
            for place in (pool[:, 0] == sequence.number).nonzero()[:, 0].tolist():
                rows = chosen[side].to(device)
                centre = pool[place, 1].expand(len(rows))
                around[side][:, place] = window_values(found, sequence.position, rows, centre, d_sae=d_sae)
    for side in SIDES:
        for name in tables:
            windows[name][side].merge_ranks()
        around[side] = all_reduce_sum({"around": around[side]})["around"]
    return windows, around


class _Writer:
    """Makes the records of one side."""

    def __init__(
        self, held_out: HeldOut, side: str, examples: int, quantiles: int, tokens: int, pool: Int[Tensor, "n 2"]
    ) -> None:
        self._held_out, self._side = held_out, side
        self._examples, self._quantiles, self._tokens, self._pool = examples, quantiles, tokens, pool
        self._text = TokenText(held_out.tokenizer)

    def record(
        self, latent: int, totals: dict[str, Tensor], top: Windows, sample: Windows, around: Tensor
    ) -> dict[str, Any]:
        """Return one latent's line; `around` is (pool, window), its activations around the random tokens."""
        active = sorted(self._of_table(sample, latent), key=lambda pair: pair[0])
        size = -(-len(active) // self._quantiles)
        groups = [active[start : start + size] for start in range(0, len(active), size)]
        order = torch.randperm(
            len(self._pool), generator=torch.Generator().manual_seed(self._held_out.seed + latent)
        ).tolist()
        some, others = order[: self._examples], order[self._examples :]
        silent = [place for place in others if not around[place].any()][: self._examples]
        count = int(totals["count"][latent])
        return {
            "side": self._side,
            "latent": latent,
            "count": count,
            "density": count / self._tokens,
            "max_activation": rounded([float(totals["max"][latent])])[0],
            "neuron_id": {
                "layer_index": getattr(self._held_out.language_model, "layer", None),
                "neuron_index": latent,
            },
            "most_positive_activation_records": [example for _, example in self._of_table(top, latent)],
            "random_sample_by_quantile": [[example for _, example in group] for group in groups],
            "quantile_boundaries": [rounded([group[0][0]])[0] for group in groups[1:]],
            "random_sample": [self._of_pool(place, around) for place in some],
            "not_active": [self._of_pool(place, around) for place in silent],
        }

    def _of_table(self, windows: Windows, latent: int) -> Iterator[tuple[float, dict[str, Any]]]:
        columns = windows.top.columns
        for place, sequence in enumerate(columns["sequence"][latent].tolist()):
            if sequence >= 0:
                position = int(columns["position"][latent, place])
                activation = float(columns["activation"][latent, place])
                yield activation, self._example(sequence, position, windows.values[latent, place].cpu())

    def _of_pool(self, place: int, around: Tensor) -> dict[str, Any]:
        sequence, position = self._pool[place].tolist()
        return self._example(sequence, position, around[place])

    def _example(self, sequence: int, position: int, values: Tensor) -> dict[str, Any]:
        tokens = self._held_out.tokens
        record = context_record(
            self._text, tokens, self._held_out.document, sequence, position, {"activations": values}
        )
        ids = tokens[sequence, max(0, position - BEFORE) : position + AFTER + 1].tolist()
        return {"tokens": record.pop("tokens"), "token_ids": ids, **record}
