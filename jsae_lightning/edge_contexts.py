"""Where edges are strongest: for chosen pairs of latents, the sequences with the largest |J| and their text."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.contexts import AFTER, BEFORE, TokenText, TopContexts, context_record, window_values
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jacobians import jacobian_of_latents
from jsae_lightning.sae import Latents
from jsae_lightning.splicing import MAX_ELEMENTS

WINDOWS = ("activations_output", "activations_input", "jacobian")


class EdgeContexts:
    """The top contexts of some edges: per edge the n sequences with the largest |J|, at the position of it."""

    def __init__(self, edges: Int[Tensor, "edges 2"], n: int, held_out: HeldOut) -> None:
        """Watch `edges`, (output, input) a row."""
        device = held_out.pair.input_sae.W_enc.device
        self.edges = edges.to(device)
        self._held_out = held_out
        self.top = TopContexts(len(edges), n, device, WINDOWS)

    def add(
        self,
        x: Float[Tensor, "tokens d_model"],
        latents_out: Latents,
        latents_in: Latents,
        sequence: int,
        position: Int[Tensor, " tokens"],
        counts: Bool[Tensor, " tokens"],
    ) -> None:
        """Offer one sequence: its MLP inputs, latents and positions; peaks are sought where `counts`."""
        slot_out = slots(latents_out, self.edges[:, 0])
        slot_in = slots(latents_in, self.edges[:, 1])
        both = (slot_out >= 0) & (slot_in >= 0)
        if not (both & counts[:, None]).any():
            return
        held_out = self._held_out
        values = torch.zeros(both.shape, device=x.device)
        # The Jacobian is computed where it is needed only: on few tokens of a sequence, as a rule.
        k = max(held_out.pair.input_sae.k, held_out.pair.output_sae.k)
        for tokens in both.any(dim=1).nonzero()[:, 0].split(max(1, MAX_ELEMENTS // (held_out.mlp.d_mlp * k))):
            some_in, some_out = (Latents(*(part[tokens] for part in side)) for side in (latents_in, latents_out))
            found = jacobian_of_latents(
                held_out.pair, held_out.mlp, x[tokens], some_in, some_out, at=held_out.at
            ).values
            row = torch.arange(len(tokens), device=x.device)[:, None]
            entry = found[row, slot_out[tokens].clamp(min=0), slot_in[tokens].clamp(min=0)]
            values[tokens] = torch.where(both[tokens], entry, 0.0).float()
        score = torch.where(both & counts[:, None], values.abs(), -torch.inf)
        best, at = score.max(dim=0)  # the first of equal ones
        rows = (best > self.top.columns["score"][:, -1]).nonzero()[:, 0]
        if not len(rows):
            return
        at = at[rows]
        centre = position[at]
        padded = torch.zeros(int(position[-1]) + 1 + BEFORE + AFTER, len(rows), device=x.device)
        padded[position + BEFORE] = values[:, rows]
        around = centre[:, None] + torch.arange(BEFORE + 1 + AFTER, device=x.device)
        out_rows, in_rows = self.edges[rows].unbind(dim=1)
        pair = held_out.pair
        new = {
            "score": best[rows],
            "activation": values[at, rows],
            "position": centre,
            "activations_output": window_values(latents_out, position, out_rows, centre, d_sae=pair.output_sae.d_sae),
            "activations_input": window_values(latents_in, position, in_rows, centre, d_sae=pair.input_sae.d_sae),
            "jacobian": padded.gather(0, around.T).T,
        }
        self.top.add(rows, sequence, new)

    def records(self, text: TokenText, figures: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield a record for each edge: its `figures`, and its examples, the largest |J| first."""
        columns = {name: column.cpu() for name, column in self.top.columns.items()}
        tokens, document = self._held_out.tokens, self._held_out.document
        for row, edge in enumerate(figures):
            examples = [
                context_record(
                    text,
                    tokens,
                    document,
                    int(columns["sequence"][row, place]),
                    int(columns["position"][row, place]),
                    {name: columns[name][row, place] for name in WINDOWS},
                )
                for place in (columns["sequence"][row] >= 0).nonzero()[:, 0].tolist()
            ]
            yield edge | {"examples": examples}


def slots(latents: Latents, wanted: Int[Tensor, " edges"]) -> Int[Tensor, "tokens edges"]:
    """Return at which of a token's k places each wanted latent is active, -1 where it is not."""
    unique, column = wanted.unique(return_inverse=True)
    found = torch.searchsorted(unique, latents.indices).clamp(max=len(unique) - 1)
    hit = (unique[found] == latents.indices) & latents.active
    table = latents.indices.new_full((len(latents.indices), len(unique)), -1)
    token, place = hit.nonzero().unbind(dim=1)
    table[token, found[token, place]] = place
    return table[:, column]
