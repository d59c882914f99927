"""Where latents and edges are strongest: their top contexts in bounded memory, and the text around them.

A latent's contexts are the n sequences with the highest peaks of its activation, each represented by its first peak: so
a long text cannot fill the list. Of equal peaks the earlier sequence wins. A first pass keeps a (d_sae, n) table; a
second one, over the chosen sequences, reads the activations of the window around each peak.

At `reconstruction` the output latents are those of f(x_hat), as everywhere in the Jacobian at that setting.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.distributed import all_reduce_sum, rank_and_world_size
from jsae_lightning.sae import Latents

BEFORE, AFTER = 24, 8
"""Tokens of a window before and after its peak, as far as the sequence reaches."""
WINDOW = BEFORE + 1 + AFTER


class TopContexts:
    """For each of `rows` latents (or edges) the `n` best contexts so far, in `columns` of shape (rows, n), best first.

    `score` (-inf where the place is empty), `activation`, `sequence` (-1), `position`, and for each name in `windows` a
    column of shape (rows, n, WINDOW).
    """

    def __init__(self, rows: int, n: int, device: torch.device, windows: Sequence[str] = ()) -> None:
        self.n = n
        self.columns: dict[str, Tensor] = {
            "score": torch.full((rows, n), -torch.inf, device=device),
            "activation": torch.zeros(rows, n, device=device),
            "sequence": torch.full((rows, n), -1, dtype=torch.int64, device=device),
            "position": torch.zeros(rows, n, dtype=torch.int64, device=device),
        } | {name: torch.zeros(rows, n, WINDOW, device=device) for name in windows}

    def add(self, rows: Int[Tensor, " m"], sequence: int, new: dict[str, Tensor]) -> None:
        """Offer one sequence's contexts of `rows`, each at most once: all columns but `sequence`, each of m entries.

        A score of -inf is never taken.
        """
        better = new["score"] > self.columns["score"][rows, -1]
        rows = rows[better]
        if not len(rows):
            return
        new = {name: column[better] for name, column in new.items()} | {"sequence": torch.full_like(rows, sequence)}
        both = {name: torch.cat([column[rows], new[name][:, None]], 1) for name, column in self.columns.items()}
        for name, column in _best(both, self.n).items():
            self.columns[name][rows] = column

    def add_latents(
        self,
        latents: Latents,
        sequence: int,
        position: Int[Tensor, " tokens"],
        score: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        """Offer one sequence's latents, at the `position` of its tokens.

        `score(rows, sequence)` is what they are ranked by; None: their peak activation.
        """
        rows, activation, where = peaks(latents, position, len(self.columns["score"]))
        ranked_by = activation if score is None else score(rows, sequence)
        self.add(rows, sequence, {"score": ranked_by, "activation": activation, "position": where})

    def merge_ranks(self) -> None:
        """Make the tables those of all ranks, whose sequences are disjoint; call it on every rank."""
        rank, world_size = rank_and_world_size()
        if world_size == 1:
            return
        gathered = {}
        for name, mine in self.columns.items():
            places = mine.new_zeros(world_size, *mine.shape)
            places[rank] = mine  # -inf + 0 is -inf: adding zeros gathers
            gathered[name] = all_reduce_sum({name: places})[name].transpose(0, 1).flatten(1, 2)
        self.columns = _best(gathered, self.n)


def _best(columns: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Return the first n entries of each row by falling score, equal ones by rising sequence."""
    by_sequence = columns["sequence"].argsort(dim=1, stable=True)
    by_score = columns["score"].gather(1, by_sequence).argsort(dim=1, stable=True, descending=True)
    order = by_sequence.gather(1, by_score)[:, :n]
    return {
        name: torch.take_along_dim(column, order.view(*order.shape, *[1] * (column.ndim - 2)), dim=1)
        for name, column in columns.items()
    }


