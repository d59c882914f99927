import numpy as np
import pytest
import torch

from data_factories import EOS, NumberTokenizer, tagged_texts, tagged_tokens
from jsae_lightning import token_tables
from jsae_lightning.errors import UserError
from jsae_lightning.packing import Encoder, make_packing
from jsae_lightning.token_sources import Rows, document_digest, is_held_out
from jsae_lightning.token_tables import pack_table, rows_without_shared_documents, tokenize_table

LENGTH = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def table(values, *, holds_tokens=False, indices=None):
    import datasets

    column = "input_ids" if holds_tokens else "text"
    data = datasets.Dataset.from_dict({"id": list(range(len(values))), column: values})
    return Rows(data if indices is None else data.select(indices), "here", column, holds_tokens)


def encoder(bos="never", *, holds_tokens=False, tokenizer=None, vocab_size=10_000):
    tokenizer = tokenizer or NumberTokenizer()
    packing = make_packing(bos, tokenizer, LENGTH, holds_tokens=holds_tokens)
    return Encoder(packing, tokenizer, vocab_size, "here", holds_tokens)


def tags(packed):
    return set(packed.read(torch.arange(len(packed))).flatten().tolist()) - {EOS}


def test_texts_are_split_by_document():
    texts = tagged_texts(60) * 2  # every document twice
    train, val, left_out = pack_table(table(texts), encoder(), val_fraction=0.2)
    held_out = {10 + n for n, text in enumerate(texts[:60]) if is_held_out(document_digest(text), 0.2)}
    assert tags(val) == held_out and 3 < len(held_out) < 30
    assert tags(train) == set(range(10, 70)) - held_out
    assert train.num_tokens + val.num_tokens == sum(len(text.split()) + 1 for text in texts) and left_out == 0


def test_all_rows_are_kept_when_nothing_is_held_out():
    train, val, _ = pack_table(table(tagged_texts(20)), encoder(), val_fraction=None)
    assert tags(train) == set(range(10, 30)) and val is None


def test_the_tokens_are_cached_until_something_changes(own_cache, monkeypatch):
    rows = table(tagged_texts(20))
    first = tokenize_table(rows, encoder(), 0.2)
    calls = []
    original = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, values: calls.append(len(values)) or original(self, values))
    assert tokenize_table(rows, encoder(), 0.2)[:] == first[:] and not calls
    tokenize_table(rows, encoder("document"), 0.2)
    tokenize_table(rows, encoder(), 0.3)
    tokenizer = NumberTokenizer()
    tokenizer.get_vocab = lambda: {"other": 0}
    tokenize_table(rows, encoder(tokenizer=tokenizer), 0.2)
    tokenize_table(table(tagged_texts(20)[::-1]), encoder(), 0.2)
    assert sum(calls) == 4 * 20
    assert len(list((own_cache / "jsae_lightning").glob("*.arrow"))) == 5


def test_a_cache_that_cannot_be_written(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_tables.Path, "mkdir", refuse)
    with pytest.raises(UserError, match="HF_DATASETS_CACHE: '.*' cannot be written"):
        tokenize_table(table(["5"]), encoder(), 0.2)


@pytest.mark.parametrize("indices", [None, list(range(29, -1, -1))], ids=["plain", "selected"])
def test_token_rows_are_cut_if_all_hold_a_sequence(indices):
    rows = table([tagged_tokens(n, LENGTH + n % 11) for n in range(30)], holds_tokens=True, indices=indices)
    train, _, _ = pack_table(rows, encoder(holds_tokens=True), val_fraction=None)
    sequences = train.read(torch.arange(len(train)))
    assert len(sequences) == sum((LENGTH + n % 11) // LENGTH for n in range(30))
    assert (sequences == sequences[:, :1]).all()  # no sequence over a row's end


def test_short_token_rows_are_joined():
    values = [tagged_tokens(n, LENGTH - 1 + n % 11) for n in range(30)]
    train, _, _ = pack_table(
        table([*values, [], None], holds_tokens=True), encoder(holds_tokens=True), val_fraction=None
    )
    joined = np.concatenate(values)
    assert train.read(torch.arange(len(train))).flatten().tolist() == joined[: len(joined) // LENGTH * LENGTH].tolist()


def test_bos_before_each_token_row():
    rows = table([[5] * 9, [6] * 10], holds_tokens=True)
    train, _, _ = pack_table(rows, encoder("document", holds_tokens=True), val_fraction=None)
    assert train.read(torch.arange(len(train))).tolist() == [[1] + [5] * 7, [1] + [6] * 7]


def test_bos_counts_as_a_token_of_the_row():
    cut = table([[5] * 15, [6] * 15], holds_tokens=True)
    train, _, _ = pack_table(cut, encoder("document", holds_tokens=True), val_fraction=None)
    assert train.read(torch.arange(len(train))).tolist() == [[1] + [5] * 7, [5] * 8, [1] + [6] * 7, [6] * 8]
    joined = table([[5] * 3, [], [6] * 3, [7] * 3], holds_tokens=True)
    train, _, _ = pack_table(joined, encoder("document", holds_tokens=True), val_fraction=None)
    assert train.read(torch.arange(len(train))).tolist() == [[1, 5, 5, 5, 1, 6, 6, 6]]


def test_token_rows_are_split_by_content():
    values = [tagged_tokens(n, LENGTH) for n in range(60)] * 2
    train, val, left_out = pack_table(table(values, holds_tokens=True), encoder(holds_tokens=True), val_fraction=0.2)
    assert tags(train) | tags(val) == set(range(10, 70)) and not tags(train) & tags(val) and tags(val)
    assert left_out == 0


@pytest.mark.parametrize("document_length", [3, 7, 20, 60])
def test_pre_packed_rows_share_no_document_with_held_out_ones(document_length):
    num_rows = 400
    tokens = [t for n in range(num_rows * LENGTH) for t in [10 + n] * document_length + [EOS]]
    values = [tokens[start : start + LENGTH] for start in range(0, num_rows * LENGTH, LENGTH)]
    train, val, left_out = pack_table(table(values, holds_tokens=True), encoder(holds_tokens=True), val_fraction=0.02)
    assert len(val) > 0 and not tags(train) & tags(val)
    assert len(train) + len(val) + left_out == num_rows and len(train) > num_rows / 2


def test_vocabulary_is_checked_when_a_row_is_read():
    rows = table([[5] * LENGTH, [99] * LENGTH], holds_tokens=True)
    train, _, _ = pack_table(rows, encoder(holds_tokens=True, vocab_size=50), val_fraction=None)
    train.read(torch.tensor([0]))
    with pytest.raises(UserError, match="token id 99"):
        train.read(torch.tensor([1]))


def test_rows_without_shared_documents():
    def mask(text):
        return np.array([letter == "x" for letter in text])

    has_eos, ends = "..x..x.x.", "........."
    assert (
        rows_without_shared_documents(mask("....x...."), mask(has_eos), mask(ends)).tolist()
        == mask("xx....xxx").tolist()
    )
    # A row that ends with EOS is a clean border on either side.
    assert (
        rows_without_shared_documents(mask("....x...."), mask("...xx...."), mask("...xx....")).tolist()
        == mask("xxxx.xxxx").tolist()
    )
    # Without any EOS each row is a document.
    assert (
        rows_without_shared_documents(mask("....x...."), mask("." * 9), mask("." * 9)).tolist()
        == mask("xxxx.xxxx").tolist()
    )
