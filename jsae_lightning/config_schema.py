"""The shape of the configuration: what keys there are and of which type.

Hydra merges the YAML groups and the command line into these classes, so an unknown key or a wrong type fails while
composing, with the file and key in the message. Values and their units stand in `conf/`; nothing has a default here.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from jsae_lightning.errors import UserError
from jsae_lightning.synthetic.spec import SyntheticSpec


@dataclass
class ModelConfig:
    """The frozen language model: `conf/model/base.yaml`."""

    name: str | None = MISSING
    path: str | None = MISSING
    revision: str | None = MISSING
    layer: int = MISSING
    dtype: str = MISSING
    random_weights: Any = MISSING
    random_seed: int = MISSING
    synthetic: SyntheticSpec | None = MISSING


@dataclass
class DataConfig:
    """Token sources and the activation buffer: `conf/data/base.yaml`."""

    source: str = MISSING
    path: str | None = MISSING
    name: str | None = MISSING
    config_name: str | None = MISSING
    revision: str | None = MISSING
    train_split: str = MISSING
    val_split: str | None = MISSING
    streaming: bool = MISSING
    stream_retries: int = MISSING
    stream_timeout_s: float = MISSING
    text_column: str | None = MISSING
    token_column: str | None = MISSING
    document_separator: str | None = MISSING
    context_length: int | None = MISSING
    bos: str = MISSING
    exclude_first_position: bool = MISSING
    exclude_special_tokens: bool = MISSING
    train_tokens: int | float = MISSING  # 2e6 is welcome
    batch_tokens: int = MISSING
    buffer_batches: int = MISSING
    num_shards: int | None = MISSING
    lm_batch_sequences: int = MISSING
    prefetch: Any = MISSING
    val_sequences: int = MISSING
    val_fraction: float = MISSING
    repeat: bool = MISSING
    cache_dir: str | None = MISSING
    cache_dtype: str = MISSING


@dataclass
class SAEConfig:
    """The two sparse autoencoders: `conf/sae/default.yaml`."""

    expansion_factor: float = MISSING
    d_sae: int | None = MISSING
    d_sae_output: int | None = MISSING
    k: int = MISSING
    k_output: int | None = MISSING
    subtract_b_dec: bool = MISSING
    mse_output_coef: float = MISSING
    auxk_coef: float = MISSING
    auxk_k: int | None = MISSING
    dead_after_tokens: int = MISSING


@dataclass
class JacobianConfig:
    """The penalty on the Jacobian: `conf/jacobian/`."""

    penalty: str = MISSING
    params: dict[str, Any] = MISSING
    coef: Any = MISSING
    coef_scale: float = MISSING
    at: str = MISSING
    edges: str = MISSING
    token_fraction: float = MISSING
    warmup_fraction: float = MISSING
    decay_fraction: float = MISSING


@dataclass
class OptimConfig:
    """Adam and its schedule: `conf/optim/default.yaml`."""

    lr: float = MISSING
    betas: list[float] = MISSING
    warmup_fraction: float = MISSING
    decay_fraction: float = MISSING
    grad_clip: float | None = MISSING


@dataclass
class EvalConfig:
    """Evaluation during and after training: `conf/eval/default.yaml`."""

    every_n_steps: int | None = MISSING
    batch_sequences: int = MISSING
    num_sequences: int | None = MISSING
    jacobian_tokens: int | None = MISSING
    exclude_first_position: bool = MISSING


@dataclass
class CheckpointConfig:
    """What is saved, and when: `conf/checkpoint/default.yaml`."""

    every_minutes: float | None = MISSING
    every_n_steps: int | None = MISSING
    best_metric: str | None = MISSING
    best_mode: str = MISSING


@dataclass
class SweepConfig:
    """Sweeps (`-m`): `conf/sweep/default.yaml`."""

    resume: bool = MISSING


@dataclass
class PathsConfig:
    """Folders: `conf/paths/default.yaml`."""

    log_dir: str = MISSING
    output_dir: str = MISSING


@dataclass
class RootConfig:
    """The whole configuration: `conf/train.yaml`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    jacobian: JacobianConfig = field(default_factory=JacobianConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    seed: int = MISSING
    kernels: str = MISSING
    num_threads: int | None = MISSING
    ckpt_path: str | None = MISSING
    objective: str = MISSING


def make_data_config(data: dict[str, Any]) -> DataConfig:
    """Turn a plain dict into a `DataConfig`; UserError for keys that are unknown or missing."""
    known = [entry.name for entry in fields(DataConfig)]
    for key in data:
        if key not in known:
            raise UserError(f"data.{key}: there is no such key: correct it; the keys are {', '.join(known)}")
    missing = [key for key in known if key not in data]
    if missing:
        raise UserError(f"data.{missing[0]}: is missing: give it (conf/data/base.yaml has every key with its default)")
    return DataConfig(**data)