def peaks(
    latents: Latents, position: Int[Tensor, " tokens"], d_sae: int
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Return the latents that are active on any of the tokens, their largest activation and its first position."""
    active = latents.active
    indices, values = latents.indices[active], latents.values[active].float()
    positions = position[:, None].expand_as(active)[active]
    highest = values.new_zeros(d_sae).scatter_reduce_(0, indices, values, reduce="amax")
    at_peak = values == highest[indices]
    first = torch.full_like(highest, torch.iinfo(torch.int64).max, dtype=torch.int64)
    first.scatter_reduce_(0, indices[at_peak], positions[at_peak], reduce="amin")
    rows = highest.nonzero()[:, 0]
    return rows, highest[rows], first[rows]


class Windows:
    """The activations around the contexts of a table, 0 beyond the sequence and at positions that do not count."""

    def __init__(self, top: TopContexts) -> None:
        self.top = top
        chosen = top.columns["sequence"]
        self.values = torch.zeros(*chosen.shape, WINDOW, device=chosen.device)
        places = (chosen >= 0).nonzero()
        sequences = chosen[places[:, 0], places[:, 1]]
        order = sequences.argsort(stable=True)
        self._places, self._sequences = places[order], sequences[order].contiguous()

    def sequences(self) -> set[int]:
        """The sequences that must be read."""
        return set(self._sequences.unique().tolist())

    def read(self, latents: Latents, sequence: int, position: Int[Tensor, " tokens"]) -> None:
        """Fill in what one sequence shows, from the latents at the `position` of its tokens."""
        ends = self._sequences.new_tensor([sequence, sequence + 1])
        start, stop = torch.searchsorted(self._sequences, ends).tolist()
        places = self._places[start:stop]
        centre = self.top.columns["position"][places[:, 0], places[:, 1]]
        found = window_values(latents, position, places[:, 0], centre, d_sae=len(self.values))
        self.values[places[:, 0], places[:, 1]] = found

    def merge_ranks(self) -> None:
        """Make the windows those of all ranks, each of which read its own sequences."""
        self.values = all_reduce_sum({"values": self.values})["values"]


def window_values(
    latents: Latents,
    position: Int[Tensor, " tokens"],
    rows: Int[Tensor, " m"],
    centre: Int[Tensor, " m"],
    *,
    d_sae: int,
) -> Float[Tensor, "m window"]:
    """Return latent `rows[m]`'s activations in the window around `centre[m]` of one sequence, 0 where it is not known.

    Looks (position, latent) up among the sequence's active entries: nothing of the size seq x d_sae is made.
    """
    offsets = torch.arange(-BEFORE, AFTER + 1, device=rows.device)
    if not latents.indices.numel() or not len(rows):
        return torch.zeros(len(rows), WINDOW, device=rows.device)
    key, order = (position[:, None] * d_sae + latents.indices).flatten().sort()
    values = latents.values.flatten()[order].float()
    wanted = (centre[:, None] + offsets) * d_sae + rows[:, None]  # beyond the sequence no key is equal
    found = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
    return torch.where(key[found] == wanted, values[found], 0.0)


def window_slice(position: int, seq: int) -> slice:
    """Return the part of a window's WINDOW places that lies within a sequence of length `seq`."""
    return slice(max(0, BEFORE - position), min(WINDOW, BEFORE + seq - position))


class TokenText:
    """Text of single tokens, such that the pieces of a sequence read as its text when they are joined.

    Half a character (byte-level vocabularies) comes out as the replacement character; the space that SentencePiece
    vocabularies mark at the start of a word is kept, which decoding a token alone would lose. Without a tokenizer a
    token is its id in angle brackets.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return one string for each id."""
        for token in ids:
            if token not in self._known:
                self._known[token] = self._text(token)
        return [self._known[token] for token in ids]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"<{token}>"
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
            text = " " + text
        return text


def context_record(
    text: TokenText,
    tokens: Int[Tensor, "sequences seq"],
    document: Int[Tensor, "sequences seq"],
    sequence: int,
    position: int,
    values: dict[str, Float[Tensor, " window"]],
) -> dict[str, Any]:
    """Return one example as JSON: `tokens`, the `values` of its window by name, `peak` (the index of the position in
    the window), `sequence`, `position`, `document`. Figures are rounded to 5 digits.
    """  # noqa: D205
    seq = tokens.shape[1]
    part = window_slice(position, seq)
    first = position - BEFORE + part.start
    return {
        "tokens": text(tokens[sequence, first : position + AFTER + 1].tolist()),
        **{name: rounded(value[part].tolist()) for name, value in values.items()},
        "peak": position - first,
        "sequence": sequence,
        "position": position,
        "document": int(document[sequence, position]),
    }


def rounded(values: list[float]) -> list[float]:
    """Return figures with 5 digits, which halves the files."""
    return [float(f"{value:.5g}") for value in values]
