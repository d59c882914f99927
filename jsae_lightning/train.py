"""Train a Jacobian SAE pair.

jsae-train                                                     # the embedded model and text, no network
jsae-train experiment=paper/pythia-70m trainer=gpu             # the paper's recipe
jsae-train experiment=none model=pythia-70m data=pile-neox sae.k=32 jacobian.coef=1
jsae-train -m model.layer=0,1,2 sae.k=16,32                    # a sweep, one process a job
jsae-train ckpt_path=auto hydra.run.dir=DIR                    # go on after a crash, bit for bit
"""

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from jsae_lightning.config import check_architecture, check_config, config_dir, make_paths_absolute, register
from jsae_lightning.help import help_text
from jsae_lightning.lasting_imports import lasting_imports
from jsae_lightning.launch import (
    exit_codes,
    find_checkpoint,
    hydra_record_kept,
    is_recorded,
    record_arguments,
    resumed_arguments,
)
from jsae_lightning.processes import agree_on_start_time, end_with_parent, is_rank_zero, is_restarted
from jsae_lightning.run_status import AttemptRecord, locked_folder, recorded_attempt
from jsae_lightning.slurm import check_tasks, is_submitit_task, noted_end
from jsae_lightning.sweep_report import SweepReport
from jsae_lightning.sweeps import enter_slurm_job, is_sweep_job, run_sweep_job

if TYPE_CHECKING:
    from jsae_lightning.building import Experiment

PROGRAM = "jsae-train"
log = logging.getLogger(__name__)


def main() -> None:
    """Console script `jsae-train`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        with exit_codes(PROGRAM):
            print(help_text(config_dir()), flush=True)
        return
    end_with_parent()
    os.environ.pop("SUBMITIT_EXECUTOR", None)  # of a job that this command is a part of; a task of ours starts in `run`
    with exit_codes(PROGRAM), SweepReport() as sweep:
        agree_on_start_time()
        sys.argv[1:] = resumed_arguments(sys.argv[1:])
        register()
        with hydra_record_kept(sys.argv[1:]):
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(run)()
    sys.exit(sweep.exit_code)


def run(cfg: DictConfig) -> float:
    """Check the configuration, then train here or, as a job of a sweep, in a process of its own."""
    if is_sweep_job():
        return run_sweep_job(cfg)
    warn_about_preset()
    # exit_codes is here, because Hydra would add lines of its own to an error's
    with noted_end(Path(cfg.paths.output_dir)), exit_codes(PROGRAM):
        if is_submitit_task() and (finished := enter_slurm_job(cfg)) is not None:
            return finished
        if is_restarted() and (cfg.ckpt_path is None or find_checkpoint(Path(cfg.paths.output_dir))):
            log.info("started again: going on from the folder's last checkpoint, as with ckpt_path=auto")
            cfg.ckpt_path = "auto"
        make_paths_absolute(cfg)
        check_config(cfg)
        check_tasks(cfg)
        check_architecture(cfg)
        return train(cfg).get(cfg.objective, math.nan)
    return math.nan  # a task of a sweep's job that failed: the sweep goes on, and reports it


def warn_about_preset() -> None:
    """Say so if another model is trained with the default preset, whose settings suit the embedded one."""
    choices = HydraConfig.get().runtime.choices
    preset = str(choices.get("experiment"))
    if preset.startswith(("tiny", "sweep/")) and choices.get("model") != "tiny":
        log.warning(
            "experiment=%s sets tokens, k and learning rate for the embedded model, but model=%s: give "
            "experiment=none for the general settings, or a preset of the model's own",
            preset,
            choices.get("model"),
        )


def train(cfg: DictConfig) -> dict[str, float]:
    """Build, fit, export, report; return the final metrics. Rank 0 holds the folder's lock and notes how it goes."""
    folder = Path(cfg.paths.output_dir)
    if not is_rank_zero():
        return fit(cfg, None)
    with locked_folder(folder), recorded_attempt(folder) as attempt:
        return fit(cfg, attempt)


def fit(cfg: DictConfig, attempt: AttemptRecord | None) -> dict[str, float]:
    """Train, on this rank."""
    with lasting_imports():
        from jsae_lightning.building import build_experiment

    experiment = build_experiment(cfg, on_lost_rank=lambda message: attempt.end(1, message) if attempt else None)
    experiment.before_training(experiment.check_names)
    if attempt is not None:
        note_start(experiment, attempt)
    experiment.announce()
    experiment.fit()
    return finish(experiment)


def note_start(experiment: "Experiment", attempt: AttemptRecord) -> None:
    """Note what the run was started with: at once, or in the folder of a run only when its checkpoint was accepted."""

    def note(*_: Any) -> None:
        record_arguments(experiment.folder)
        attempt.begin()

    if is_recorded(experiment.folder):
        experiment.before_training(note)
    else:
        note()


def finish(experiment: "Experiment") -> dict[str, float]:
    """Write `sae_pair/` and `metrics.json`, print the summary; on rank 0 only."""
    metrics = experiment.metrics()
    if experiment.trainer.is_global_zero:
        experiment.export()
        experiment.report(metrics)
    return metrics


if __name__ == "__main__":
    main()
