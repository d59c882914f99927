"""Turn a checked configuration into an experiment: data module, LightningModule, trainer."""

import logging
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from jsae_lightning import kernels
from jsae_lightning.architecture import read_architecture
from jsae_lightning.atomic_files import remove_leftovers
from jsae_lightning.callbacks.checkpointing import AtomicCheckpointIO
from jsae_lightning.callbacks.memory import MemoryEstimate
from jsae_lightning.checkpoint import read_checkpoint, save_pair
from jsae_lightning.config import build, jacobian_coef, model_arguments, sae_widths, to_dict
from jsae_lightning.data import ActivationDataModule
from jsae_lightning.errors import UserError
from jsae_lightning.launch import command_to_go_on, find_checkpoint
from jsae_lightning.module import JSAEModule
from jsae_lightning.rank_watch import RankWatch
from jsae_lightning.summary import check_names, final_metrics, print_summary, write_metrics_json
from jsae_lightning.versions import package_versions

log = logging.getLogger(__name__)

RESULTS = ("sae_pair", "metrics.json")
"""What a run leaves in its folder at its end."""


@dataclass
class Experiment:
    """Everything that one run needs, built and checked."""

    cfg: DictConfig
    data: ActivationDataModule
    module: JSAEModule
    trainer: lightning.Trainer
    checkpoint: Path | None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.cfg.paths.output_dir)

    def announce(self) -> None:
        """Log what is about to happen and record the configuration with the loggers."""
        log.info("run folder: %s", self.folder)
        is_new = find_checkpoint(self.folder) is None
        for logger in self.trainer.loggers:
            if is_new and hasattr(logger, "truncate_after"):
                logger.truncate_after(-1)  # of an attempt before the first checkpoint, maybe with other settings
            if hasattr(logger, "log_config"):
                logger.log_config(OmegaConf.to_yaml(self.cfg, resolve=True))
            logger.log_hyperparams(
                flatten({key: to_dict(self.cfg[key]) for key in ("model", "data", "sae", "jacobian", "optim")})
            )

    def before_training(self, action: Callable[..., None]) -> None:
        """Call `action` when the checkpoint, if there is one, was accepted, and there are steps left to be made."""
        self.trainer.callbacks.append(LambdaCallback(on_train_start=action))  # type: ignore[attr-defined]

    def check_names(self, *_: Any) -> None:
        """Raise UserError if a figure that runs or checkpoints shall be chosen by will not exist."""
        check_names(self.trainer, self.cfg.objective, self.cfg.checkpoint.best_metric)

    def fit(self) -> None:
        """Train, from the checkpoint if there is one."""
        try:
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=self.checkpoint)
        except SystemExit as error:  # how Lightning ends after Ctrl-C and SIGTERM
            has_saved = find_checkpoint(self.folder) is not None
            what_now = "go on from the last checkpoint" if has_saved else "no checkpoint was saved yet: begin again"
            log.warning(
                "interrupted at step %d; %s with: %s",
                *(self.trainer.global_step, what_now, command_to_go_on(self.folder)),
            )
            if error.code is None:  # Lightning's for SIGTERM, which would read as success
                raise SystemExit(128 + signal.SIGTERM) from error
            raise

    def metrics(self) -> dict[str, float]:
        """Return the final figures of the run."""
        return final_metrics(self.trainer)

    def export(self) -> None:
        """Write the pair to `sae_pair/`."""
        for name in RESULTS:  # not those of an evaluation of the run, which may be going on
            remove_leftovers(self.folder, name)
        save_pair(self.module.pair, self.folder / "sae_pair", metadata=self._metadata())

    def report(self, metrics: dict[str, float]) -> None:
        """Write `metrics.json` and print the summary table."""
        write_metrics_json(self.folder / "metrics.json", metrics)
        print_summary(metrics, self.folder)

    def _metadata(self) -> dict[str, Any]:
        assert self.module.mlp is not None
        model = self.cfg.model
        return {
            "model": {
                "name": model.path or model.name,
                "revision": model.revision,
                "layer": model.layer,
                "dtype": model.dtype,
                "random_weights": model.random_weights,
                "random_seed": model.random_seed,
                "synthetic": to_dict(model)["synthetic"],
                "mlp_kind": self.module.mlp.kind,
                "activation": self.module.mlp.activation,
                "mlp_hash": self.module.mlp.weights_hash(),
            },
            "jacobian": dict(self.module.hparams["jacobian"]),
            "recipe": {
                **{f"optim.{key}": value for key, value in flatten(to_dict(self.cfg.optim)).items()},
                **{f"sae.{key}": self.cfg.sae[key] for key in ("mse_output_coef", "auxk_coef", "auxk_k")},
            },
            "data": to_dict(self.cfg.data),
            "evaluation": {"exclude_first_position": self.cfg.eval.exclude_first_position},
            "tokens_seen": int(self.module.tokens_seen),
            "seed": self.cfg.seed,
            "versions": package_versions(),
        }


