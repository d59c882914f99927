import copy
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_factories import EOS, NumberTokenizer, data_settings, tagged_texts
from jsae_lightning.config_schema import DataConfig
from jsae_lightning.errors import UserError
from jsae_lightning.packing import ArrayRows, Encoder, PackedSequences, Packing, make_packing
from jsae_lightning.persistence import Patience
from jsae_lightning.seeding import seeded_generator
from jsae_lightning.sequence_sources import (
    MAX_ROWS_OF_A_DOCUMENT,
    EndOfStreamError,
    PackedStream,
    ShuffledSequences,
    first_sequences,
    probe_stream,
    rows_to_skip,
)
from jsae_lightning.stream_errors import is_damaged_data
from jsae_lightning.stream_reader import StreamReader, shards_digest
from jsae_lightning.token_sources import Rows, document_digest, open_source

LENGTH = 8


def shuffled(num=50, seed=0):
    tokens = np.repeat(np.arange(num, dtype=np.int32), LENGTH)
    return ShuffledSequences(PackedSequences(ArrayRows([tokens]), Packing(LENGTH, "never", None, None)), seed)


def stream_rows(values, *, holds_tokens=False):
    import datasets

    column = "tokens" if holds_tokens else "text"
    data = datasets.Dataset.from_dict({column: values}).to_iterable_dataset(num_shards=min(3, len(values)))
    return Rows(data, "here", column, holds_tokens, tuple(row[column] for row in data.take(64)))


def encoder(bos="never", *, holds_tokens=False, cut=False):
    tokenizer = NumberTokenizer()
    packing = make_packing(bos, tokenizer, LENGTH, holds_tokens=holds_tokens)
    return Encoder(packing, tokenizer, 10_000, "here", holds_tokens, cut)


def stream(rows=None, *, bos="never", skip_rows=0, skip=(), repeat=False, cut=False):
    rows = rows or stream_rows(tagged_texts(100))
    digests = frozenset(map(document_digest, skip))
    own = encoder(bos, holds_tokens=rows.holds_tokens, cut=cut)
    return PackedStream(rows, own, skip_rows=skip_rows, skip_digests=digests, repeat=repeat)


# Ranks


