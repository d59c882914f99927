import io
import logging

import numpy as np
import pytest
import torch

from data_factories import NumberTokenizer, tagged_texts
from jsae_lightning.activation_buffer import ActivationLoader
from jsae_lightning.block_maker import BlockGeometry, assign_slots, sequences_per_shard
from jsae_lightning.errors import UserError
from jsae_lightning.packing import ArrayRows, Encoder, PackedSequences, Packing, PositionMask, make_packing
from jsae_lightning.sequence_sources import PackedStream, ShuffledSequences
from jsae_lightning.sharding import choose_num_shards
from jsae_lightning.token_sources import Rows

LENGTH, D_MODEL = 16, 3
MICRO_BATCH, BUFFER_BATCHES = 20, 4  # a block of 80 tokens: 5 sequences


class FakeModel:
    """Activations that tell which token at which position they are of: (token, position, their product)."""

    def __init__(self):
        self.sequences_run = []

    def mlp_in(self, tokens):
        self.sequences_run.append(len(tokens))
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        return torch.stack([tokens, position, tokens * position], dim=-1).float()


def shuffled(num=60, seed=0):
    """Sequence i holds the tokens i * LENGTH ... i * LENGTH + 15."""
    tokens = np.arange(num * LENGTH, dtype=np.int32)
    return ShuffledSequences(PackedSequences(ArrayRows([tokens]), Packing(LENGTH, "never", None, None)), seed)


def streamed(num=60):
    import datasets

    texts = tagged_texts(num)
    tokenizer = NumberTokenizer()
    encoder = Encoder(make_packing("never", tokenizer, LENGTH, holds_tokens=False), tokenizer, 10_000, "here", False)
    data = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=3)
    rows = Rows(data, "here", "text", False, tuple(texts))
    return PackedStream(rows, encoder, skip_rows=0, skip_digests=frozenset(), repeat=True)


def loader(
    sequences=None,
    *,
    num=22,
    count=5,
    included=None,
    share=MICRO_BATCH,
    shards=None,
    micro_batches=1,
    buffer_batches=BUFFER_BATCHES,
    seed=0,
    rank=0,
    world_size=1,
    model=None,
    cache=None,
    prefetch=False,
    device="cpu",
    d_model=D_MODEL,
):
    """A shard for each rank, unless `shards` says otherwise; `share` and `count`: its tokens of a batch, sequences."""
    shards = shards or world_size
    return ActivationLoader(
        sequences or shuffled(),
        (model or FakeModel()).mlp_in,
        included or PositionMask(False, ()),
        d_model=d_model,
        device=device,
        geometry=BlockGeometry(share * shards, buffer_batches, shards, count),
        num_batches=num,
        micro_batches=micro_batches,
        lm_batch_sequences=2,
        seed=seed,
        rank=rank,
        world_size=world_size,
        cache=cache,
        prefetch=prefetch,
    )


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tokens_of(batches):
    return torch.cat(list(batches))[:, 0].long()


# What is served


def test_length_shape_and_type():
    batches = list(loader())
    assert len(batches) == len(loader()) == 22
    assert all(batch.shape == (MICRO_BATCH, D_MODEL) and batch.dtype == torch.float32 for batch in batches)
    assert not any(batch.requires_grad for batch in batches)


def test_a_block_serves_each_token_of_its_sequences_once():
    batches = list(loader(num=12))
    for block in range(3):
        served = tokens_of(batches[4 * block : 4 * block + 4]).sort().values
        expected = shuffled().read(5 * block, 5, 0, 1).flatten().sort().values
        assert served.equal(expected)


def test_activations_are_the_models_own():
    for batch in loader(num=4):
        assert (batch[:, 1] == batch[:, 0] % LENGTH).all() and (batch[:, 2] == batch[:, 0] * batch[:, 1]).all()


