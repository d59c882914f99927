"""Blocks that are made in the background: the same batches and states as without, errors and ends where they belong."""

import contextlib
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from jsae_lightning.background import SideStream, StoppedError, Task
from jsae_lightning.errors import RunError
from jsae_lightning.language_model import LanguageModel
from running import environment
from test_activation_buffer import (
    BUFFER_BATCHES,
    NUM_SHARDS,
    FakeModel,
    loader,
    shuffled,
    streamed,
    through_a_file,
)
from tiny_models import make_model_dir

PATIENCE_S = 60.0


class GatedModel(FakeModel):
    """Runs when the gate is open; `running` tells that somebody is at the gate."""

    def __init__(self):
        super().__init__()
        self.gate, self.running = threading.Event(), threading.Event()
        self.gate.set()

    def mlp_in(self, tokens):
        self.running.set()
        assert self.gate.wait(PATIENCE_S)
        return super().mlp_in(tokens)


class FailingModel(FakeModel):
    """Fails in the second block, with its fourth forward pass."""

    def mlp_in(self, tokens):
        if len(self.sequences_run) == 3:
            raise RunError("the disk is on fire")
        return super().mlp_in(tokens)


def state_text(own):
    state = own.state_dict()
    return str({key: through_a_file({"": value})[""] for key, value in state.items()})


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rank": 1, "world_size": 2}, {"micro_batches": 2}, {"num": 3}, {"num": 4}, {"num": 5}, NUM_SHARDS],
    ids=str,
)
def test_batches_and_states_are_those_without(make, changes):
    plain, ahead = loader(make(), **changes), loader(make(), prefetch=True, **changes)
    assert state_text(ahead) == state_text(plain)
    for expected, batch in zip(plain, ahead, strict=True):
        assert batch.equal(expected)
        assert state_text(ahead) == state_text(plain)
    assert torch.stack(list(ahead)).equal(torch.stack(list(plain)))  # over again


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
@pytest.mark.parametrize("served", [0, 1, 3, 4, 5, 8, 13, 21])
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_resume_with_and_without(make, served, before, after):
    expected = torch.stack(list(loader(make())))
    own = loader(make(), prefetch=before)
    for _ in zip(range(served), own, strict=False):
        pass
    resumed = loader(make(), prefetch=after)
    resumed.load_state_dict(through_a_file(own.state_dict()))
    assert torch.stack(list(resumed)).equal(expected[served:])


@pytest.mark.parametrize("make", [shuffled, streamed], ids=["shuffled", "stream"])
def test_a_loader_in_use_can_be_sent_elsewhere(make):
    """What is being made for the old place is thrown away."""
    expected = torch.stack(list(loader(make())))
    model = GatedModel()
    own = loader(make(), model=model, prefetch=True)
    state = through_a_file(own.state_dict())
    batches = iter(own)
    next(batches)
    own.load_state_dict(state)
    assert torch.stack(list(own)).equal(expected)


def test_the_next_block_is_made_while_one_is_served():
    model = GatedModel()
    own = loader(model=model, prefetch=True)
    batches = iter(own)
    next(batches)
    own._next.task.wait()
    assert model.sequences_run == [2, 2, 1] * 2  # two blocks, and no third
    model.gate.clear()
    model.running.clear()
    for _ in range(BUFFER_BATCHES):  # the second block's first batch is there, and the third is begun
        next(batches)
    assert model.running.wait(PATIENCE_S)
    assert model.sequences_run == [2, 2, 1] * 2
    model.gate.set()
    assert torch.stack(list(batches)).equal(torch.stack(list(loader())[5:]))


