"""Sweeps: a process a job, none stops the others, and the same command again goes on where they were."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from jsae_lightning import devices, sweeps
from jsae_lightning.errors import UserError
from jsae_lightning.run_status import add_ended_attempt, read_status, recorded_attempt
from jsae_lightning.sweep_progress import JobProgress, last_lines
from jsae_lightning.sweep_report import report
from running import command, environment, run, toy_overrides, train, wait_for_no_process_in, write_documents
from tiny_models import make_model_dir

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")


def overrides(material, sweep: Path, *without: str) -> list[str]:
    left_out = ("hydra.run.dir", *without)
    kept = [o for o in toy_overrides(*material, sweep) if not o.startswith(left_out)]
    return [*kept, "data.train_tokens=512", f"hydra.sweep.dir={sweep}"]


def states(sweep: Path) -> list[str]:
    found = [read_status(sweep / str(n)) for n in range(len(list(sweep.glob("[0-9]*"))))]
    return [status.status if status else "nothing" for status in found]


# Whole sweeps


@pytest.mark.slow
def test_a_job_that_fails_does_not_stop_the_others_and_a_repeated_sweep_skips_what_is_finished(material, tmp_path):
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    spy = ["+hydra.callbacks.spy._target_=faults.RecordReturns", f"+hydra.callbacks.spy.path={tmp_path / 'returns'}"]
    arguments = [*overrides(material, sweep, "sae.k"), "sae.k=2,999,4", *spy, "-m"]
    assert train(arguments, output=output) == 2
    said = output.read_text()
    assert states(sweep) == ["finished", "failed", "finished"]
    assert f"sweep {sweep}: 2 finished, 1 failed" in said
    assert "job 1 of 3 (sae.k=999): failed after" in said
    assert "1: failed after 0:00:0" in said and "exit code 2: sae.k: 999 is more than the 64 latents" in said
    objectives = [json.loads((sweep / n / "metrics.json").read_text())["val/loss"] for n in "02"]
    returned = dict(line.split() for line in (tmp_path / "returns").read_text().splitlines())
    assert returned == {"0": repr(objectives[0]), "1": "nan", "2": repr(objectives[1])}

    before = {n: (sweep / n / "metrics.json").stat().st_mtime_ns for n in "02"}
    again = tmp_path / "again"
    assert train([*arguments[:-1], "sweep.resume=true", "-m"], output=again) == 2
    assert again.read_text().count("finished earlier, val/loss") == 2
    assert before == {n: (sweep / n / "metrics.json").stat().st_mtime_ns for n in "02"}

    # Without sweep.resume, or with other values, nothing that is there is touched.
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    refused = tmp_path / "refused"
    assert train(arguments, output=refused) == 2
    other = [o if not o.startswith("sae.k") else "sae.k=3,4" for o in arguments[:-1]]
    assert train([*other, "sweep.resume=true", "-m"], output=refused) == 2
    assert refused.read_text().splitlines() == [
        f"jsae-train: error: hydra.sweep.dir: {sweep}/0 holds a run already: "
        "go on with the sweep by sweep.resume=true, or choose another folder",
        f"jsae-train: error: sweep.resume: {sweep}/0 holds a run with other overrides (differing in sae.k=2, sae.k=3): "
        "repeat the sweep as it was, or choose another hydra.sweep.dir",
    ]
    assert before == {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    assert states(sweep) == ["finished", "failed", "finished"]

    # So it is where jobs name their folders themselves and look there on their own; Hydra's files are written before.
    subdir = [*arguments[:-1], "hydra.sweep.subdir=./${hydra.job.num}", "-m"]
    refused.unlink()
    assert train(subdir, output=refused) == 2
    assert refused.read_text().count("holds a run already") == 2 * 2  # each told at once, and in the report
    assert "0 finished, 3 failed" in refused.read_text()
    assert states(sweep) == ["finished", "failed", "finished"]


@pytest.mark.slow
def test_a_killed_rank_ends_its_job_only_and_the_repeated_sweep_resumes_it(material, tmp_path):
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "+callbacks.fault._target_=faults.KillSelf"]
    arguments = [*overrides(material, sweep, "trainer.acc"), *ranks, "+callbacks.fault.kill='1:6',''", "-m"]
    assert run(command(arguments), output=output) == 1
    said = output.read_text()
    assert states(sweep) == ["failed", "finished"]
    assert "0: failed after" in said and "rank 1 is gone" in said
    assert run(command([*arguments[:-1], "sweep.resume=true", "-m"]), output=output) == 0, output.read_text()
    assert "job 0 of 2" in output.read_text() and "goes on from its last checkpoint" in output.read_text()
    assert states(sweep) == ["finished", "finished"]
    assert "going on from step 4" in (sweep / "0" / "console.log").read_text()
    metrics = [json.loads((sweep / n / "metrics.json").read_text()) for n in "01"]
    assert metrics[0]["val/loss"] == metrics[1]["val/loss"]


@pytest.mark.slow
def test_a_job_that_is_out_of_memory_is_reported(material, tmp_path):
    """The second job's weights would take 51 GB; the limit is on the processes' own, not on the machine's memory."""
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    arguments = command([*overrides(material, sweep, "sae.exp"), "sae.d_sae=64,400_000_000", "-m"])
    assert run(["sh", "-c", 'ulimit -v 12582912; exec "$@"', "sh", *arguments], output=output) == 1
    said = output.read_text()
    assert states(sweep) == ["finished", "failed"]
    assert "1: failed after" in said and "can't allocate memory" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_a_killed_sweep_takes_its_jobs_along_and_says_so_afterwards(launcher, material, tmp_path):
    sweep = tmp_path / "sweep"
    long = ["data.train_tokens=640000", "checkpoint.every_n_steps=1"]
    arguments = [*overrides(material, sweep, "data.train"), *long, *launcher, "sae.k=2,3", "-m"]
    process = subprocess.Popen(command(arguments), env=environment(), stdout=subprocess.DEVNULL)
    while not (sweep / "0" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_no_process_in(sweep)
    end = time.monotonic() + 60
    while "running" in states(sweep):  # joblib's workers, which hold the lock while they note the end
        assert time.monotonic() < end
        time.sleep(0.2)
    ended = states(sweep)[0]
    # They mostly see the job end before they end themselves, and note it as failed.
    assert ended in ({"failed", "killed"} if launcher else {"killed"})
    assert not {"finished", "running"} & set(states(sweep))
    text, code = report(sweep)
    assert code == 1 and ended in text and "sweep.resume=true" in text


@pytest.mark.slow
def test_every_rank_of_torchrun_running_the_sweep_is_refused(material, tmp_path):
    output = tmp_path / "output"
    arguments = command(
        [*overrides(material, tmp_path / "sweep"), "seed=0,1", "-m"], "--standalone", "--nproc-per-node=2"
    )
    assert run(arguments, output=output) != 0
    assert "error: -m: a sweep starts the ranks of its jobs itself" in output.read_text()
    assert not list((tmp_path / "sweep").glob("*/checkpoints"))


@pytest.mark.slow
def test_jobs_in_parallel(material, tmp_path):
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nsae:\n  k: 3\n")
    own = [f"hydra.searchpath=[file://{tmp_path / 'own'}]", "experiment=mine"]
    arguments = [*own, *overrides(material, sweep, "experiment", "sae.k"), *JOBLIB, "num_threads=null", "seed=0,1"]
    assert run(command([*arguments, "-m"]), output=output) == 0, output.read_text()
    assert [json.loads((sweep / n / "sae_pair" / "config.json").read_text())["input_sae"]["k"] for n in "01"] == [3, 3]
    assert states(sweep) == ["finished", "finished"]
    began = [read_status(sweep / n).attempts[0] for n in "01"]
    assert max(a.started_at for a in began) < min(a.ended_at for a in began)  # they did run at the same time


# Parts


def test_the_jobs_of_a_sweep_are_listed_in_order():
    config = OmegaConf.create(
        {"hydra": {"sweeper": {"params": {"sae.k": "1,2", "seed": "7"}}, "overrides": {"task": ["seed=0,1", "a=b"]}}}
    )
    jobs = sweeps.list_jobs(config)
    assert jobs == [
        ["sae.k=1", "seed=0", "a=b"],
        ["sae.k=1", "seed=1", "a=b"],
        ["sae.k=2", "seed=0", "a=b"],
        ["sae.k=2", "seed=1", "a=b"],
    ]
    assert sweeps.varying(jobs)[1] == ["sae.k=1", "seed=1"]
    assert sweeps.varying([["a=1"]]) == [["a=1"]]


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 2), 2), ((2, 1), 1), ((-9, 0), 1)])
def test_the_exit_code_of_a_sweep(codes, expected, tmp_path):
    for num, code in enumerate(codes):
        folder = tmp_path / str(num)
        folder.mkdir()
        if code:
            (folder / "console.log").write_text("".join(f"line {n}\n" for n in range(9)))
            add_ended_attempt(folder, pid=1, seconds=61.2, exit_code=code, message="why")
        else:
            with recorded_attempt(folder):
                pass
    text, found = report(tmp_path)
    assert found == expected
    assert f"{codes.count(0)} finished" in text
    assert ("failed after 0:01:01: why" in text) == bool(expected)
    assert ("| line 8" in text and "| line 3" not in text) == bool(set(codes) - {0, 2})


