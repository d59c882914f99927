import numpy as np
import pytest
import torch

from data_factories import BOS, EOS, NumberTokenizer, tagged_texts
from jsae_lightning.errors import UserError
from jsae_lightning.packing import (
    ArrayRows,
    Encoder,
    PackedSequences,
    Packing,
    PositionMask,
    adds_bos,
    check_vocabulary,
    encode_until,
    make_packing,
    make_position_mask,
    tokenize,
)
from tiny_models import END_OF_TEXT, make_tokenizer


def encoder(bos="never", *, holds_tokens=False, cut=False, context_length=4, tokenizer=None, vocab_size=1000):
    tokenizer = tokenizer or NumberTokenizer()
    packing = make_packing(bos, tokenizer, context_length, holds_tokens=holds_tokens)
    return Encoder(packing, tokenizer, vocab_size, "here", holds_tokens, cut)


def pack(encoder, values):
    packed = PackedSequences(ArrayRows(encoder.encode(values)), encoder.packing)
    return packed.read(torch.arange(len(packed))).tolist()


# Rules


@pytest.mark.parametrize(
    ("bos", "expected"),
    [
        ("never", [[5, 5, 5, EOS], [6, 6, EOS, 7]]),
        ("document", [[BOS, 5, 5, 5], [EOS, BOS, 6, 6], [EOS, BOS, 7, 7]]),
        ("sequence", [[BOS, 5, 5, 5], [BOS, EOS, 6, 6], [BOS, EOS, 7, 7]]),
    ],
)
def test_documents_are_joined_by_eos_and_cut(bos, expected):
    assert pack(encoder(bos), ["5 5 5", "6 6", "7 7"]) == expected


def test_without_an_eos_token_documents_are_joined_as_they_are():
    assert pack(encoder(tokenizer=NumberTokenizer(eos=None)), ["5 5 5", "6 6"]) == [[5, 5, 5, 6]]


def test_one_token_that_is_bos_and_eos_separates_documents_once():
    assert pack(encoder("document", tokenizer=NumberTokenizer(bos=9, eos=9)), ["5 5", "6 6 6 6"]) == [
        [9, 5, 5, 9],
        [6, 6, 6, 6],
    ]


def test_empty_documents_add_nothing():
    assert pack(encoder("document"), ["", "5 5", ""]) == [[BOS, 5, 5, EOS]]


@pytest.mark.parametrize(
    ("tokenizer_adds_bos", "holds_tokens", "expected"),
    [(True, False, "sequence"), (False, False, "never"), (True, True, "never"), (False, True, "never")],
)
def test_auto_follows_the_tokenizer_and_never_touches_tokens(tokenizer_adds_bos, holds_tokens, expected):
    tokenizer = NumberTokenizer(adds_bos=tokenizer_adds_bos)
    assert make_packing("auto", tokenizer, 4, holds_tokens=holds_tokens).bos == expected


def test_auto_leaves_tokens_alone():
    rows = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]]
    joined = encoder("auto", holds_tokens=True, tokenizer=NumberTokenizer(adds_bos=True))
    assert pack(joined, rows) == [[5, 6, 7, 8], [9, 10, 11, 12]]  # no BOS, no EOS between rows
    cut = encoder("auto", holds_tokens=True, cut=True)
    assert pack(cut, rows) == [[5, 6, 7, 8], [10, 11, 12, 13]]


@pytest.mark.parametrize(
    ("bos", "expected"), [("document", [[1, 5, 6, 7], [1, 5, 6, 7]]), ("sequence", [[1, 5, 6, 7], [1, 5, 6, 7]])]
)
def test_asked_for_bos_is_added_to_tokens(bos, expected):
    assert pack(encoder(bos, holds_tokens=True, cut=True), [[5, 6, 7, 8], [5, 6, 7, 9]]) == expected


@pytest.mark.parametrize("bos", ["document", "sequence"])
def test_bos_without_a_bos_token(bos):
    with pytest.raises(UserError, match=f"data.bos: {bos}, but the model's tokenizer has no BOS token"):
        make_packing(bos, NumberTokenizer(bos=None), 4, holds_tokens=False)


def test_context_of_one_token():
    with pytest.raises(UserError, match="data.context_length: 1"):
        make_packing("never", NumberTokenizer(), 1, holds_tokens=False)


# Tokenizers


