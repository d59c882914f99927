"""Reductions: no-ops without a process group, and over two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from jsae_lightning import distributed

WORKER = """
import sys
import torch
import torch.distributed as dist
from jsae_lightning.distributed import all_reduce_max, all_reduce_sum, rank_and_world_size
from test_distributed import evaluate

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
counts = torch.tensor([2**40 + rank, 3])
sums = {"b": counts, "a": torch.full((2, 2), 0.5 + rank), "c": torch.tensor(1e-12 * (rank + 1), dtype=torch.float64)}
if rank == 1:
    sums = dict(reversed(sums.items()))  # the order of keys must not matter
mask = torch.tensor([rank == 0, rank == 1, False])
out = {
    "sums": all_reduce_sum(sums), "counts_after": counts, "max": all_reduce_max(mask), "mask_after": mask,
    "largest": all_reduce_max(torch.tensor([1.5 * rank, -1.0 - rank])),
    "rank": rank_and_world_size(), "evaluation": evaluate().metrics,
}
torch.save(out, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def evaluate():
    from factories import make_pair
    from fake_language_model import FakeLanguageModel, make_tokens
    from jsae_lightning.evaluation import evaluate_pair
    from jsae_lightning.jacobians import edge_penalty
    from jsae_lightning.penalties import make_penalty

    model = FakeLanguageModel()
    return evaluate_pair(
        make_pair(), model.mlp, model, *make_tokens(),
        at="input", batch_sequences=2, jacobian_tokens=20, penalty=edge_penalty(make_penalty("hoyer"), "jacobian"),
    )  # fmt: skip


def test_two_processes_reduce_and_evaluate_like_one(tmp_path):
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, stderr = worker.communicate(timeout=120)
        assert worker.returncode == 0, stderr.decode()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    single = evaluate()
    for rank, found in enumerate(results):
        assert found["rank"] == (rank, 2)
        assert found["sums"]["b"].tolist() == [2**41 + 1, 6]
        assert found["sums"]["b"].dtype == torch.int64
        assert torch.equal(found["sums"]["a"], torch.full((2, 2), 2.0))
        assert found["sums"]["c"].item() == 3e-12
        assert found["counts_after"].tolist() == [2**40 + rank, 3]
        assert found["max"].tolist() == [True, True, False]
        assert found["mask_after"].tolist() == [rank == 0, rank == 1, False]
        assert found["largest"].tolist() == [1.5, -1.0]
        for key, value in single.metrics.items():
            assert abs(found["evaluation"][key] - value) <= 1e-9 * max(1, abs(value)), key
    assert results[0]["evaluation"] == results[1]["evaluation"]


def test_one_process_needs_no_group():
    assert distributed.rank_and_world_size() == (0, 1)
    sums, mask = {"a": torch.tensor(2.5), "n": torch.tensor([1, 2])}, torch.tensor([True, False])
    assert distributed.all_reduce_sum(sums) == sums
    assert distributed.all_reduce_sum(sums) is not sums
    assert torch.equal(distributed.all_reduce_max(mask), mask)
    assert distributed.all_reduce_sum({}) == {}