def test_a_job_that_fails_to_use_a_finished_run_is_reported_and_the_run_stays_finished(tmp_path, monkeypatch):
    monkeypatch.setenv(sweeps.SWEEP_FOLDER, str(tmp_path))
    for num in range(2):
        (tmp_path / str(num)).mkdir()
        with recorded_attempt(tmp_path / str(num)):
            pass
    assert report(tmp_path)[1] == 0
    job = sweeps.SweepJob(1, 2, tmp_path / "1", [], [])
    sweeps._note_failure(job, 2, "objective: 'val/los' is not in it")
    text, code = report(tmp_path)
    assert code == 2 and "1 finished, 1 failed" in text and "1: failed after 0:00:00: objective: 'val/los'" in text
    assert states(tmp_path) == ["finished", "finished"]
    (tmp_path / sweeps.FAILURES).write_text("{half")
    assert report(tmp_path)[1] == 0


def test_what_ended_a_process_is_said_in_words(tmp_path):
    console = tmp_path / "console.log"
    assert sweeps.exit_reason(-9, console) == "ended by signal 9: killed, perhaps for want of memory"
    assert sweeps.exit_reason(1, console) == "exit code 1: it printed nothing"
    console.write_text("Traceback\n  ...\nMemoryError: 12 GiB\n\n")
    assert sweeps.exit_reason(1, console) == "exit code 1: MemoryError: 12 GiB"


