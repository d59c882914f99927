"""On a real Slurm of two nodes: sweeps, two-node runs, preemption, cancelling, the sbatch script."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from comparing import assert_same_run, checkpoint, rows
from jsae_lightning.config import config_dir
from running import TIME_LIMIT, command, environment, toy_overrides, train, write_documents
from slurm_cluster import cluster_or_skip, wait_until
from tiny_models import make_model_dir

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

LAUNCHER = ["-m", "hydra/launcher=slurm_cpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null"]
LONG = ["data.train_tokens=12800", "checkpoint.every_n_steps=25", "eval.every_n_steps=100"]  # 200 steps
SHORT = ["data.train_tokens=128"]
TWO_NODES = ["trainer=slurm", "trainer.num_nodes=2", "trainer.accelerator=cpu"]
ADDRESS = {"MASTER_ADDR": "127.0.0.1"}  # no name server knows n1


@pytest.fixture(scope="module")
def cluster():
    yield from cluster_or_skip()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
    """One process, outside Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code = train([*toy_overrides(*material, folder / "run"), *LONG], output=folder / "output")
    assert code == 0, (folder / "output").read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def two_nodes(material, cluster, tmp_path_factory):
    """One task on each of two nodes, through the launcher."""
    folder = tmp_path_factory.mktemp("two_nodes")
    code, text = sweep(cluster, folder, material, *LONG, *TWO_NODES)
    assert code == 0, text
    return folder / "0"


@contextmanager
def started_sweep(cluster, folder: Path, material, *arguments: str):
    """`jsae-train -m` through the launcher; its output goes to `folder`/output."""
    overrides = [o for o in toy_overrides(*material, folder) if not o.startswith(("hydra.run.dir", "trainer.acc"))]
    line = command([*LAUNCHER, *overrides, "trainer.accelerator=cpu", *arguments, f"hydra.sweep.dir={folder}"])
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, env=environment(**cluster.environment, **ADDRESS)
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def sweep(cluster, folder: Path, material, *arguments: str) -> tuple[int, str]:
    """Run a sweep to its end; return its exit code and its output with that of its tasks."""
    with started_sweep(cluster, folder, material, *arguments) as process:
        code = process.wait(TIME_LIMIT)
    return code, everything_printed(folder)


def everything_printed(folder: Path) -> str:
    logs = [folder / "output", *sorted(folder.glob(".submitit/*/*.out"))]
    return "\n".join(f"{path}:\n{path.read_text()}" for path in logs)


