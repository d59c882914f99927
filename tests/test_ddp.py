"""Two ranks with half the batch each equal one rank with the whole batch; so does gradient accumulation.

With default blocks: every number of ranks that divides the shards sees the same batches.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from comparing import assert_same_run, assert_same_training, checkpoint
from running import (
    command,
    environment,
    processes,
    run,
    toy_overrides,
    train,
    wait_for_no_process_in,
    write_documents,
)
from tiny_models import make_model_dir

STEPS = ["data.train_tokens=3200", "checkpoint.every_n_steps=4", "eval.every_n_steps=25"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]
FAULTS = ["+callbacks.fault._target_=faults.KillSelf"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    material = make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")
    assert train([*toy_overrides(*material, folder / "run"), *STEPS], output=folder / "output") == 0, (
        folder / "output"
    ).read_text()
    return material, folder / "run"


@pytest.fixture(scope="module")
def two_ranks(one_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    recorder = ["+callbacks.buckets._target_=faults.RecordBuckets", f"+callbacks.buckets.folder={folder}"]
    code = train([*overrides(one_rank[0], folder / "run"), *recorder], output=folder / "output")
    assert code == 0, (folder / "output").read_text()
    return folder


def overrides(material, folder: Path) -> list[str]:
    kept = [o for o in toy_overrides(*material, folder) if o != "trainer.accelerator=cpu"]
    return [*kept, *STEPS, *DDP, *FAULTS]


@pytest.mark.slow
def test_two_ranks_equal_one(one_rank, two_ranks):
    assert (two_ranks / "run" / "sae_pair" / "model.safetensors").is_file()
    assert_same_training(two_ranks / "run", one_rank[1])


@pytest.mark.slow
def test_the_language_model_is_in_no_bucket(two_ranks):
    """DDP reduces the pair's parameters and nothing else, and broadcasts no buffer."""
    saved = checkpoint(two_ranks / "run")["state_dict"]
    pair = {name: tensor.nbytes for name, tensor in saved.items() if name.startswith("pair.")}
    for rank in range(2):
        found = json.loads((two_ranks / f"ddp_{rank}.json").read_text())
        assert found["class"] == "DistributedDataParallel" and not found["broadcast_buffers"]
        assert sorted(found["parameters"]) == sorted(pair)
        assert sum(int(size) for size in found["bucket_bytes"].split(",")) == sum(pair.values())


def test_accumulated_micro_batches_equal_one_batch(one_rank, tmp_path):
    """Four micro-batches of a quarter each."""
    material, expected = one_rank
    accumulate = [*STEPS, "trainer.accumulate_grad_batches=4"]
    output = tmp_path / "output"
    assert train([*toy_overrides(*material, tmp_path / "run"), *accumulate], output=output) == 0, output.read_text()
    assert_same_training(tmp_path / "run", expected)


# Killed ranks


def interrupted(material, tmp_path: Path, kill: str) -> tuple[str, Path]:
    """Train on two ranks until `kill` happens; return what was printed, and the run's folder."""
    found, output = tmp_path / "run", tmp_path / "output"
    code = train(overrides(material, found), output=output, JSAE_TEST_KILL=kill)
    assert code != 0, output.read_text()
    assert time.time() - (found / "checkpoints" / "last.ckpt").stat().st_mtime < 60  # saved a step before the kill
    return output.read_text(), found


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["0:13", "all:13"], ids=["rank 0", "all ranks"])  # rank 1's death: the next test
def test_killed_ranks_end_the_run_and_it_resumes_exactly(kill, one_rank, two_ranks, tmp_path):
    said, found = interrupted(one_rank[0], tmp_path, kill)
    wait_for_no_process_in(tmp_path)
    if (rank := kill[0]) != "a":
        assert f"error: rank {rank} is gone" in said and "ckpt_path=auto" in said
    output = tmp_path / "resumed"
    assert train(["ckpt_path=auto", f"hydra.run.dir={found}"], output=output) == 0, output.read_text()
    assert "going on from step 12" in output.read_text()
    assert_same_run(found, two_ranks / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_micro_batches(one_rank, tmp_path):
    """Two ranks are killed, one goes on, with two micro-batches a step: the very same batches, none replayed."""
    material, expected = one_rank
    said, found = interrupted(material, tmp_path, "1:13")
    wait_for_no_process_in(tmp_path)
    assert "error: rank 1 is gone" in said and "ckpt_path=auto" in said
    change = ["trainer=cpu", "trainer.accumulate_grad_batches=2"]
    output = tmp_path / "resumed"
    assert train(["ckpt_path=auto", f"hydra.run.dir={found}", *change], output=output) == 0, output.read_text()
    assert_same_training(found, expected)


@pytest.mark.slow
def test_a_killed_start_leaves_no_rank_behind(one_rank, tmp_path):
    """Rank 0 is killed before the ranks have met: rank 1 would wait for it for half an hour."""
    process = subprocess.Popen(
        command([*overrides(one_rank[0], tmp_path / "run")]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while not [p for p in processes() if str(tmp_path) in p and "train_ddp_process_1" in p]:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_no_process_in(tmp_path)


@pytest.mark.slow
def test_torchrun_makes_one_folder(one_rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [o for o in overrides(one_rank[0], tmp_path) if not o.startswith("hydra.run.dir")]
    torchrun = command(own, "--standalone", "--nproc-per-node=2")
    output = tmp_path / "output"
    assert run(torchrun, output=output) == 0, output.read_text()
    (found,) = (tmp_path / "logs" / "runs").iterdir()
    assert_same_training(found, one_rank[1])