@pytest.fixture(scope="module")
def fast_tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_fast_and_ordinary_path_agree_and_nothing_is_truncated(fast_tokenizer):
    texts = ["the cat sat " * 500, "", "def f(x):\n    return x", f"a {END_OF_TEXT} b"]
    expected = [fast_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    fast_tokenizer.backend_tokenizer.enable_truncation(8)  # some tokenizer.json files come with these
    fast_tokenizer.backend_tokenizer.enable_padding(length=8)
    assert [ids.tolist() for ids in tokenize(fast_tokenizer, texts)] == expected
    assert len(expected[0]) > 500


def test_adds_bos_of_a_fast_tokenizer(fast_tokenizer):
    from tokenizers.processors import TemplateProcessing

    assert not adds_bos(fast_tokenizer)
    fast_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, fast_tokenizer.bos_token_id)]
    )
    assert adds_bos(fast_tokenizer)
    assert fast_tokenizer.bos_token_id not in tokenize(fast_tokenizer, ["the cat"])[0]


@pytest.mark.parametrize("ids", [[3, 10], [-1, 3], [3, 2**40]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(
        UserError, match=f"token id {[i for i in ids if i != 3][0]}.*ends at 9.*does not match the model"
    ):
        check_vocabulary(np.array(ids), 10, "here")
    with pytest.raises(UserError, match="data.token_column"):
        encoder(holds_tokens=True, vocab_size=10).encode([[1], ids])


def test_the_whole_vocabulary_is_allowed():
    check_vocabulary(np.array([0, 9]), 10, "here")


def test_tokenizer_with_more_ids_than_the_model():
    with pytest.raises(UserError, match="model: its tokenizer gives token id 500"):
        encoder(vocab_size=10).encode(["5 500"])


# Packed sequences


class SeparateRows:
    """Rows with random access, each on its own."""

    def __init__(self, arrays):
        self.arrays = [np.array(array, np.int32) for array in arrays]
        self.lengths = np.array([len(array) for array in arrays])

    def row(self, index):
        return self.arrays[index]


def test_random_access_equals_the_join():
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 100, size=generator.integers(0, 13)) for _ in range(60)]
    joined = np.concatenate(arrays)
    for chunk in (2, 5, 32):
        packed = PackedSequences(SeparateRows(arrays), Packing(chunk, "never", None, None))
        assert len(packed) == len(joined) // chunk
        order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))
        expected = joined[: len(packed) * chunk].reshape(-1, chunk)[order.numpy()]
        assert packed.read(order).tolist() == expected.tolist()
        assert PackedSequences(ArrayRows(arrays), packed._packing).read(order).equal(packed.read(order))


def test_spread_is_even_and_never_more_than_there_is():
    packed = PackedSequences(ArrayRows([np.arange(40, dtype=np.int32)]), Packing(4, "never", None, None))
    assert packed.spread(5)[:, 0].tolist() == [0, 8, 16, 24, 32]
    assert len(packed.spread(100)) == 10
    assert packed.spread(3).dtype == torch.int64
    empty = PackedSequences(ArrayRows([]), Packing(4, "never", None, None))
    assert len(empty) == 0 and empty.spread(3).shape == (0, 4)


def test_fingerprint_tells_data_and_packing_apart():
    arrays = [np.arange(40, dtype=np.int32)]
    packing = Packing(4, "never", None, None)
    same = PackedSequences(ArrayRows(arrays), packing).fingerprint()
    assert PackedSequences(ArrayRows([arrays[0][:17], arrays[0][17:]]), packing).fingerprint() == same
    changed = [
        PackedSequences(ArrayRows([arrays[0] + 1]), packing),
        PackedSequences(ArrayRows([arrays[0][:39]]), packing),
    ]
    changed.append(PackedSequences(ArrayRows(arrays), Packing(8, "never", None, None)))
    changed.append(PackedSequences(ArrayRows(arrays), Packing(5, "sequence", 1, None)))
    assert same not in {packed.fingerprint() for packed in changed}


def test_encode_until_stops_when_it_has_enough():
    documents = tagged_texts(200)
    arrays, is_all = encode_until(encoder(), documents, 1000)
    assert 1000 <= sum(map(len, arrays)) < 4000 and not is_all
    everything, is_all = encode_until(encoder(), documents, 10**9)
    assert len(everything) == 200 and is_all


# Positions


def test_included_positions():
    tokens = torch.tensor([[1, 5, 0, 6], [7, 1, 8, 9]])
    everything = make_position_mask(NumberTokenizer(), exclude_first=False, exclude_special=False)
    assert everything(tokens).all()
    first = make_position_mask(None, exclude_first=True, exclude_special=False)
    assert first(tokens).tolist() == [[False, True, True, True]] * 2
    special = make_position_mask(NumberTokenizer(), exclude_first=False, exclude_special=True)
    assert special(tokens).tolist() == [[False, True, False, True], [True, False, True, True]]
    assert PositionMask(True, (0, 1))(tokens).tolist() == [[False, True, False, True], [False, False, True, True]]


def test_special_tokens_need_a_tokenizer():
    with pytest.raises(UserError, match="data.exclude_special_tokens"):
        make_position_mask(None, exclude_first=False, exclude_special=True)
