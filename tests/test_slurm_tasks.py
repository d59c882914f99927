"""What runs on Slurm is checked before it runs; no Slurm is needed here."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from jsae_lightning import slurm
from jsae_lightning.config import config_dir, register
from jsae_lightning.errors import RunError, UserError
from jsae_lightning.launch import exit_codes
from jsae_lightning.processes import rank_suffix
from jsae_lightning.run_status import read_status
from jsae_lightning.slurm import check_tasks, noted_end
from running import command, environment


def _compose(*overrides: str, hydra: bool = False):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=hydra)


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_")) or name == "RANK"]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("launcher", "nodes", "tasks", "gpus"),
    [("slurm_cpu", 1, 1, None), ("slurm_gpu", 1, 1, 1), ("slurm_multi_gpu", 1, 4, 4), ("slurm_multi_node", 2, 4, 4)],
)
def test_launchers_ask_for_what_the_trainer_uses(launcher, nodes, tasks, gpus):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    trainer = ["trainer=slurm", f"trainer.num_nodes={nodes}", f"trainer.devices={tasks}"]
    found = _compose(f"hydra/launcher={launcher}", *trainer, hydra=True).hydra.launcher
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node) == (nodes, tasks, gpus)
    assert found.max_num_timeout > 0 and found.additional_parameters.requeue


def test_trainer_slurm_leaves_requeueing_to_others(monkeypatch, tmp_path):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from jsae_lightning.building import build_trainer
    from jsae_lightning.callbacks.checkpointing import AtomicCheckpointIO

    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    trainer = build_trainer(_compose("trainer=slurm", "trainer.accelerator=cpu", f"paths.output_dir={tmp_path}"))
    found = trainer._accelerator_connector.cluster_environment
    assert isinstance(found, SLURMEnvironment) and not found.auto_requeue
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_number_of_tasks_is_compared_with_the_trainer(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    check_tasks(_compose("trainer=slurm", "trainer.num_nodes=2", "trainer.devices=2"))
    with pytest.raises(UserError, match="trainer.devices: 1 on trainer.num_nodes=2, but Slurm started 4 tasks"):
        check_tasks(_compose("trainer=slurm", "trainer.num_nodes=2"))
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    check_tasks(_compose())


def test_trainer_slurm_outside_slurm_is_refused():
    with pytest.raises(UserError, match="trainer=slurm: this process is no task of Slurm's"):
        check_tasks(_compose("trainer=slurm"))
    check_tasks(_compose("trainer=ddp"))


@pytest.mark.parametrize(
    ("variables", "suffix"),
    [
        ({}, ""),
        ({"SLURM_PROCID": "0"}, ""),
        ({"SLURM_PROCID": "3"}, "_rank3"),
        ({"RANK": "1", "SLURM_PROCID": "0"}, "_rank1"),
        ({"RANK": "0", "SLURM_PROCID": "1"}, ""),
    ],
)
def test_each_rank_has_its_own_log(monkeypatch, variables, suffix):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_suffix() == suffix
    assert "${rank_suffix:}" in (config_dir() / "hydra" / "default.yaml").read_text()


@pytest.mark.parametrize(("error", "code"), [(UserError("a mistake"), 2), (RunError("a mishap"), 1)])
def test_failed_task_returns_and_then_ends_with_its_code(error, code, monkeypatch, tmp_path, capsys):
    """submitit gets its result from a task that returns; the exit code follows when Python ends."""
    registered: list = []
    monkeypatch.setattr("atexit.register", lambda *call: registered.append(call))
    with pytest.raises(SystemExit), noted_end(tmp_path), exit_codes("jsae-train"):
        raise error
    assert not registered and read_status(tmp_path) is None
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with noted_end(tmp_path), exit_codes("jsae-train"):
        raise error
    (call,) = registered
    assert call[1] == code
    status = read_status(tmp_path)
    assert status.status == "failed" and (status.attempts[0].exit_code, status.attempts[0].message) == (
        code,
        str(error),
    )


def test_requeued_task_gives_no_result(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(SystemExit), noted_end(tmp_path), exit_codes("jsae-train"):
        sys.exit(-1)  # what submitit does after it has requeued the job
    assert read_status(tmp_path) is None


def test_missing_launcher_plugin_is_one_line_with_the_remedy(tmp_path):
    hidden = "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None; "
    code = hidden + "from jsae_lightning.train import main; main()"
    arguments = ["-m", "hydra/launcher=slurm_gpu", "sae.k=8,16", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    line = [command([])[0], "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "jsae-train: error: hydra/launcher: needs the launcher's plugin: pip install -c constraints.txt -e '.[slurm]'"
    )
    assert not Path(tmp_path / "sweep").exists()


def test_every_key_of_the_launchers_has_a_comment():
    for path in [*(config_dir() / "hydra" / "launcher").glob("*.yaml"), config_dir() / "trainer" / "slurm.yaml"]:
        for line in path.read_text().splitlines():
            if ":" in line and not line.startswith(("#", "defaults:", "plugins:")) and "_target_" not in line:
                assert "#" in line or line.endswith("additional_parameters:"), f"{path}: {line}"


def test_an_error_of_a_lost_job_never_takes_the_place_of_its_result(tmp_path):
    result = tmp_path / "7_0_result.pkl"
    slurm._write_error(result, "7")
    assert pickle.loads(result.read_bytes()) == ("error", "job 7 left Slurm's queue without a result")
    result.write_bytes(b"the real one")
    slurm._write_error(result, "7")
    assert result.read_bytes() == b"the real one"
    assert [path.name for path in tmp_path.iterdir()] == ["7_0_result.pkl"]