@pytest.mark.parametrize("make", [shuffled, stream], ids=["shuffled", "stream"])
def test_ranks_share_the_sequences_without_overlap_or_loss(make):
    alone = make().read(0, 48, 0, 1)
    for world_size in (2, 3):
        sources = [make() for _ in range(world_size)]
        for start in range(0, 48, 6):
            parts = [source.read(start, 6 // world_size, rank, world_size) for rank, source in enumerate(sources)]
            assert torch.stack(parts, dim=1).flatten(0, 1).equal(alone[start : start + 6])


# Shuffled sequences


def test_an_epoch_is_a_permutation_and_the_next_another():
    source = shuffled(num=50)
    epochs = source.read(0, 150, 0, 1)[:, 0].view(3, 50)
    assert all(epoch.sort().values.equal(torch.arange(50)) for epoch in epochs)
    assert not epochs[0].equal(epochs[1]) and not epochs[0].equal(torch.arange(50))
    assert source.read(40, 20, 0, 1)[:, 0].equal(
        epochs.flatten()[40:60]
    )  # across an epoch's end, in any order of calls


def test_the_order_follows_the_seed():
    assert shuffled(seed=1).read(0, 50, 0, 1).equal(shuffled(seed=1).read(0, 50, 0, 1))
    assert not shuffled(seed=1).read(0, 50, 0, 1).equal(shuffled(seed=2).read(0, 50, 0, 1))


def test_seeded_generators_are_unrelated():
    draws = {
        tuple(torch.randint(1000, (4,), generator=seeded_generator(s, n)).tolist()) for s in "ab" for n in range(50)
    }
    assert len(draws) == 100
    assert seeded_generator("a", 1).initial_seed() == seeded_generator("a", 1).initial_seed()


# Streams


def test_a_stream_packs_as_a_table_does():
    texts = tagged_texts(100)
    expected = PackedSequences(ArrayRows(encoder("sequence").encode(texts)), encoder("sequence").packing)
    got = stream(bos="sequence").read(0, len(expected), 0, 1)
    assert got.equal(expected.read(torch.arange(len(expected))))


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("position", [0, 1, 13, 64, 400, 520, 1000])
def test_a_stream_goes_on_where_it_was_saved(position):
    original = stream(repeat=True)  # 100 documents: about 530 sequences an epoch
    original.read(0, position, 0, 1)
    state = through_a_file(original.state_dict())
    resumed = stream(repeat=True)
    resumed.load_state_dict(state)
    for start in range(position, position + 60, 20):
        assert resumed.read(start, 20, 0, 1).equal(original.read(start, 20, 0, 1))


def _file_stream(folder):
    """A stream of all JSON lines files of a folder, as `data.streaming=true` opens them."""
    import datasets

    files = [str(file) for file in sorted(folder.iterdir())]
    data = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    return stream(Rows(data, f"'{folder}'", "text", False, tuple(row["text"] for row in data.take(8))), repeat=True)


@pytest.mark.parametrize(
    "change", ["nothing", "moved", "removed", "added in front", "added behind", "renamed", "shortened", "from before"]
)
def test_a_stream_goes_on_with_the_same_files_only(tmp_path, change):
    """Else the position would be in another file, and the run go on with other data unnoticed."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text}) for text in tagged_texts(100)[number::4]]
        (folder / f"s{number}.jsonl").write_text("\n".join(lines) + "\n")
    original = _file_stream(folder)
    original.read(0, 300, 0, 1)
    state, following = through_a_file(original.state_dict()), original.read(300, 200, 0, 1)
    if change == "moved":
        folder = folder.rename(tmp_path / "elsewhere")
    elif change == "removed":
        (folder / "s3.jsonl").unlink()
    elif change == "added in front":
        shutil.copy(folder / "s0.jsonl", folder / "a0.jsonl")
    elif change == "added behind":
        shutil.copy(folder / "s0.jsonl", folder / "t0.jsonl")
    elif change == "renamed":
        (folder / "s2.jsonl").rename(folder / "s22.jsonl")
    elif change == "shortened":
        text = (folder / "s3.jsonl").read_text().splitlines(keepends=True)
        (folder / "s3.jsonl").write_text("".join(text[:-1]))
    elif change == "from before":
        del state["shards"]  # as versions wrote it that did not look
    resumed = _file_stream(folder)
    if change in ("nothing", "moved", "from before"):
        resumed.load_state_dict(state)
        assert resumed.read(300, 200, 0, 1).equal(following)
        return
    with pytest.raises(UserError, match=r"data: the files of .* are not those of the checkpoint \(4 then, [345] now"):
        resumed.load_state_dict(state)


def test_a_checkpoint_that_tells_of_no_files_is_taken():
    """Some versions of `datasets` do not tell which they read."""
    original = stream(repeat=True)
    assert original.state_dict()["shards"][0] == 0
    state = original.state_dict() | {"shards": [2, "of another version"]}
    stream(repeat=True).load_state_dict(state)


def test_a_hubs_revision_is_no_other_file():
    """A commit to the data set's card moves the address, not the rows."""
    first, second, other = (
        [f"hf://datasets/team/data@{revision * 40}/{name}/{part}.parquet" for part in (0, 1)]
        for revision, name in (("a", "train"), ("b", "train"), ("a", "test"))
    )

    def digest(names):
        return shards_digest(SimpleNamespace(_ex_iterable=SimpleNamespace(kwargs={"files": names})))

    assert digest(first) == digest(second) and digest(first)[0] == 2
    assert digest(first) != digest(first[::-1]) and digest(first) != digest(first[:1])
    assert digest([*first, *other]) != digest([*first, *first])
    assert digest(["/here/a.jsonl", "hf://datasets/team/b.jsonl"])[0] == 2
    assert digest([])[0] == 0 and shards_digest(object())[0] == 0


def test_a_file_of_another_kind_is_not_called_damaged_alone(tmp_path):
    """It may be data.source that is wrong."""
    (tmp_path / "x.jsonl").write_bytes(b"PAR1 of another kind" * 9)
    config = DataConfig(**data_settings(source="jsonl", path=str(tmp_path / "x.jsonl"), streaming=True))
    with pytest.raises(UserError, match=r"x.jsonl.*cannot be read .*correct data.source"):
        open_source(config)


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (pa.ArrowInvalid("JSON parse error"), True), (json.JSONDecodeError("x", "y", 0), True),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "y"), True), (pa.ArrowMemoryError("x"), False),
        (pa.ArrowCancelled("x"), False), (KeyError("text"), False), (ValueError("x"), False),
    ],
)  # fmt: skip
def test_what_counts_as_damage(error, is_damage):
    assert is_damaged_data(error) is is_damage


def test_damaged_lines_name_their_file(tmp_path):
    import datasets

    for number in range(3):
        (tmp_path / f"s{number}.jsonl").write_text('{"text": "a"}\n' * 5000)
    with (tmp_path / "s1.jsonl").open("a") as file:
        file.write('{"text": "broken')
    files = [str(file) for file in sorted(tmp_path.iterdir())]
    data = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    reader = StreamReader(data, Patience(), "here")
    with pytest.raises(UserError, match=r"s1.jsonl: cannot be read \(.*\): correct or remove what is damaged"):
        while reader.read(32):
            pass


def test_a_state_is_not_changed_by_reading_on():
    original = stream()
    original.read(0, 10, 0, 1)
    state = original.state_dict()
    before = copy.deepcopy(state)
    following = original.read(10, 50, 0, 1)
    assert (
        state["pending"].equal(before.pop("pending")) and {k: v for k, v in state.items() if k != "pending"} == before
    )
    for _ in range(2):
        original.load_state_dict(state)
        assert original.read(10, 50, 0, 1).equal(following)


