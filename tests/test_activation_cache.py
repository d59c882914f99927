"""The activation cache: the same values as without it, shared by jobs, made again where a file is wrong."""

import functools
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from comparing import assert_same, assert_same_run, checkpoint
from data_factories import data_settings
from jsae_lightning import activation_cache, cache_files
from jsae_lightning.activation_cache import ActivationCache
from jsae_lightning.block_maker import BlockGeometry
from jsae_lightning.cache_files import DamagedFileError, locked, read_shard, write_shard
from jsae_lightning.data import ActivationDataModule
from jsae_lightning.errors import UserError
from running import kill_self, toy_overrides, train, write_documents
from test_activation_buffer import NUM_SHARDS, FakeModel, loader, shuffled, streamed
from test_resume import FAULTS
from tiny_models import make_model_dir

GEOMETRY = BlockGeometry(24, 4, 6, 2)  # that of NUM_SHARDS: 6 shards of 16 tokens, 12 sequences a block
FEW = NUM_SHARDS | {"count": 1}  # sequences of 16 tokens of which 12 are included
BLOCKS = 3  # of 11 batches
D_MODEL = 3


def cache_in(folder, *, dtype="float32", **key):
    return ActivationCache(folder, key, geometry=GEOMETRY, d_model=D_MODEL, dtype=dtype)


def batches(cache, make=shuffled, model=None, **changes):
    return torch.stack(list(loader(make(), model=model or RoughModel(), cache=cache, **NUM_SHARDS, **changes)))


class RoughModel(FakeModel):
    """Activations that bfloat16 cannot hold, of tokens and positions."""

    def mlp_in(self, tokens):
        return (super().mlp_in(tokens) + 0.123).sqrt()


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "key.json")


# What is served


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
def test_float32_is_bit_identical_and_a_hit_needs_no_model(tmp_path, make):
    expected = batches(None, make)
    first = cache_in(tmp_path)
    assert batches(first, make).equal(expected)
    assert (first.read, first.written) == (0, 6 * BLOCKS)
    second, model = cache_in(tmp_path), RoughModel()
    assert batches(second, make, model).equal(expected)
    assert (second.read, second.written) == (6 * BLOCKS, 0) and not model.sequences_run
    assert second.report() == "activation cache: 18 shard files read, 0 written"


def test_bfloat16_serves_the_rounded_values_from_the_first_run_on(tmp_path):
    expected = batches(None)
    first, second = (batches(cache_in(tmp_path, dtype="bfloat16")) for _ in range(2))
    assert first.dtype == torch.float32 and first.equal(expected.bfloat16().float()) and not first.equal(expected)
    assert second.equal(first)


def test_files_are_named_by_position_and_shard(tmp_path):
    cache = cache_in(tmp_path, seed=7)
    batches(cache)
    assert files(tmp_path) == sorted(
        cache.folder / f"shard_0{shard}" / f"sequence_{12 * block:012d}.safetensors"
        for shard in range(6)
        for block in range(BLOCKS)
    )
    assert json.loads((cache.folder / "key.json").read_text()) == {"seed": 7, "d_model": D_MODEL, "dtype": "float32"}
    sizes = [path.stat().st_size for path in files(tmp_path)]
    assert all(size < 16 * D_MODEL * 4 + 600 for size in sizes)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_number_of_ranks_shares_the_same_files(tmp_path, world_size):
    alone = batches(cache_in(tmp_path))
    before = files(tmp_path)
    for rank in range(world_size):
        model = RoughModel()
        part = batches(cache_in(tmp_path), model=model, rank=rank, world_size=world_size)
        assert not model.sequences_run
        assert part.equal(batches(None, rank=rank, world_size=world_size))
        assert set(map(tuple, part.flatten(0, 1).tolist())) < set(map(tuple, alone.flatten(0, 1).tolist()))
    assert files(tmp_path) == before