def test_last_lines_of_a_long_log(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * 100_000 + b"\n\xff\n" + b"last but one\n\nlast")
    assert last_lines(tmp_path / "log", 2) == ["last but one", "last"]
    assert last_lines(tmp_path / "nothing", 2) == []


def test_progress_is_read_from_what_the_job_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jsae_lightning.sweep_progress._SECONDS_BETWEEN_LINES", 0.3)
    console = tmp_path / "console.log"
    console.write_text("[x][INFO] step 7/24  loss 1.2  left 0:00:05\nsomething else\n")
    assert JobProgress("job 3", console).follow(subprocess.Popen(["sleep", "1.5"])) == 0
    assert capsys.readouterr().out == "job 3: step 7/24  loss 1.2  left 0:00:05\n"


def test_an_objective_that_is_no_metric_is_refused(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"val/loss": 1.5, "val/nan": null}')
    assert sweeps.read_objective(path, "val/loss") == 1.5
    assert math.isnan(sweeps.read_objective(path, "val/nan"))
    with pytest.raises(UserError, match="objective: 'loss' is not in .*: choose one of val/loss, val/nan"):
        sweeps.read_objective(path, "loss")


# Devices


@pytest.fixture
def hydra(tmp_path):
    """Hydra's configuration of a job under a launcher of three jobs at a time."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = OmegaConf.create(
        {"hydra": {"launcher": {"n_jobs": 3}, "sweep": {"dir": str(tmp_path)}}}
    )
    yield HydraConfig.instance().cfg.hydra
    HydraConfig.instance().cfg = before


def test_jobs_at_the_same_time_have_devices_of_their_own(hydra, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-5,6,7")
    monkeypatch.setattr(devices, "_SECONDS_BETWEEN_TRIES", 0.01)
    cfg = OmegaConf.create({"trainer": {"devices": 2, "accelerator": "gpu"}})
    with devices.job_environment(cfg) as first:
        assert first == {"CUDA_VISIBLE_DEVICES": "0,3"}
        with devices.job_environment(cfg) as second:
            assert second == {"CUDA_VISIBLE_DEVICES": "GPU-5,6"}
        with devices.job_environment(cfg) as third:  # the first that is free again
            assert third == second
    cfg.trainer.devices = 6
    with (
        pytest.raises(UserError, match="trainer.devices: 6, but this machine shows 5 GPU"),
        devices.job_environment(cfg),
    ):
        pass


def test_jobs_share_the_cores_and_a_job_alone_has_them_all(hydra, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cfg = OmegaConf.create({"trainer": {"devices": 1, "accelerator": "cpu"}})
    with devices.job_environment(cfg) as environment:
        assert environment == {"OMP_NUM_THREADS": "2"}
    hydra.launcher = {}
    with devices.job_environment(cfg) as environment:
        assert environment == {}
