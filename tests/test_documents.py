"""Documents of packed positions: by hand, and against the documents that were packed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jsae_lightning.documents import Separators, document_ids, find_separators
from jsae_lightning.packing import ArrayRows, PackedSequences, Packing

EOS, BOS = 0, 1
TOKENIZER = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS)
ENDS = Separators((EOS,), ())


def ids(rows, separators=ENDS, contiguous=False):
    return document_ids(torch.tensor(rows), separators, contiguous=contiguous).tolist()


def test_an_end_token_belongs_to_the_document_that_it_ends():
    assert ids([[5, 6, EOS, 7, EOS, 8]]) == [[0, 0, 0, 1, 1, 2]]


def test_several_end_tokens_end_one_document():
    assert ids([[5, EOS, EOS, 7]]) == [[0, 0, 0, 1]]


def test_a_sequence_begins_a_document_unless_it_goes_on():
    rows = [[5, 6], [7, EOS], [8, 9]]
    assert ids(rows) == [[0, 0], [1, 1], [2, 2]]
    assert ids(rows, contiguous=True) == [[0, 0], [0, 0], [1, 1]]


def test_end_tokens_at_the_start_go_with_what_follows():
    assert ids([[EOS, EOS, 5], [EOS, 6, 7]]) == [[0, 0, 0], [1, 1, 1]]
    assert ids([[EOS, 4, 5], [EOS, 6, 7]], contiguous=True) == [[0, 0, 0], [0, 1, 1]]
    assert ids([[EOS, EOS], [EOS, EOS]]) == [[0, 0], [1, 1]]


def test_a_begin_token_belongs_to_the_document_that_it_begins():
    assert ids([[5, BOS, 6, EOS, BOS, 7]], Separators((EOS,), (BOS,))) == [[0, 1, 1, 1, 2, 2]]
    assert ids([[BOS, 5, 6, BOS, 7]], Separators((), (BOS,))) == [[0, 0, 0, 1, 1]]


def test_an_added_first_token_separates_nothing():
    added = Separators((EOS,), (), added_first=True)
    assert ids([[EOS, 5, 6], [EOS, 7, EOS], [EOS, 8, 9]], added, contiguous=True) == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_nothing_is_known_without_separators():
    assert ids([[5, 6], [7, 8]], Separators((), ())) == [[0, 0], [1, 1]]
    assert ids([[5, 6], [7, 8]], Separators((), ()), contiguous=True) == [[0, 0], [0, 0]]


@pytest.mark.parametrize("bos", ["never", "document", "sequence"])
@pytest.mark.parametrize("same_token", [False, True])
def test_against_the_documents_that_were_packed(bos, same_token):
    """Each document is full of its own number, so that the tokens say where they come from."""
    bos_id = EOS if same_token else BOS
    packing = Packing(8, bos, None if bos == "never" else bos_id, EOS)
    lengths = [3, 11, 1, 6, 6, 20, 2, 5]
    documents = [packing.wrap(np.full(n, 10 + i, np.int32)) for i, n in enumerate(lengths)]
    packed = PackedSequences(ArrayRows(documents), packing)
    tokens = packed.read(torch.arange(len(packed)))
    separators = find_separators(packing, SimpleNamespace(bos_token_id=bos_id, eos_token_id=EOS), holds_tokens=False)
    found = document_ids(tokens, separators, contiguous=True)
    is_text = tokens >= 10
    assert torch.equal(found[is_text], tokens[is_text] - 10)
    true = torch.tensor(np.concatenate([np.full(len(d), i) for i, d in enumerate(documents)]))
    added = bos == "sequence"
    assert torch.equal(found[:, added:].flatten(), true[: found[:, added:].numel()])
    spaced = document_ids(tokens[::2], separators, contiguous=False)
    assert (spaced.flatten().diff() >= 0).all()
    assert spaced.unique().tolist() == list(range(int(spaced.max()) + 1))


def test_pre_tokenised_rows_have_the_tokenizers_separators():
    packing = Packing(8, "never", None, None)
    assert find_separators(packing, TOKENIZER, holds_tokens=True) == Separators((EOS,), (BOS,))
    assert find_separators(packing, None, holds_tokens=True) == Separators((), ())
    same = SimpleNamespace(bos_token_id=EOS, eos_token_id=EOS)
    assert find_separators(packing, same, holds_tokens=True) == ENDS