@pytest.mark.parametrize(("num", "blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (22, 6)])
def test_no_block_is_made_that_is_not_served(num, blocks):
    model = FakeModel()
    list(loader(model=model, num=num, prefetch=True))
    assert sum(model.sequences_run) == 5 * blocks


def test_two_blocks_are_held_at_most():
    own = loader(num=40, prefetch=True)
    blocks = set()
    for batch in own:
        blocks.add(own._block.data_ptr())
        blocks.update([own._next.block.data_ptr()] if own._next else [])
        assert batch.untyped_storage().nbytes() == batch.numel() * 4
    assert len(blocks) == 2


def test_an_error_is_raised_when_the_block_is_due():
    own = loader(model=FailingModel(), prefetch=True)
    served = []
    with pytest.raises(RunError, match="the disk is on fire"):
        for batch in own:
            served.append(batch)
    assert torch.stack(served).equal(torch.stack(list(loader(num=BUFFER_BATCHES))))
    assert own.state_dict()["batch"] == own.state_dict()["block_start"] == BUFFER_BATCHES


def test_closing_ends_the_work_and_another_loader_goes_on():
    model = GatedModel()
    own = loader(model=model, prefetch=True)
    batches = iter(own)
    next(batches)
    own._next.task.wait()
    model.gate.clear()
    model.running.clear()
    for _ in range(BUFFER_BATCHES):
        next(batches)
    assert model.running.wait(PATIENCE_S)  # in the third block
    opener = threading.Timer(0.2, model.gate.set)
    opener.start()
    own.close()
    assert model.sequences_run == [2, 2, 1] * 2 + [2]  # the pass that was going on was the last one
    resumed = loader(prefetch=True)
    resumed.load_state_dict(own.state_dict())
    assert torch.stack(list(resumed)).equal(torch.stack(list(loader())[5:]))


def test_a_task_that_is_told_to_stop_does_at_its_next_pause_point():
    begun, calls = threading.Event(), []

    def work(pause_point):
        begun.set()
        while True:
            pause_point()
            calls.append(1)

    task = Task(work)
    assert begun.wait(PATIENCE_S)
    task.stop()
    count = len(calls)
    with pytest.raises(StoppedError):
        task.wait()
    assert len(calls) == count


def test_a_process_ends_in_the_middle_of_a_block(tmp_path):
    """With the exit code of the main thread and nothing on stderr, though the other thread would work for minutes."""
    script = textwrap.dedent("""
        import sys, torch
        from test_activation_buffer import FakeModel, loader
        class Busy(FakeModel):
            def mlp_in(self, tokens):
                for _ in range(50 if len(self.sequences_run) >= 2000 else 0):  # not in the first block
                    torch.randn(200, 200) @ torch.randn(200, 200)
                return super().mlp_in(tokens)
        next(iter(loader(model=Busy(), count=4000, share=16000, num=9, prefetch=True)))
        sys.exit(7)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert (done.returncode, done.stderr) == (7, "")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = make_model_dir("gpt_neox", tmp_path_factory.mktemp("model"), num_layers=2)
    return LanguageModel.load(str(folder), layer=1)


def test_the_background_thread_works_on_its_own_device(monkeypatch):
    """Before it enters the stream, which it leaves for the device that it came from."""
    done = []

    class Stream:
        def __init__(self, device):
            self.device = torch.device("cuda", 3)

        def synchronize(self):
            done.append("synchronized")

    @contextlib.contextmanager
    def enter(stream):
        done.append("entered")
        yield
        done.append("left")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    with SideStream(torch.device("cuda")).use():
        done.append("worked")
    assert done == ["cuda:3", "entered", "worked", "synchronized", "left"]


def test_a_language_model_serves_two_threads(language_model):
    """An evaluation splices tensors in while the next block is made, and neither sees the other's hooks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(language_model.architecture.vocab_size, (2, 16), generator=generator)

    def spliced():
        return language_model.logits(tokens, replace_mlp_in=torch.zeros_like, replace_mlp_out=lambda x: 2 * x)

    mlp_in, logits = language_model.mlp_in(tokens), spliced()
    wrong = []

    def make(pause_point):
        while True:
            pause_point()
            if not language_model.mlp_in(tokens).equal(mlp_in):
                wrong.append("mlp_in")

    task = Task(make)
    for _ in range(40):
        if not spliced().equal(logits):
            wrong.append("logits")
    task.stop()
    assert not wrong


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_cuda_are_those_without(tmp_path):
    folder = make_model_dir("gpt_neox", tmp_path / "model", num_layers=2)
    model = LanguageModel.load(str(folder), layer=1, device="cuda")
    changes = {"model": model, "device": "cuda", "d_model": model.architecture.d_model, "num": 40}
    plain, ahead = list(loader(shuffled(18), **changes)), []
    scratch = torch.randn(2000, 2000, device="cuda")
    for batch in loader(shuffled(18), prefetch=True, **changes):
        scratch = torch.tanh(scratch @ scratch)  # keeps the stream of training behind
        ahead.append(batch)
    assert torch.stack(ahead).equal(torch.stack(plain))