def test_surplus_tokens_of_a_block_are_dropped_at_random():
    served = tokens_of(loader(num=4, share=17))  # 68 of 80 tokens
    assert len(served.unique()) == 68
    assert len((served // LENGTH).unique()) == 5  # not the last sequence


def test_excluded_positions_are_not_served():
    batches = list(loader(included=PositionMask(True, (1, 2, 3)), num=20, count=6))
    served = torch.cat(batches)
    assert (served[:, 1] > 0).all() and not set(served[:, 0].tolist()) & {1.0, 2.0, 3.0}


def test_the_model_runs_on_few_sequences_at_a_time_and_not_ahead():
    model = FakeModel()
    own = loader(model=model)
    batches = iter(own)
    assert not model.sequences_run
    for _ in range(4):
        next(batches)
    assert model.sequences_run == [2, 2, 1]
    next(batches)
    assert model.sequences_run == [2, 2, 1] * 2


def test_one_block_is_held_at_most():
    own = loader(num=40)
    blocks, tensors = set(), []
    for batch in own:
        blocks.add(own._block.data_ptr())
        tensors.append(batch)
        assert own._block.numel() == MICRO_BATCH * BUFFER_BATCHES * D_MODEL
    assert len(blocks) == 1  # every block in the same memory
    assert all(batch.untyped_storage().nbytes() == batch.numel() * 4 for batch in tensors)  # no view keeps a block


def test_a_batch_is_not_overwritten_later():
    batches = list(loader())
    assert torch.stack(batches[:4]).equal(torch.stack(list(loader(num=4))))


# Shuffling


def sequence_counts(batches, count):
    """How many tokens of each of the block's sequences each micro-batch holds: (batches, sequences)."""
    tables = []
    for start in range(0, len(batches), BUFFER_BATCHES):
        sequences = tokens_of(batches[start : start + BUFFER_BATCHES]).view(BUFFER_BATCHES, -1) // LENGTH
        names = sequences.unique()
        assert len(names) == count
        tables.append((sequences[:, :, None] == names).sum(dim=1))
    return torch.cat(tables).double()


def chi_square(counts):
    """Sum of (n - expected)^2 / expected over its mean under random draws without replacement, per batch."""
    num_tokens = counts.sum(dim=1, keepdim=True)
    expected = num_tokens / counts.shape[1]
    share = 1 - 1 / BUFFER_BATCHES  # drawing without replacement
    return ((counts - expected) ** 2 / expected).sum(dim=1) / ((counts.shape[1] - 1) * share)


SHUFFLE = {"share": 160, "count": 40, "num": 40}  # blocks of 640 tokens of 40 sequences, 10 blocks


def test_no_sequence_is_over_represented_in_a_batch_beyond_chance():
    counts = sequence_counts(list(loader(shuffled(400), **SHUFFLE)), 40)
    statistic = chi_square(counts)  # 39 degrees of freedom: mean 1, standard deviation 0.23
    assert abs(statistic.mean() - 1) < 4 * 0.23 / 40**0.5
    assert statistic.max() < 1 + 4.5 * 0.23
    assert counts.max() <= 13  # of 4 expected; P(a given count > 13) < 3e-6


def test_the_test_above_fails_without_shuffling(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    statistic = chi_square(sequence_counts(list(loader(shuffled(400), **SHUFFLE)), 40))
    assert statistic.mean() > 2


def test_batches_differ_in_order_between_blocks_ranks_and_seeds():
    # The slots of equal blocks: every draw of its own.
    def order(**changes):
        positions = torch.cat(list(loader(num=4, **changes)))
        return tuple(positions[:, 1].tolist())

    orders = {order(), order(seed=1), order(rank=1, world_size=2), order(world_size=2)}
    second = tuple(torch.cat(list(loader(num=8))[4:])[:, 1].tolist())
    assert len(orders | {second}) == 5
    assert order() == order()


# Ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_data_without_overlap_or_loss(world_size):
    parts = [tokens_of(loader(num=8, rank=rank, world_size=world_size)) for rank in range(world_size)]
    expected = shuffled().read(0, 2 * 5 * world_size, 0, 1).flatten()
    assert torch.cat(parts).sort().values.equal(expected.sort().values)
    assert len({len(part) for part in parts}) == 1


NUM_SHARDS = {"shards": 6, "share": 4, "count": 2, "num": 11}  # 24 tokens a batch, 12 sequences a block


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_every_number_of_ranks_that_divides_the_shards_sees_the_same_batches(make, world_size):
    alone = list(loader(make(), **NUM_SHARDS))
    parts = [list(loader(make(), rank=rank, world_size=world_size, **NUM_SHARDS)) for rank in range(world_size)]
    for batch, *shared in zip(alone, *parts, strict=True):
        assert all(len(part) == 24 // world_size for part in shared)
        together = torch.cat(shared)
        assert sorted(together.tolist()) == sorted(batch.tolist())
        assert len(batch.unique(dim=0)) > 12


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_are_parts_of_the_same_batches(micro_batches):
    whole = torch.stack(list(loader(**NUM_SHARDS)))
    own = loader(micro_batches=micro_batches, **NUM_SHARDS)
    assert len(own) == 11 * micro_batches
    assert torch.cat(list(own)).view_as(whole).equal(whole)


def test_every_batch_takes_an_equal_share_of_every_shard():
    own = loader(**NUM_SHARDS)
    place = {int(s[0]) // LENGTH: i for i, s in enumerate(shuffled().read(0, 12, 0, 1))}
    for _, batch in zip(range(BUFFER_BATCHES), own, strict=False):
        shards = torch.tensor([place[int(token) // LENGTH] % 6 for token in batch[:, 0]])
        assert shards.bincount(minlength=6).tolist() == [4] * 6


@pytest.mark.parametrize(
    ("wanted", "batch_tokens", "world_size", "expected"),
    [(None, 4096, 1, 8), (None, 4096, 4, 8), (None, 4096, 16, 16), (None, 36, 2, 4), (None, 9, 1, 1), (None, 9, 3, 3),
     (6, 24, 3, 6)],
)  # fmt: skip
def test_number_of_shards(wanted, batch_tokens, world_size, expected):
    assert choose_num_shards(wanted, batch_tokens, world_size) == expected


def test_impossible_numbers_of_shards_are_refused():
    with pytest.raises(UserError, match="data.num_shards: 7 does not divide data.batch_tokens 24"):
        choose_num_shards(7, 24, 1)
    with pytest.raises(UserError, match="data.num_shards: 6 is not a multiple of the 4 ranks"):
        choose_num_shards(6, 24, 4)


# Resume


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 1)), ((3, 1), (1, 2)), ((2, 2), (3, 1))])
def test_a_resume_on_other_ranks_or_micro_batches_goes_on_with_the_next_batch(make, before, after, caplog):
    """The number of ranks and of micro-batches may both change while the shards stay: not even a block is replayed."""
    expected = [sorted(batch.tolist()) for batch in loader(make(), **NUM_SHARDS)]
    world_size, micro_batches = before
    own = loader(make(), world_size=world_size, micro_batches=micro_batches, **NUM_SHARDS)
    for _ in zip(range(6 * micro_batches), own, strict=False):
        pass
    state = through_a_file(own.state_dict())
    world_size, micro_batches = after
    parts = []
    for rank in range(world_size):
        resumed = loader(make(), rank=rank, world_size=world_size, micro_batches=micro_batches, **NUM_SHARDS)
        resumed.load_state_dict(state)
        parts.append(torch.stack(list(resumed)).view(5, -1, D_MODEL))
    assert "go on at sequence" not in caplog.text
    assert [sorted(batch.tolist()) for batch in torch.cat(parts, dim=1)] == expected[6:]


def test_the_state_in_the_middle_of_a_batch_is_that_of_its_start():
    own = loader(micro_batches=2, **NUM_SHARDS)
    states = [own.state_dict()["batch"] for _ in zip(range(5), own, strict=False)]
    assert states == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("world", [(0, 1), (1, 2)], ids=["alone", "rank 1 of 2"])
@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
@pytest.mark.parametrize("served", [0, 1, 3, 4, 5, 8, 13, 21, 22])
def test_resume_is_bit_exact(make, served, world):
    rank, world_size = world
    own = loader(make(), rank=rank, world_size=world_size)
    batches = iter(own)
    for _ in range(served):
        next(batches)
    state = own.state_dict()
    assert state["batch"] == served
    resumed = loader(make(), rank=rank, world_size=world_size)
    resumed.load_state_dict(through_a_file(state))
    if served < 22:
        remaining, expected = list(resumed), list(batches)
        assert len(remaining) == 22 - served
        assert torch.stack(remaining).equal(torch.stack(expected))


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
def test_asking_for_the_state_changes_nothing_and_resumes_may_follow_resumes(make):
    expected = torch.stack(list(loader(make())))
    got, state = [], None
    while len(got) < 22:
        own = loader(make())
        if state is not None:
            own.load_state_dict(state)
        for _, batch in zip(range(3), own, strict=False):
            got.append(batch)
            own.state_dict()
            state = through_a_file(own.state_dict())
    assert torch.stack(got).equal(expected)


def test_the_state_is_the_same_on_every_rank():
    states = []
    for rank in range(3):
        own = loader(streamed(), rank=rank, world_size=3)
        batches = iter(own)
        for _ in range(6):
            next(batches)
        states.append(own.state_dict())
    pending = [state["source"].pop("pending") for state in states]
    assert states[0] == states[1] == states[2] and pending[0].equal(pending[1])


def test_a_resume_runs_the_model_on_one_block_only():
    own = loader()
    batches = iter(own)
    for _ in range(10):
        next(batches)
    model = FakeModel()
    resumed = loader(model=model)
    resumed.load_state_dict(own.state_dict())
    next(iter(resumed))
    assert sum(model.sequences_run) == 5


def test_iterating_again_goes_on_and_a_finished_loader_starts_over():
    own = loader()
    first = [batch for _, batch in zip(range(6), own, strict=False)]
    rest = list(own)
    everything = list(loader())
    assert torch.stack(first + rest).equal(torch.stack(everything))
    assert own.state_dict()["batch"] == 22
    assert torch.stack(list(own)).equal(torch.stack(everything))


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
def test_another_number_of_ranks_goes_on_from_the_start_of_the_block(make, caplog):
    own = loader(make())
    batches = iter(own)
    for _ in range(6):  # in the second block, which began with sequence 5
        next(batches)
    resumed = [loader(make(), rank=rank, world_size=2, num=14) for rank in range(2)]
    with caplog.at_level(logging.WARNING):
        for part in resumed:
            part.load_state_dict(own.state_dict())
    assert "go on at sequence 5 of the global order" in caplog.text and "num_shards 1 -> 2" in caplog.text
    parts = [list(part) for part in resumed]
    assert [len(part) for part in parts] == [8, 8]
    expected = make().read(0, 5 + 20, 0, 1)[5:].flatten()
    assert tokens_of(parts[0] + parts[1]).sort().values.equal(expected.sort().values)
    # And that run, too, is resumed bit for bit.
    again = loader(make(), rank=1, world_size=2, num=14)
    third = loader(make(), rank=1, world_size=2, num=14)
    again.load_state_dict(own.state_dict())
    for _ in zip(range(5), again, strict=False):
        pass
    third.load_state_dict(again.state_dict())
    assert torch.stack(list(third)).equal(torch.stack(parts[1][5:]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed: 1, but the checkpoint was made with seed 0"),
        ({"sequences": shuffled(59)}, "data: the training"),
    ],
)
def test_a_state_of_another_run_is_refused(other, message):
    with pytest.raises(UserError, match=message):
        loader(**other).load_state_dict(loader().state_dict())


# Sizes


def test_sequences_per_shard():
    assert sequences_per_shard(80, torch.full((9,), 16)) == 5
    assert sequences_per_shard(81, torch.full((9,), 16)) == 6
    assert sequences_per_shard(80, torch.full((9,), 15)) == 6
    with pytest.raises(UserError, match="every position of the data is excluded"):
        sequences_per_shard(80, torch.zeros(9, dtype=torch.int64))


def test_the_margin_makes_short_blocks_rare():
    generator = torch.Generator().manual_seed(0)
    usable = torch.randint(4, 17, (20_000,), generator=generator)
    count = sequences_per_shard(2000, usable[:256])
    drawn = usable[torch.randint(len(usable), (4000, count), generator=generator)].sum(dim=1)
    assert (drawn < 2000).double().mean() < 0.01
    assert drawn.double().mean() < 1.15 * 2000


def test_a_block_with_too_few_tokens_draws_some_twice(caplog):
    included = PositionMask(False, tuple(range(0, 5000, 2)))  # every other token: 40 of a block's 80
    own = loader(included=included)
    with caplog.at_level(logging.INFO):
        batches = list(own)
    assert "40 of 80 tokens of shard 0 of the block at sequence 0 were drawn twice" in caplog.text
    assert own.redrawn_tokens == 6 * 40
    for block in range(5):
        served = tokens_of(batches[4 * block : 4 * block + 4])
        expected = [t for t in shuffled().read(5 * block, 5, 0, 1).flatten().tolist() if t % 2]
        assert set(served.tolist()) == set(expected) and len(served) == 80
    resumed = loader(included=included)
    for _ in zip(range(7), resumed, strict=False):
        pass
    state, resumed = resumed.state_dict(), loader(included=included)
    resumed.load_state_dict(state)
    assert torch.stack(list(resumed)).equal(torch.stack(batches[7:]))


def test_every_slot_is_filled_once():
    generator = torch.Generator().manual_seed(0)
    for num_included in (1, 7, 31, 32):
        included = torch.zeros(32, dtype=torch.bool)
        included[torch.randperm(32, generator=generator)[:num_included]] = True
        included = included.view(4, 8)
        for num_slots in (1, 7, 20, 40):
            slots, copies = assign_slots(included, num_slots, generator)
            taken = slots[slots >= 0].tolist()
            assert sorted(taken + copies[0].tolist()) == list(range(num_slots))
            assert set(copies[1].tolist()) <= set(taken) and (slots[~included] == -1).all()


def test_a_block_of_special_tokens_only():
    with pytest.raises(UserError, match="data.exclude_special_tokens"):
        next(iter(loader(included=PositionMask(False, tuple(range(60 * LENGTH))))))
