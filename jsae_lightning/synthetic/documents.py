"""Documents of tokens sampled from a synthetic language model, as a source that can be read again and again."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from jsae_lightning.seeding import seeded_generator
from jsae_lightning.synthetic.language_model import SyntheticLanguageModel

DOCUMENTS_AT_ONCE = 256


class SyntheticDocuments:
    """`num_documents` documents of `document_length` tokens each, sampled when they are iterated over.

    Document i is a function of the model's parameters, the split's name and i, however many are read.
    """

    def __init__(self, values: Mapping[str, Any], split: str) -> None:
        """Sample from the model that the keys of `model.synthetic` describe; `split` is `train` or `val`."""
        self._values, self._split = values, split

    @cached_property
    def _model(self) -> SyntheticLanguageModel:
        return SyntheticLanguageModel(self._values)

    def __len__(self) -> int:
        return self._model.spec.num_documents

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self), DOCUMENTS_AT_ONCE):
            yield from self._sample(start)[: len(self) - start].tolist()

    def first(self, num: int) -> Int64[Tensor, "documents document_length"]:
        """Return the first `num` documents, or all if there are fewer."""
        num = min(num, len(self))
        parts = [self._sample(start) for start in range(0, num, DOCUMENTS_AT_ONCE)]
        return torch.cat(parts)[:num]

    def _sample(self, start: int) -> Int64[Tensor, "documents document_length"]:
        """Sample the documents from `start` on: first token uniform, every other from the model's softmax."""
        spec = self._model.spec
        generator = seeded_generator("synthetic documents", spec.seed, self._split, start)
        drawn = torch.rand(DOCUMENTS_AT_ONCE, spec.document_length, generator=generator, dtype=torch.float64)
        window = torch.full((DOCUMENTS_AT_ONCE, spec.active_groups), spec.vocab_size)
        tokens = []
        for position in range(spec.document_length):
            if position == 0:
                cumulative = torch.arange(1, spec.vocab_size + 1, dtype=torch.float64).expand(len(window), -1)
            else:
                cumulative = self._model.next_logits(window).double().softmax(dim=-1).cumsum(dim=-1)
            target = drawn[:, position, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative.contiguous(), target, right=True).clamp_max(spec.vocab_size - 1)
            tokens.append(token)
            window = torch.cat([token, window[:, :-1]], dim=1)
        return torch.cat(tokens, dim=1)
