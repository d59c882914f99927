"""Two ranks with half the batch each equal one rank with the whole batch; so does gradient accumulation."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from running import toy_overrides, train, write_documents
from tiny_models import make_model_dir

# One batch a block: the ranks then share out exactly the sequences of one rank's batch.
STEPS = ["data.buffer_batches=1", "data.train_tokens=3200", "checkpoint.every_n_steps=null", "eval.every_n_steps=25"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    material = make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")
    assert train([*toy_overrides(*material, folder / "run"), *STEPS], output=folder / "output") == 0, (
        folder / "output"
    ).read_text()
    return material, folder / "run"


def _state(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def _assert_same_training(run: Path, expected: Path) -> None:
    ours, theirs = _state(run), _state(expected)
    for name, tensor in theirs.items():
        if tensor.is_floating_point():
            assert (ours[name] - tensor).abs().max() < 1e-6, name
        else:
            assert torch.equal(ours[name], tensor), name
    with (run / "csv" / "metrics.csv").open() as a, (expected / "csv" / "metrics.csv").open() as b:
        rows, expected_rows = list(csv.DictReader(a)), list(csv.DictReader(b))
    assert len(rows) == len(expected_rows) == 50
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for key, value in expected_row.items():
            if value and not key.startswith("time/"):
                assert float(row[key]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), (row["step"], key)


@pytest.mark.slow
def test_two_ranks_equal_one(one_rank, tmp_path):
    material, expected = one_rank
    run = tmp_path / "run"
    overrides = [o for o in toy_overrides(*material, run) if o != "trainer.accelerator=cpu"]
    command = [
        sys.executable,
        "-m",
        "jsae_lightning.train",
        *overrides,
        *STEPS,
        "trainer=ddp",
        "trainer.accelerator=cpu",
    ]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "sae_pair" / "model.safetensors").is_file()
    _assert_same_training(run, expected)


def test_accumulated_micro_batches_equal_one_batch(one_rank, tmp_path):
    """Four micro-batches of a quarter each: the same block, cut into four."""
    material, expected = one_rank
    run = tmp_path / "run"
    accumulate = [*STEPS, "data.buffer_batches=4", "trainer.accumulate_grad_batches=4"]
    assert train([*toy_overrides(*material, run), *accumulate], output=tmp_path / "output") == 0, (
        tmp_path / "output"
    ).read_text()
    _assert_same_training(run, expected)