def first_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the run has saved something."""
    wait_until(
        lambda: (folder / "checkpoints" / "last.ckpt").exists() or process.poll() is not None, "a checkpoint", 90
    )


def attempts(run: Path) -> list[dict]:
    return json.loads((run / "status.json").read_text())["attempts"]


def test_a_sweep_runs_as_jobs_of_slurm(material, cluster, tmp_path):
    code, text = sweep(cluster, tmp_path, material, *SHORT, "jacobian.coef=0,0.5,1")
    assert code == 0, text
    assert "3 finished" in text
    for job, coef in enumerate((0, 0.5, 1)):
        assert (tmp_path / str(job) / "sae_pair" / "model.safetensors").is_file()
        assert f"jacobian.coef={coef}" in json.loads((tmp_path / str(job) / "arguments.json").read_text())["overrides"]
        assert len({attempt["slurm_job_id"] for attempt in attempts(tmp_path / str(job))} - {None}) == 1


def test_a_failing_job_stops_no_other_and_is_reported(material, cluster, tmp_path):
    code, text = sweep(cluster, tmp_path, material, *SHORT, "sae.k=999,4")
    assert code == 2, text
    report = (tmp_path / "output").read_text()
    assert "1 finished, 1 failed" in report and "sae.k: 999 is more than" in report
    (log,) = tmp_path.glob(".submitit/*/*_0_0_log.out")  # ARRAY_JOB_TASK
    assert "jsae-train: error: sae.k: 999" in log.read_text() and "Traceback" not in log.read_text()
    job = log.name.removesuffix("_0_log.out")
    cluster.wait_for(job, "FAILED")
    assert cluster.field(job, "ExitCode") == "2:0"
    assert (tmp_path / "1" / "metrics.json").is_file()
    code, text = sweep(cluster, tmp_path, material, *SHORT, "sae.k=999,4", "sweep.resume=true")
    assert code == 2 and len(attempts(tmp_path / "1")) == 1, text


def test_two_nodes_equal_one_process(undisturbed, two_nodes):
    ours, theirs = checkpoint(two_nodes)["state_dict"], checkpoint(undisturbed)["state_dict"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].double() - tensor.double()).abs().max() < 1e-6, name
    assert len(rows(two_nodes)) == len(rows(undisturbed)) == 200
    assert "step 200/200" in (two_nodes / "train.log").read_text()
    assert "step" not in (two_nodes / "train_rank1.log").read_text()


def test_a_preempted_job_goes_on_in_its_folder(material, undisturbed, cluster, tmp_path):
    with started_sweep(cluster, tmp_path, material, *LONG) as process:
        first_checkpoint(tmp_path / "0", process)
        (job,) = cluster.jobs()
        cluster.command("scancel", "--signal=USR2", job)
        code = process.wait(TIME_LIMIT)
    assert code == 0, everything_printed(tmp_path)
    assert cluster.field(job, "Restarts") == "1"
    assert len(_lines(tmp_path / "0", "going on from step")) == 1
    assert [attempt["slurm_job_id"] for attempt in attempts(tmp_path / "0")] == [job, job]
    assert_same_run(tmp_path / "0", undisturbed)


def test_a_cancelled_job_can_be_resumed_anywhere(material, undisturbed, cluster, tmp_path):
    run, output = tmp_path / "0", tmp_path / "output"
    with started_sweep(cluster, tmp_path, material, *LONG) as process:
        first_checkpoint(run, process)
        (job,) = cluster.jobs()
        cluster.command("scancel", job)
        cluster.wait_for(job, "CANCELLED")
        assert process.wait(TIME_LIMIT) == 1  # though no accounting of this Slurm tells the launcher
    assert "1 failed" in output.read_text() and "sweep.resume=true" in output.read_text()
    assert attempts(run)[-1]["exit_code"] != 0 and not (run / "metrics.json").exists()
    assert train(["ckpt_path=auto", f"hydra.run.dir={run}"], output=output) == 0, output.read_text()
    assert_same_run(run, undisturbed)


def test_sbatch_script_goes_on_after_every_requeue(material, two_nodes, cluster, tmp_path):
    """Told of its time limit once, requeued by hand once: a run on two nodes equals the one that was left alone."""
    options = ["--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", f"--chdir={tmp_path}"]
    script = str(config_dir() / "slurm" / "train.sbatch")
    overrides = [o for o in toy_overrides(*material, tmp_path) if not o.startswith("hydra.run.dir")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sbatch", *options, script, *overrides, *LONG],
        env=environment(**cluster.environment, **ADDRESS, PATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    run, printed = tmp_path / "logs" / "runs" / f"slurm_{job}", tmp_path / f"slurm-{job}.out"
    for restart, requeue in enumerate((["scancel", "--batch", "--signal=USR1", job], ["scontrol", "requeue", job])):
        wait_until(lambda: (run / "status.json").exists() and len(attempts(run)) > restart, f"a start: {printed}", 60)  # noqa: B023
        saved = _saved_at(run)
        wait_until(lambda: _saved_at(run) > saved, f"a checkpoint of attempt {restart}: {printed}", 60)  # noqa: B023
        cluster.command(*requeue)
        wait_until(lambda: cluster.field(job, "Restarts") == str(restart + 1), "the requeue", 30)  # noqa: B023
    cluster.wait_for(job, "COMPLETED", "FAILED")
    assert cluster.field(job, "JobState") == "COMPLETED", printed.read_text()
    steps = [int(line.split("from step ")[1].split()[0]) for line in _lines(run, "going on from step")]
    assert len(attempts(run)) == 3 and len(steps) == 2 and 0 < steps[0] < steps[1] < 200
    assert_same_run(run, two_nodes)


def _saved_at(run: Path) -> int:
    path = run / "checkpoints" / "last.ckpt"
    return path.stat().st_mtime_ns if path.exists() else 0


def _lines(run: Path, part: str) -> list[str]:
    return [line for line in (run / "train.log").read_text().splitlines() if part in line]
