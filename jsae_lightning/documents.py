"""Which document each position of packed sequences comes from.

Sequences are documents joined and cut (see `packing`). Nothing but tokens is left of where one ends, so boundaries are
read off the tokens:

    an end token (the tokenizer's EOS, which packing puts behind every document) belongs to the document that it ends;
    several in a row end one document
    a begin token (BOS, where it stands before every document) belongs to the document that it begins

A sequence that does not go on where the one before it stopped begins a document, though it may be a later part of one
that was seen before. That happens wherever held-out sequences are spaced out over the data. Then parts of one document
count as several; in the contiguous groups of `jackknife.document_groups` they are neighbours all the same. A text that
contains the separator itself is taken for two documents. Rows of pre-tokenised data are never taken to go on from one
sequence to the next; without separators, each of their sequences is a document.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from jsae_lightning.packing import Packing


@dataclass(frozen=True)
class Separators:
    """The token ids that end and that begin a document, and whether position 0 is a BOS that packing has added."""

    ends: tuple[int, ...]
    begins: tuple[int, ...]
    added_first: bool = False


def find_separators(packing: Packing, tokenizer: Any, *, holds_tokens: bool) -> Separators:
    """Return what stands between documents under these packing rules.

    Pre-tokenised rows (`holds_tokens`) are taken to have the tokenizer's EOS behind or its BOS before each document;
    `tokenizer` is None where there is none, and then nothing is known to separate them.
    """
    added_first = packing.bos == "sequence"
    bos_id, eos_id = packing.bos_id, packing.eos_id
    if holds_tokens:
        bos_id, eos_id = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    if packing.bos == "document" and bos_id == eos_id:  # in place of the EOS: see Packing.wrap
        return Separators((), _ids(bos_id))
    begins = bos_id != eos_id and (packing.bos == "document" or holds_tokens)
    return Separators(_ids(eos_id), _ids(bos_id) if begins else (), added_first)


def document_ids(
    tokens: Int64[Tensor, "sequences seq"], separators: Separators, *, contiguous: bool
) -> Int64[Tensor, "sequences seq"]:
    """Return the document of each position: 0, 1, 2, ... in reading order, without gaps.

    Args:
        tokens: token ids of packed sequences.
        separators: what ends and begins a document.
        contiguous: whether each sequence goes on where the one before it stopped; otherwise each begins a document.
    """
    if separators.added_first:  # no token of the data: it goes with what follows
        rest = document_ids(tokens[:, 1:], Separators(separators.ends, separators.begins), contiguous=contiguous)
        return torch.cat([rest[:, :1], rest], dim=1)
    is_end, is_begin = _is_one_of(tokens, separators.ends), _is_one_of(tokens, separators.begins)
    starts = (~is_end & _before(is_end)) | (is_begin & ~_before(is_begin))
    # End tokens at the very start end a document of which nothing else is there: they go with what follows.
    leading = is_end.long().cumprod(dim=1).sum(dim=1)
    first_rows = [0] if contiguous else range(len(tokens))
    for row in first_rows:
        if leading[row] < tokens.shape[1]:
            starts[row, leading[row]] = False
        starts[row, 0] = row > 0
    return starts.flatten().long().cumsum(0).view_as(tokens)


def _ids(token_id: int | None) -> tuple[int, ...]:
    return () if token_id is None else (token_id,)


def _is_one_of(tokens: Int[Tensor, "sequences seq"], ids: tuple[int, ...]) -> Bool[Tensor, "sequences seq"]:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))


def _before(mask: Bool[Tensor, "sequences seq"]) -> Bool[Tensor, "sequences seq"]:
    """Each position's predecessor in reading order, over the ends of sequences; False for the first."""
    flat = mask.flatten()
    return torch.cat([torch.zeros_like(flat[:1]), flat[:-1]]).view_as(mask)
