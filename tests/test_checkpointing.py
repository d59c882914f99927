"""When the Checkpointing callback saves, and as what."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from callback_runs import StopAt, checkpointing, evaluation, fit
from jsae_lightning.building import Experiment
from jsae_lightning.checkpoint import read_checkpoint


def saved_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which a checkpoint is written, as they come."""
    steps: list[int] = []
    save = Trainer.save_checkpoint

    def note(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        steps.append(trainer.global_step)
        save(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", note)
    return steps


@pytest.mark.parametrize("best_mode", ["min", "max"])
def test_the_end_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_mode: str) -> None:
    steps = saved_steps(monkeypatch)
    fit(tmp_path, [evaluation(2), checkpointing(tmp_path, best_metric="val/loss", best_mode=best_mode)], steps=4)
    # the loss falls: the last evaluation is the best of one mode, the first of the other
    assert steps == [2, 4]
    last = tmp_path / "checkpoints" / "last.ckpt"
    (best,) = last.parent.glob("step_*.ckpt")
    assert best.name == {"min": "step_0000004.ckpt", "max": "step_0000002.ckpt"}[best_mode]
    assert last.samefile(best) == (best_mode == "min")  # two names of one file take the disk once


def test_an_evaluation_after_the_save_of_the_same_step_is_saved_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = saved_steps(monkeypatch)
    fit(tmp_path, [evaluation(2), StopAt(3), checkpointing(tmp_path, every_n_steps=1)], steps=6)
    assert steps == [1, 2, 3, 3]
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert state["callbacks"]["InTrainingEvaluation"] == {"logged_step": 3}


@pytest.mark.parametrize("has_saved", [True, False])
def test_an_interrupted_run_says_whether_there_is_something_to_go_on_from(tmp_path, caplog, has_saved):
    """Lightning ends with SystemExit, without a code for SIGTERM, which would read as success."""

    def interrupted(*_, **__):
        raise SystemExit

    experiment = Experiment.__new__(Experiment)
    experiment.cfg = OmegaConf.create({"paths": {"output_dir": str(tmp_path)}})
    experiment.trainer = SimpleNamespace(fit=interrupted, global_step=7)
    experiment.module = experiment.data = experiment.checkpoint = None
    if has_saved:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(SystemExit) as end:
        experiment.fit()
    assert end.value.code == 128 + signal.SIGTERM
    what = "go on from the last checkpoint" if has_saved else "no checkpoint was saved yet: begin again"
    assert f"interrupted at step 7; {what} with: jsae-train ckpt_path=auto hydra.run.dir=" in caplog.text