def test_a_resume_with_the_cache_is_bit_exact(tmp_path):
    own = loader(streamed(), model=RoughModel(), cache=cache_in(tmp_path), **NUM_SHARDS)
    for _ in zip(range(6), own, strict=False):
        pass
    resumed = loader(streamed(), model=RoughModel(), cache=cache_in(tmp_path), **NUM_SHARDS)
    resumed.load_state_dict(own.state_dict())
    assert torch.stack(list(resumed)).equal(batches(None, streamed)[6:])


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_resume_with_another_rounding_is_warned_of(tmp_path, caplog, before, after):
    state = loader(cache=cache_in(tmp_path, dtype=before), **NUM_SHARDS).state_dict()
    loader(cache=cache_in(tmp_path, dtype=before), **NUM_SHARDS).load_state_dict(state)
    assert "rounded" not in caplog.text
    loader(cache=cache_in(tmp_path, dtype=after), **NUM_SHARDS).load_state_dict(state)
    assert f"rounded to {before} before the checkpoint, and are now to {after}" in caplog.text


def test_tokens_drawn_twice_are_counted_on_hits_too(tmp_path):
    counts = []
    for _ in range(2):
        own = loader(included=lambda tokens: tokens % 4 > 0, model=RoughModel(), cache=cache_in(tmp_path), **FEW)
        list(own)
        counts.append(own.redrawn_tokens)
    assert own._cache.read == 18 and counts[0] == counts[1] > 0


# What is wrong with a file