def build_experiment(cfg: DictConfig, *, on_lost_rank: Callable[[str], None] = lambda message: None) -> Experiment:
    """Build data module, LightningModule and trainer; raise UserError for what only the model's config can tell.

    `on_lost_rank` is called with a message before this process is ended because another rank is gone.
    """
    quiet_libraries()
    architecture = read_architecture(
        cfg.model.path or cfg.model.name, revision=cfg.model.revision, synthetic=to_dict(cfg.model)["synthetic"]
    )
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    kernels.select_kernels(cfg.kernels)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    trainer = build_trainer(cfg, RankWatch(on_lost_rank, cfg.paths.output_dir), build_memory_estimate(cfg))
    module = build_module(cfg, architecture.d_model)
    checkpoint = choose_checkpoint(cfg)
    if checkpoint is not None:
        step = check_checkpoint(checkpoint, module)
        done = ", which is complete: nothing is left to train" if step >= cfg.trainer.max_steps else ""
        log.info("going on from step %d of %s%s", step, checkpoint, done)
    elif cfg.ckpt_path == "auto":
        log.warning("ckpt_path=auto: there is no checkpoint in %s: starting at step 0", cfg.paths.output_dir)
    return Experiment(cfg, build_data(cfg), module, trainer, checkpoint)


def quiet_libraries() -> None:
    """Leave out what Lightning says of every run (devices found, advertisements, its own deprecations)."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()  # Hydra's root logger prints and files what is left
    for message in (".*LeafSpec.*", ".*broadcast_buffers.*", ".*`srun` command is available.*"):
        warnings.filterwarnings("ignore", message=message)


def build_data(cfg: DictConfig) -> ActivationDataModule:
    """Build the data module; it loads the language model in its `setup`."""
    data = to_dict(cfg.data)
    return ActivationDataModule(
        model=model_arguments(cfg),
        data=data | {"train_tokens": int(data["train_tokens"])},
        seed=cfg.seed,
        num_batches=cfg.trainer.max_steps,
        micro_batches=cfg.trainer.accumulate_grad_batches,
    )


def build_module(cfg: DictConfig, d_model: int) -> JSAEModule:
    """Build the LightningModule with plain values only."""
    sae, jacobian = to_dict(cfg.sae), to_dict(cfg.jacobian)
    sae["d_sae"], sae["d_sae_output"] = sae_widths(cfg, d_model)
    sae["k_output"] = sae["k_output"] or sae["k"]
    jacobian["coef"] = jacobian_coef(cfg, d_model)
    del jacobian["coef_scale"]  # is in coef
    return JSAEModule(
        d_model=d_model,
        sae=sae,
        jacobian=jacobian,
        optim=to_dict(cfg.optim),
        total_steps=cfg.trainer.max_steps,
        seed=cfg.seed,
    )


def build_trainer(cfg: DictConfig, *more_callbacks: lightning.Callback) -> lightning.Trainer:
    """Build the trainer with the named callbacks and loggers of the configuration, and `more_callbacks` after them."""
    callbacks = [build(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node is not None]
    loggers = [build(node, f"logger.{name}") for name, node in cfg.logger.items() if node is not None]
    plugins = [build(node, "trainer.plugins") for node in cfg.trainer.get("plugins") or []]
    accelerator = cfg.trainer.accelerator
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator: {accelerator}, but torch sees no CUDA device: use trainer=cpu")
    if accelerator == "auto":  # Lightning's own choice may be one without float64, in which sums are kept
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    return build(
        cfg.trainer,
        "trainer",
        accelerator=accelerator,
        callbacks=[*callbacks, *more_callbacks],
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *plugins],
        default_root_dir=cfg.paths.output_dir,
    )


def build_memory_estimate(cfg: DictConfig) -> MemoryEstimate:
    """Build the callback that says how much memory training will take."""
    return MemoryEstimate(
        batch_tokens=cfg.data.batch_tokens,
        lm_batch_sequences=cfg.data.lm_batch_sequences,
        evaluation_sequences=cfg.eval.batch_sequences if cfg.callbacks.get("evaluation") else 0,
    )


def choose_checkpoint(cfg: DictConfig) -> Path | None:
    """Return the checkpoint that `ckpt_path` stands for."""
    folder = Path(cfg.paths.output_dir)
    found = find_checkpoint(folder)
    if found is None and (results := next((n for n in RESULTS if (folder / n).exists()), None)):
        raise UserError(
            f"hydra.run.dir: {folder} holds {results} of a run, but no checkpoint that could be gone on from: choose "
            "another folder, or move this one away"
        )
    if cfg.ckpt_path == "auto":
        return found
    if found is not None and Path(cfg.ckpt_path or "") != found:
        raise UserError(
            f"hydra.run.dir: {cfg.paths.output_dir} holds a run already: go on with it by ckpt_path=auto, "
            "or choose another"
        )
    return None if cfg.ckpt_path is None else Path(cfg.ckpt_path)


def check_checkpoint(path: Path, module: JSAEModule) -> int:
    """Refuse a checkpoint of another shape or recipe, naming the first key that differs; return its step."""
    checkpoint = read_checkpoint(path)
    found = flatten(dict(checkpoint.get("hyper_parameters", {})))
    for key, value in flatten(dict(module.hparams)).items():
        if key not in found:
            raise UserError(f"{path}: {key} is missing: this is no checkpoint of jsae-train")
        if found[key] != value:
            raise UserError(
                f"{path}: was made with {key}={found[key]}, this run has {value}: repeat the run's own overrides"
            )
    return int(checkpoint["global_step"])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys and primitive values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, int | float | str | bool) or value is None else str(value)
            )
    return flat
