"""A rank that is gone ends the others, also while they are in no collective operation; an orderly end ends nobody."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jsae_lightning import processes, rank_watch
from jsae_lightning.atomic_files import atomic_file
from running import CONTEXT, environment


class Strategy:
    """Broadcasts through a file, and as nccl does: rank 0 does not wait for those that receive."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.rank, self.world_size, self.address = rank, world_size, folder / "address"

    def barrier(self):
        (self.address.parent / f"here_{self.rank}").touch()
        while len(list(self.address.parent.glob("here_*"))) < self.world_size:
            time.sleep(0.01)

    def broadcast(self, value):
        if self.rank == 0:
            with atomic_file(self.address) as temporary:
                temporary.write_text(json.dumps([value[0], value[1].hex()]))
            return value
        while not self.address.exists():
            time.sleep(0.01)
        port, token = json.loads(self.address.read_text())
        return port, bytes.fromhex(token)


def _rank(rank: int, world_size: int, folder: Path, how: str) -> None:
    os.dup2(os.open(folder / f"said_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    rank_watch._GRACE_S, rank_watch._SECONDS_TO_LEARN = 1.0, 0.1
    if "slow" in (folder / "how").read_text():
        rank_watch._CONNECT_TIMEOUT_S = 1.0
    if how == "slow":  # to load
        time.sleep(3)
    trainer = SimpleNamespace(world_size=world_size, global_rank=rank, strategy=Strategy(rank, world_size, folder))
    watch = rank_watch.RankWatch((folder / f"lost_{rank}").write_text, "RUN")
    watch.setup(trainer, None, "fit")
    (folder / f"ready_{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    if how == "busy":  # making activations, say
        time.sleep(60)
    if how == "error":
        watch.on_exception(trainer, None, RuntimeError("mine"))
        sys.exit(3)
    watch.on_fit_end(trainer, None)
    if how == "late":  # what is left to do needs no other rank
        time.sleep(3)


def ranks(folder: Path, *how: str) -> list:
    """Start a rank for each way of going on ("end", "late", "error", "busy", "slow"), and wait until all have met."""
    (folder / "how").write_text(" ".join(how))
    started = [CONTEXT.Process(target=_rank, args=(rank, len(how), folder, kind)) for rank, kind in enumerate(how)]
    for process in started:
        process.start()
    end = time.monotonic() + 60
    while len(list(folder.glob("ready_*"))) < len(how):
        assert time.monotonic() < end and all(process.is_alive() for process in started)
        time.sleep(0.02)
    return started


def exit_codes(started: list) -> list[int]:
    for process in started:
        process.join(20)
    return [process.exitcode for process in started]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_all_others_at_once(victim, tmp_path):
    """While none of them is in a collective operation."""
    started = ranks(tmp_path, "end", "end", "end")
    began = time.monotonic()
    started[victim].kill()
    assert exit_codes(started) == [-9 if rank == victim else 1 for rank in range(3)]
    assert time.monotonic() - began < 10
    for rank in {0, 1, 2} - {victim}:
        said = (tmp_path / f"said_{rank}").read_text()
        assert f"jsae-train: error: rank {victim} is gone" in said and "hydra.run.dir=RUN" in said
        assert f"rank {victim} is gone" in (tmp_path / f"lost_{rank}").read_text()


def test_ranks_that_end_in_order_end_nobody(tmp_path):
    started = ranks(tmp_path, "late", "end")
    (tmp_path / "go").touch()
    assert exit_codes(started) == [0, 0]
    assert not list(tmp_path.glob("lost_*"))


def test_a_rank_that_loads_for_longer_than_a_connection_may_take_is_waited_for(tmp_path):
    started = ranks(tmp_path, "end", "slow")
    (tmp_path / "go").touch()
    assert exit_codes(started) == [0, 0]


def test_a_rank_with_an_error_of_its_own_ends_the_others_after_a_while(tmp_path):
    """And keeps its own exit code."""
    started = ranks(tmp_path, "busy", "error")
    began = time.monotonic()
    (tmp_path / "go").touch()
    assert exit_codes(started) == [1, 3]
    assert 0.9 < time.monotonic() - began < 20


def test_an_error_of_all_ranks_leaves_each_its_exit_code(tmp_path):
    started = ranks(tmp_path, "error", "error")
    (tmp_path / "go").touch()
    assert exit_codes(started) == [3, 3]


def test_a_process_ends_with_its_parent_and_only_with_its_own(tmp_path):
    child = "from jsae_lightning.processes import end_with_parent; import time; end_with_parent(); time.sleep(60)"
    parent = (
        "import subprocess, sys, time; from jsae_lightning.processes import end_with_parent; end_with_parent(); "
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(process.stdout.readline())
    time.sleep(1.5)
    assert processes.is_alive(pid) and process.poll() is None
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while processes.is_alive(pid) and open(f"/proc/{pid}/stat").read().split()[2] != "Z":  # noqa: PTH123, SIM115
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_environment_of_another_job_is_no_parent(monkeypatch):
    for parent in ("", f"elsewhere::{2**22 + 1}", f"{processes._place()}7:{2**22 + 1}"):
        monkeypatch.setenv("JSAE_PARENT", parent)
        processes.end_with_parent()  # would end this process
        assert os.environ["JSAE_PARENT"] == f"{processes._place()}:{os.getpid()}"


def test_the_start_time_is_inherited(monkeypatch):
    monkeypatch.delenv("JSAE_STARTED_AT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    processes.agree_on_start_time()
    first = os.environ["JSAE_STARTED_AT"]
    processes.agree_on_start_time()
    assert os.environ["JSAE_STARTED_AT"] == first
    monkeypatch.delenv("JSAE_UNCLAIMED", raising=False)
    monkeypatch.setenv("JSAE_STARTED_AT", "0")
    assert processes.start_time("%s") == "0"


def test_no_two_starts_have_one_second(monkeypatch, tmp_path):
    """Whose folders would have one name. A process whose folder is named otherwise waits for nobody."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("TORCHELASTIC_RUN_ID", *processes._RANKS):
        monkeypatch.delenv(name, raising=False)
    seconds = []
    for _ in range(2):
        for name in ("JSAE_STARTED_AT", "JSAE_UNCLAIMED"):
            monkeypatch.delenv(name, raising=False)
        processes.agree_on_start_time()
        assert len(list(tmp_path.iterdir())) == bool(seconds)
        seconds.append(processes.start_time("%s"))
        assert processes.start_time("%s") == seconds[-1]  # of one start
    assert int(seconds[1]) > int(seconds[0])
    (file,) = tmp_path.iterdir()
    for content in ("", "garbage", str(int(time.time()) + 10**6)):
        file.write_text(content)
        assert processes._claimed_time() == pytest.approx(time.time(), abs=0.5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert processes._claimed_time() == pytest.approx(time.time(), abs=0.5)


@pytest.mark.parametrize(
    ("variables", "is_first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "2"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "0", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_the_first_rank(variables, is_first, monkeypatch):
    for name in (*processes._RANKS, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.is_rank_zero() == is_first