def truncate(content):
    return content[: len(content) // 2]


def flip(content, place):
    changed = bytearray(content)
    changed[place] ^= 0x10
    return bytes(changed)


DAMAGE = {
    "truncated": truncate,
    "one byte short": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "garbage": lambda content: os.urandom(len(content)),
    "header": lambda content: flip(content, 3),
    "name": lambda content: content.replace(b'"mlp_in"', b'"mlp_on"'),
    "first byte of the data": lambda content: flip(content, -16 * D_MODEL * 4),
    "last byte": lambda content: flip(content, -1),
    "dtype": lambda content: content.replace(b'"F32"', b'"I32"'),
    "checksum": lambda content: content.replace(b'"checksum":"', b'"chickens":"'),
    "position": lambda content: content.replace(b'"position":"12"', b'"position":"24"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_warned_of_and_made_again(tmp_path, caplog, damage):
    expected = batches(cache_in(tmp_path))
    path = cache_in(tmp_path).folder / "shard_02" / "sequence_000000000012.safetensors"
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    assert path.read_bytes() != whole
    cache, model = cache_in(tmp_path), RoughModel()
    with caplog.at_level(logging.WARNING):
        assert batches(cache, model=model).equal(expected)
    assert len(caplog.records) == 1 and f"{path} " in caplog.text and "made again" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    assert (cache.read, cache.written) == (17, 1) and sum(model.sequences_run) == 2
    again = cache_in(tmp_path)
    assert batches(again).equal(expected) and again.read == 18


def test_a_flip_of_any_byte_of_a_file_is_found(tmp_path):
    path, tensor = tmp_path / "file", torch.arange(12.0).view(4, 3)
    about = {"key": "k", "position": "0"}
    write_shard(path, tensor, about)
    expected = {"shape": (4, 3), "dtype": torch.float32, "about": about}
    assert read_shard(path, **expected).equal(tensor)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(flip(whole, place))
        with pytest.raises(DamagedFileError):
            read_shard(path, **expected)


def test_a_file_of_other_tokens_is_made_again(tmp_path, caplog):
    """Data whose fingerprint, a hash of samples, did not change."""
    batches(cache_in(tmp_path), functools.partial(shuffled, 60))
    other = functools.partial(shuffled, 61)
    assert batches(cache_in(tmp_path), other).equal(batches(None, other))
    assert "holds activations of tokens" in caplog.text


def test_a_file_in_the_place_of_another_is_made_again(tmp_path, caplog):
    expected = batches(cache_in(tmp_path))
    folder = cache_in(tmp_path).folder
    shutil.copy(files(folder / "shard_00")[0], files(folder / "shard_01")[0])
    shutil.copy(files(folder / "shard_03")[0], files(folder / "shard_03")[1])
    assert batches(cache_in(tmp_path)).equal(expected)
    assert "of shard 0, not 1" in caplog.text and "of position 0, not 12" in caplog.text


# Disks


def test_a_disk_that_fills_up_ends_the_writing_and_not_the_run(tmp_path, caplog, monkeypatch):
    expected, cache, full = batches(None), cache_in(tmp_path), []
    write_bytes = Path.write_bytes

    def write(path, content):
        if len(files(tmp_path)) >= 5:
            full.append(path)
            write_bytes(path, content[:100])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with caplog.at_level(logging.WARNING):
        assert batches(cache).equal(expected)
    assert len(caplog.records) == len(full) == 1 and "disk is full" in caplog.text and "goes on" in caplog.text
    assert cache.written == len(files(tmp_path)) == 5


def test_a_folder_that_is_lost_ends_the_writing_and_not_the_run(tmp_path, caplog):
    expected, cache = batches(None, seed=1), cache_in(tmp_path)
    shutil.rmtree(cache.folder)
    cache.folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert batches(cache, seed=1).equal(expected)
    assert len([record for record in caplog.records if "goes on" in record.getMessage()]) == 1
    assert cache.written == 0


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache_files.fcntl, "flock", refuse)
    expected = batches(None)
    for _ in range(2):
        assert batches(cache_in(tmp_path)).equal(expected)


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    cache = cache_in(tmp_path)
    needed = BLOCKS * 6 * 16 * D_MODEL * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    assert "0 of the 18 shard files of this run are there" in cache.check_space(BLOCKS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(UserError, match=r"data.cache_dir: .* needs 0.00 GB more .*cache_dtype=bfloat16 .* null"):
        cache.check_space(BLOCKS)
    with pytest.raises(UserError, match="free some space, choose"):
        cache_in(tmp_path, dtype="bfloat16").check_space(2 * BLOCKS + 1)
    # What is there already needs no more space.
    batches(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert "18 of the 18" in cache.check_space(BLOCKS)
    with pytest.raises(UserError):
        cache.check_space(BLOCKS + 1)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=f"data.cache_dir: {folder} cannot be written"):
            activation_cache.check_cache_dir(str(folder))
    with pytest.raises(UserError, match="data.cache_dir: .* cannot be written"):
        cache_in(tmp_path / "file")
    assert activation_cache.check_cache_dir(None) is None


# Processes

_FORK = multiprocessing.get_context("fork")


class LoggedModel(RoughModel):
    """Adds a byte to a file for every sequence that is run, slowly."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def mlp_in(self, tokens):
        with self.path.open("ab") as file:
            file.write(b"." * len(tokens))
        time.sleep(0.01)
        return super().mlp_in(tokens)


def _fill(folder, start, log_file, result):
    torch.set_num_threads(1)
    start.wait()
    cache = cache_in(folder)
    served = batches(cache, model=LoggedModel(log_file))
    result.put((served.tolist(), cache.read, cache.written))


def test_processes_that_start_together_make_every_file_once(tmp_path):
    start, result = _FORK.Barrier(3), _FORK.Queue()
    processes = [_FORK.Process(target=_fill, args=(tmp_path / "c", start, tmp_path / "log", result)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [result.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = batches(None).tolist()
    assert all(served == expected for served, _, _ in found)
    assert sum(written for _, _, written in found) == 18 and sum(read for _, read, _ in found) == 36
    assert len((tmp_path / "log").read_bytes()) == 12 * BLOCKS  # every sequence once


def _die_half_way(folder):
    write_bytes = Path.write_bytes

    def write(path, content):
        write_bytes(path, content[: len(content) // 2])
        kill_self()

    Path.write_bytes = write
    batches(cache_in(folder))


def test_a_killed_writer_leaves_no_file_that_is_taken_for_whole_and_no_lock(tmp_path):
    process = _FORK.Process(target=_die_half_way, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    (left,) = files(tmp_path)
    assert left.name.endswith(".tmp")
    with locked(left.parent, wait=False) as is_free:
        assert is_free
    cache = cache_in(tmp_path)
    assert not files(tmp_path)
    assert batches(cache).equal(batches(None)) and cache.written == 18


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    folder = cache_in(tmp_path).folder / "shard_00"
    temporary = folder / ".sequence_0.safetensors.1.tmp"
    temporary.touch()
    with locked(folder) as is_held:
        assert is_held
        cache_in(tmp_path)
        assert temporary.exists()
    cache_in(tmp_path)
    assert not temporary.exists()


# The key


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")


def data_module(material, cache_dir, *, model=None, seed=0, num_batches=4, **changes):
    text = {"source": "text", "path": str(material[1]), "document_separator": "\n\n"}
    own = ActivationDataModule(
        model={"name_or_path": str(material[0]), "layer": 1} | (model or {}),
        data=data_settings(cache_dir=cache_dir and str(cache_dir), **text | changes),
        seed=seed,
        num_batches=num_batches,
        micro_batches=1,
    )
    own.setup()
    return own


CHANGES = {
    "nothing": {},
    "layer": {"model": {"layer": 0}},
    "weights": {"model": {"random_weights": True}},
    "model dtype": {"model": {"dtype": "bfloat16"}},
    "seed": {"seed": 1},
    "context": {"context_length": 8},
    "mask": {"exclude_first_position": True},
    "special tokens": {"exclude_special_tokens": True},
    "batch": {"batch_tokens": 64},
    "block": {"buffer_batches": 8},
    "shards": {"num_shards": 4},
    "forward passes": {"lm_batch_sequences": 2},
    "dtype": {"cache_dtype": "bfloat16"},
    "held-out data": {"val_fraction": 0.1},
}


@pytest.mark.slow
def test_every_setting_that_changes_the_activations_has_files_of_its_own(material, tmp_path):
    folders = {}
    for name, change in CHANGES.items():
        own = data_module(material, tmp_path, **change)
        expected = list(data_module(material, None, **change).train_dataloader())
        got = list(own.train_dataloader())
        if name == "dtype":
            expected = [batch.bfloat16().float() for batch in expected]
        assert torch.stack(got).equal(torch.stack(expected)), name
        folders[name] = own._cache.folder
    assert len(set(folders.values())) == len(CHANGES)


def test_what_jobs_of_a_sweep_share_has_the_same_files(material, tmp_path):
    copied = shutil.copytree(material[0], tmp_path / "elsewhere")
    first = data_module(material, tmp_path / "cache")
    list(first.train_dataloader())
    for other in ({"model": {"name_or_path": str(copied)}}, {"num_batches": 8}, {"val_sequences": 2}):
        own = data_module(material, tmp_path / "cache", **other)
        list(own.train_dataloader())
        assert own._cache.folder == first._cache.folder and own._cache.read == 8


def test_bfloat16_loses_nothing_of_a_model_in_bfloat16(material, tmp_path):
    model = {"dtype": "bfloat16"}
    own = data_module(material, tmp_path, model=model, cache_dtype="bfloat16")
    expected = torch.stack(list(data_module(material, None, model=model).train_dataloader()))
    for _ in range(2):
        assert torch.stack(list(own.train_dataloader())).equal(expected)
    assert own._cache.read == 8


def test_weights_that_differ_in_one_number_or_setting_differ(material, tmp_path):
    own = data_module(material, tmp_path).language_model
    before = own.weights_hash()
    assert own.weights_hash() == before
    with torch.no_grad():
        parameter = next(own._bridge.parameters())
        parameter[0, 0] += 1
        changed = own.weights_hash()
        parameter[0, 0] -= 1
    own._bridge.original_model.config.layer_norm_eps = 1e-3
    assert len({before, changed, own.weights_hash()}) == 3


# Whole runs


@pytest.fixture(scope="module")
def uncached(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncached")
    assert train(toy_overrides(*material, folder / "run"), output=folder / "output") == 0
    return folder / "run"


def cached(material, folder, *more):
    return [*toy_overrides(*material, folder / "run"), f"data.cache_dir={folder / 'cache'}", *more]


@pytest.mark.slow
def test_runs_without_with_a_cold_and_with_a_warm_cache_are_the_same(material, uncached, tmp_path):
    output = tmp_path / "output"
    for name, said in (("cold", "0 shard files read, 40 written"), ("warm", "40 shard files read, 0 written")):
        assert train([*cached(material, tmp_path), f"hydra.run.dir={tmp_path / name}"], output=output) == 0, (
            output.read_text()
        )
        assert_same_run(tmp_path / name, uncached)
        assert said in (tmp_path / name / "train.log").read_text()


@pytest.mark.parametrize("moment", ["inside_block", "block_boundary"])
def test_a_killed_and_resumed_run_with_a_cache_equals_one_without(material, uncached, tmp_path, moment):
    output = tmp_path / "output"
    assert train(cached(material, tmp_path), output=output, fault=FAULTS[moment]) == -9
    again = ["ckpt_path=auto", f"hydra.run.dir={tmp_path / 'run'}"]
    assert train(again, output=output) == 0, output.read_text()
    assert_same_run(tmp_path / "run", uncached)


def test_bfloat16_runs_equal_each_other_and_not_one_without_a_cache(material, uncached, tmp_path):
    output = tmp_path / "output"
    assert train(cached(material, tmp_path, "data.cache_dtype=bfloat16"), output=output) == 0, output.read_text()
    first = checkpoint(tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same(first["state_dict"], checkpoint(uncached)["state_dict"], "")
    shutil.rmtree(tmp_path / "run")
    assert train(cached(material, tmp_path, "data.cache_dtype=bfloat16"), output=output) == 0, output.read_text()
    assert_same(checkpoint(tmp_path / "run"), first, "checkpoint")


@pytest.mark.slow
def test_the_second_job_of_a_sweep_writes_nothing(material, tmp_path):
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    overrides = [o for o in cached(material, tmp_path) if not o.startswith(("hydra.run", "sae.k"))]
    arguments = [*overrides, "data.train_tokens=512", f"hydra.sweep.dir={sweep}", "sae.k=2,3", "-m"]
    assert train(arguments, output=output) == 0, output.read_text()
    assert "0 shard files read, 16 written" in (sweep / "0" / "train.log").read_text()
    assert "16 shard files read, 0 written" in (sweep / "1" / "train.log").read_text()


@pytest.mark.slow
def test_two_ranks_with_a_cache_equal_two_ranks_without(material, tmp_path):
    output = tmp_path / "output"
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "data.train_tokens=512"]
    for name, cache in (("cached", tmp_path / "cache"), ("uncached", "null")):
        overrides = [*toy_overrides(*material, tmp_path / name), *ranks, f"data.cache_dir={cache}"]
        assert train(overrides, output=output) == 0, output.read_text()
    assert_same_run(tmp_path / "cached", tmp_path / "uncached")
    assert "0 shard files read, 8 written" in (tmp_path / "cached" / "train.log").read_text()
    assert len(files(tmp_path / "cache")) == 16


def test_mistakes_end_with_one_line(material, tmp_path):
    (tmp_path / "cache").write_text("a file")
    output = tmp_path / "output"
    assert train(cached(material, tmp_path), output=output) == 2
    assert output.read_text().strip().splitlines()[-1].startswith("jsae-train: error: data.cache_dir: ")
    assert train(cached(material, tmp_path, "data.cache_dtype=float16"), output=output) == 2
    assert "data.cache_dtype: 'float16' is not known" in output.read_text()