def test_two_streams_of_the_same_rows_do_not_disturb_each_other():
    rows = stream_rows(tagged_texts(100))
    first, second = stream(rows), stream(rows)
    expected = stream().read(0, 40, 0, 1)
    got = [source.read(start, 10, 0, 1) for start in range(0, 40, 10) for source in (first, second)]
    assert torch.cat(got[::2]).equal(expected) and torch.cat(got[1::2]).equal(expected)


def test_a_stream_that_ends_says_so():
    with pytest.raises(
        EndOfStreamError,
        match=r"here ends after 5\d\d sequences .* whole blocks of 10,000, .* ckpt_path=auto data.repeat=true",
    ):
        stream().read(0, 10_000, 0, 1)


def test_a_stream_that_repeats_starts_again():
    source = stream(repeat=True)
    epoch = len(probe_stream(stream(), 10_000))
    first = source.read(0, epoch, 0, 1)
    assert source.read(epoch, epoch, 0, 1).equal(first)


def test_a_stream_cannot_jump():
    with pytest.raises(ValueError, match="stands at sequence 0"):
        stream().read(5, 1, 0, 1)


def test_vocabulary_is_checked_while_reading():
    rows = stream_rows([[5] * LENGTH] * 200 + [[10_000] * LENGTH], holds_tokens=True)
    source = stream(rows)
    source.read(0, 100, 0, 1)
    with pytest.raises(UserError, match="token id 10000"):
        source.read(100, 100, 0, 1)


def test_rows_are_cut():
    rows = stream_rows([[5] * 9, [6] * 17], holds_tokens=True)
    assert probe_stream(stream(rows, cut=True), 10)[:, [0, -1]].tolist() == [[5, 5], [6, 6], [6, 6]]
    assert probe_stream(stream(rows), 10)[:, [0, -1]].tolist() == [[5, 5], [5, 6], [6, 6]]


def test_the_fingerprint_tells_streams_apart():
    same = stream().fingerprint
    assert stream().fingerprint == same
    others = [stream(bos="sequence"), stream(skip_rows=1), stream(stream_rows(tagged_texts(99)[::-1]))]
    assert same not in {other.fingerprint for other in others}


# Held-out rows of a stream


def test_training_skips_the_held_out_rows_in_every_epoch():
    texts = tagged_texts(30)
    rows = stream_rows([*texts, texts[0]])  # the first document comes again at the end
    val, held_out = first_sequences(rows, encoder(), 12)
    assert len(val) == 12 and held_out == texts[:3]
    source = stream(rows, skip_rows=len(held_out), skip=held_out, repeat=True)
    trained = source.read(0, 400, 0, 1)
    assert not set(trained.flatten().tolist()) & (set(val.flatten().tolist()) - {EOS})
    assert set(trained.flatten().tolist()) == {EOS, *range(13, 40)}


def test_many_rows_may_be_skipped():
    texts = tagged_texts(100)
    rest = stream(stream_rows(texts[70:])).read(0, 50, 0, 1)
    assert stream(stream_rows(texts), skip_rows=70).read(0, 50, 0, 1).equal(rest)


def test_a_held_out_part_larger_than_the_stream():
    val, held_out = first_sequences(stream_rows(tagged_texts(2)), encoder(), 100)
    assert 0 < len(val) < 100 and len(held_out) == 2


def packed_rows(document_length, num_rows, *, row_length=LENGTH):
    """Pre-packed rows of documents 10, 11, ... of one length, each with EOS behind it."""
    tokens = [t for n in range(num_rows * row_length) for t in [10 + n] * document_length + [EOS]]
    return [tokens[start : start + row_length] for start in range(0, num_rows * row_length, row_length)]


@pytest.mark.parametrize("document_length", [3, 7, 20, 100])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_a_document_over_the_end_of_the_held_out_rows_is_not_trained_on(document_length, num):
    rows = stream_rows(packed_rows(document_length, 200), holds_tokens=True)
    own = encoder(holds_tokens=True, cut=True)
    val, held_out = first_sequences(rows, own, num)
    assert len(val) == len(held_out) == num
    skip = rows_to_skip(rows, held_out, EOS)
    trained = probe_stream(stream(rows, skip_rows=skip, cut=True), 500)
    assert not (set(trained.flatten().tolist()) & set(val.flatten().tolist())) - {EOS}
    assert len(trained) >= 200 - num - document_length // LENGTH - 2


def test_rows_to_skip():
    rows = stream_rows([[5, EOS], [6, 6], [6, EOS], [7, 7]], holds_tokens=True)
    assert rows_to_skip(rows, [[5, EOS]], EOS) == 1  # ends with its document
    assert rows_to_skip(rows, [[5, EOS], [6, 6]], EOS) == 3
    assert rows_to_skip(rows, [[5, EOS], [6, 6]], None) == 2
    assert rows_to_skip(stream_rows(["a", "b"]), ["a"], EOS) == 1  # a text is a document
    endless = stream_rows([[5, 5]] * 200, holds_tokens=True)
    assert rows_to_skip(endless, [[5, 5]], EOS) == 1 + MAX_ROWS_OF_A_DOCUMENT
