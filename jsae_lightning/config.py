"""Configuration: search path, resolvers, rules between keys, and the only caller of `hydra.utils.instantiate`.

Imports neither torch nor lightning, so that `--help` and mistakes in the configuration answer at once.
"""

import ast
import hashlib
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from jsae_lightning.config_schema import RootConfig
from jsae_lightning.errors import UserError
from jsae_lightning.processes import rank_suffix, start_time
from jsae_lightning.sharding import choose_num_shards
from jsae_lightning.suggestions import check_keys
from jsae_lightning.synthetic import NAME as SYNTHETIC
from jsae_lightning.synthetic.spec import make_spec

PACKAGE_DIR = Path(__file__).resolve().parent
SOURCES = ("stdlib", "text", "jsonl", "parquet", "arrow", "hub")
PENALTIES = (
    "l1", "l1_over_l2_batch", "l1_over_l2_token", "log", "l04", "exp", "tanh", "scad", "capped_l1", "kurtosis",
    "hoyer", "l1_rows_l05", "hoyer_rows", "hoyer_token_rows", "hoyer_l1", "l1_scaled",
)  # fmt: skip
_CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.random_weights": (True, False, "full"),
    "data.source": (*SOURCES, SYNTHETIC),
    "data.bos": ("auto", "never", "document", "sequence"),
    "data.cache_dtype": ("float32", "bfloat16"),
    "data.prefetch": ("auto", True, False),
    "jacobian.penalty": PENALTIES,
    "jacobian.at": ("input", "reconstruction"),
    "jacobian.edges": ("jacobian", "contribution"),
    "checkpoint.best_mode": ("min", "max"),
    "kernels": ("auto", "reference", "cpu", "triton"),
}
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "32", "64")
PATHS = ("model.path", "data.path", "data.cache_dir")
"""Keys whose values are paths of what a run reads or shares."""
_POSITIVE = (
    "data.train_tokens", "data.batch_tokens", "data.buffer_batches", "data.num_shards", "data.lm_batch_sequences",
    "data.val_sequences", "data.context_length", "data.stream_timeout_s", "sae.expansion_factor", "sae.d_sae",
    "sae.d_sae_output", "sae.k",
    "sae.k_output", "sae.auxk_k", "sae.dead_after_tokens", "optim.lr", "optim.grad_clip", "eval.every_n_steps",
    "eval.batch_sequences", "eval.num_sequences", "eval.jacobian_tokens", "checkpoint.every_minutes",
    "checkpoint.every_n_steps", "num_threads", "trainer.accumulate_grad_batches", "trainer.log_every_n_steps",
)  # fmt: skip
_DATA_KEYS_OF_OTHERS = {  # what each kind of source does not read
    "stdlib": ("path", "name", "config_name", "revision", "streaming", "text_column", "token_column", "train_split"),
    "text": ("name", "config_name", "revision", "text_column", "token_column", "train_split"),
    "files": ("name", "config_name", "revision"),
    "hub": ("path",),
}
_UNREAD = {"train_split": "train"}
"""Defaults, other than null and false, of keys of `data` that not every source reads."""
_SHARES = (
    "jacobian.warmup_fraction",
    "jacobian.decay_fraction",
    "optim.warmup_fraction",
    "optim.decay_fraction",
    "data.val_fraction",
)
_NOT_NEGATIVE = ("model.layer", "jacobian.coef_scale", "data.stream_retries", "sae.mse_output_coef", "sae.auxk_coef")


def config_dir() -> Path:
    """Return `conf/`: inside an installed package, beside it in a checkout."""
    installed = PACKAGE_DIR / "conf"
    return installed if installed.is_dir() else PACKAGE_DIR.parent / "conf"


def num_steps(train_tokens: int | float, batch_tokens: int) -> int:
    """Return the optimizer steps that see at least `train_tokens` tokens: ceil(train_tokens / batch_tokens)."""
    return math.ceil(train_tokens / max(1, batch_tokens))


def register() -> None:
    """Register the schema and the resolvers with Hydra; may be called again."""
    ConfigStore.instance().store(name="root_schema", node=RootConfig)
    OmegaConf.register_new_resolver("num_steps", num_steps, replace=True)
    OmegaConf.register_new_resolver("start_time", start_time, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("rank_suffix", rank_suffix, replace=True)
    OmegaConf.register_new_resolver("short_hash", _short_hash, replace=True)


def _short_hash(text: str) -> str:
    """A name for a folder that is the same whenever its run goes on."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_config(cfg: DictConfig) -> None:
    """Check every rule that needs no model; raise UserError with the key, the value found and the remedy."""
    check_keys(cfg)
    for section in ("model", "data", "sae", "jacobian", "optim", "eval", "checkpoint"):
        for key in cfg[section]:
            if OmegaConf.is_missing(cfg[section], key):
                raise UserError(f"{section}.{key}: has no value and no default: give {section}.{key}=...")
    check_values(cfg, _CHOICES, _POSITIVE)
    if len(cfg.optim.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optim.betas):
        raise UserError(f"optim.betas: {list(cfg.optim.betas)} are not two numbers from 0 to 1: give [0.9, 0.999]")
    for key in _SHARES:
        if not 0 <= (value := OmegaConf.select(cfg, key)) <= 1:
            raise UserError(f"{key}: {value} is not a share: give a number from 0 to 1")
    for key in _NOT_NEGATIVE:
        if OmegaConf.select(cfg, key) < 0:
            raise UserError(f"{key}: {OmegaConf.select(cfg, key)} is negative: give 0 or more")
    _check_model(cfg)
    check_data(cfg)
    _check_training(cfg)
    for key in ("trainer", "callbacks", "logger"):
        for node_key, node in _target_nodes(cfg[key], key):
            _check_constructor(node_key, node)


def make_paths_absolute(cfg: DictConfig) -> None:
    """Replace the paths of model, data and cache, which records and exports keep, by ones that hold in any folder."""
    for key in PATHS:
        if (value := OmegaConf.select(cfg, key)) is not None:
            OmegaConf.update(cfg, key, absolute(value))
    if cfg.data.name is not None and Path(cfg.data.name).is_dir():
        cfg.data.name = absolute(cfg.data.name)


def absolute(path: str) -> str:
    """Return a path (or a pattern of several) from the root, `~` replaced by the user's home."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - links stay as they are named


def choices(*starts: str) -> dict[str, tuple[Any, ...]]:
    """Return the keys that start with one of these, and that have one of some values, with these values."""
    return {key: allowed for key, allowed in _CHOICES.items() if key.startswith(starts)}


def check_values(cfg: DictConfig, allowed_values: dict[str, tuple[Any, ...]], positive: Iterable[str]) -> None:
    """Check keys that have one of some values, and keys that are a number above zero or null."""
    for key, allowed in allowed_values.items():
        if (value := OmegaConf.select(cfg, key)) not in allowed:
            raise UserError(f"{key}: '{value}' is not known: choose one of {', '.join(map(str, allowed))}")
    for key in positive:
        value = OmegaConf.select(cfg, key)
        if value is not None and not (_is_number(value) and value > 0):
            raise UserError(f"{key}: '{value}' is not above zero: give a positive number")


def check_architecture(cfg: DictConfig) -> None:
    """Check layer, context and widths against the language model's shape, read from its config.json alone."""
    from jsae_lightning.architecture import read_architecture

    architecture = read_architecture(
        cfg.model.path or cfg.model.name, revision=cfg.model.revision, synthetic=to_dict(cfg.model)["synthetic"]
    )
    if cfg.model.layer >= architecture.num_layers:
        raise UserError(
            f"model.layer: {cfg.model.layer} is out of range: the model has {architecture.num_layers} layers, "
            f"give 0 to {architecture.num_layers - 1}"
        )
    if (cfg.data.context_length or 0) > architecture.context_length:
        raise UserError(
            f"data.context_length: {cfg.data.context_length} is more than the model's {architecture.context_length}: "
            "lower it"
        )
    check_widths(cfg, architecture.d_model)


def check_widths(cfg: DictConfig, d_model: int) -> None:
    """Check k against the width of each SAE, which depends on the language model's d_model."""
    d_sae, d_sae_output = sae_widths(cfg, d_model)
    for name, k, width in (("k", cfg.sae.k, d_sae), ("k_output", cfg.sae.k_output or cfg.sae.k, d_sae_output)):
        if k > width:
            raise UserError(f"sae.{name}: {k} is more than the {width} latents of the SAE: lower it or raise sae.d_sae")


def sae_widths(cfg: DictConfig, d_model: int) -> tuple[int, int]:
    """Return the number of latents of the input and of the output SAE."""
    d_sae = cfg.sae.d_sae or round(cfg.sae.expansion_factor * d_model)
    return d_sae, cfg.sae.d_sae_output or d_sae


def jacobian_coef(cfg: DictConfig, d_model: int) -> float:
    """Return the final weight of the penalty; `auto` is the paper's 0.5 k^2 / d_model."""
    coef = cfg.jacobian.coef
    if coef == "auto":
        coef = 0.5 * cfg.sae.k * (cfg.sae.k_output or cfg.sae.k) / d_model
    return float(coef * cfg.jacobian.coef_scale)


def world_size(cfg: DictConfig) -> int:
    """Return the number of processes that the trainer's devices and nodes stand for."""
    for key in ("devices", "num_nodes"):
        count = cfg.trainer.get(key, 1)
        if not isinstance(count, int) or count < 1:
            raise UserError(f"trainer.{key}: '{count}' is not a number of {key}: give a whole number from 1")
    return cfg.trainer.get("devices", 1) * cfg.trainer.get("num_nodes", 1)


def check_batch(cfg: DictConfig) -> None:
    """Check that the batch divides into micro-batches of equal size, and into shards."""
    parts = world_size(cfg) * cfg.trainer.accumulate_grad_batches
    if cfg.data.batch_tokens % parts:
        raise UserError(
            f"data.batch_tokens: {cfg.data.batch_tokens} does not divide by {parts} "
            "(trainer.devices x trainer.num_nodes x trainer.accumulate_grad_batches): change one of them"
        )
    choose_num_shards(cfg.data.num_shards, cfg.data.batch_tokens, world_size(cfg))


def build(node: DictConfig, key: str, **overrides: Any) -> Any:
    """Instantiate the `_target_` of a node; what its constructor refuses becomes a UserError that names `key`."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **overrides)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ImportError):
            raise UserError(
                f"{key}: needs a package that is not installed ({error.__cause__}): install it, or leave {key} out"
            ) from error
        raise UserError(f"{key}: {error}: correct this key") from error


def to_dict(node: DictConfig) -> dict[str, Any]:
    """Return a node as plain Python values: what may go into a checkpoint's hyper-parameters."""
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def model_arguments(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of `LanguageModel.load` that `cfg.model` stands for, all but the device."""
    model = to_dict(cfg.model)
    kept = {key: model[key] for key in ("layer", "revision", "dtype", "random_weights", "synthetic")}
    return kept | {"name_or_path": model["path"] or model["name"], "seed": model["random_seed"]}


def _check_model(cfg: DictConfig) -> None:
    if (cfg.model.name is None) == (cfg.model.path is None):
        raise UserError(
            f"model.name: '{cfg.model.name}' with model.path '{cfg.model.path}': "
            "give one of them: model=hub model.name=NAME, or model=local model.path=DIR"
        )
    if cfg.model.path is not None and not Path(cfg.model.path).is_dir():
        raise UserError(f"model.path: there is no directory '{cfg.model.path}': give a Hugging Face model directory")
    _check_synthetic(cfg)


def _check_synthetic(cfg: DictConfig) -> None:
    """Check that the synthetic model has its parameters and its own tokens, and no other model has either."""
    if (cfg.model.name == SYNTHETIC) != (cfg.model.synthetic is not None):
        raise UserError(
            f"model.synthetic: is {'null' if cfg.model.synthetic is None else 'set'} with model.name "
            f"'{cfg.model.name}': model.synthetic describes the model called {SYNTHETIC}: choose model=synthetic"
        )
    if (cfg.data.source == SYNTHETIC) != (cfg.model.synthetic is not None):
        raise UserError(
            f"data.source: {cfg.data.source} with model.name '{cfg.model.name}': the synthetic model reads its own "
            "tokens and no other model does: give both model=synthetic and data=synthetic, or neither"
        )
    if cfg.model.synthetic is None:
        return
    make_spec(to_dict(cfg.model.synthetic))
    for key in _DATA_KEYS_OF_OTHERS["stdlib"]:
        if cfg.data[key] not in (None, False, _UNREAD.get(key)):
            raise UserError(
                f"data.{key}: '{cfg.data[key]}' has no effect with data.source=synthetic: leave it as data=synthetic "
                "has it"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_data(cfg: DictConfig) -> None:
    """Check that the keys of `data` fit its source."""
    local = cfg.data.source in SOURCES[1:-1]
    kind = cfg.data.source if cfg.data.source in _DATA_KEYS_OF_OTHERS else "files"
    for key in _DATA_KEYS_OF_OTHERS[kind]:
        if cfg.data[key] not in (None, False, _UNREAD.get(key)):
            raise UserError(
                f"data.{key}: '{cfg.data[key]}' has no effect with data.source={cfg.data.source}: leave it unset, "
                "or choose the source by data=text, jsonl, parquet, arrow or hub"
            )
    if local and cfg.data.path is None:
        raise UserError(f"data.path: null, but data.source={cfg.data.source} reads files: give a file, folder or glob")
    if local and not any(character in cfg.data.path for character in "*?[") and not Path(cfg.data.path).exists():
        raise UserError(f"data.path: there is no file or folder '{cfg.data.path}': give one that exists")
    if cfg.data.source == "hub" and cfg.data.name is None:
        raise UserError("data.name: null, but data.source=hub reads a dataset: give its name")


def _check_training(cfg: DictConfig) -> None:
    if str(precision := cfg.trainer.get("precision") or 32) not in _PRECISIONS:
        raise UserError(
            f"trainer.precision: '{precision}' is none of {', '.join(_PRECISIONS)}: choose one of these; others round "
            "the weights themselves, also the frozen MLP's, which would no longer be the language model's"
        )
    coef = cfg.jacobian.coef
    if not (coef == "auto" or (_is_number(coef) and coef >= 0)):
        raise UserError(f"jacobian.coef: '{coef}' is no weight: give a number of 0 or more, or auto")
    if coef == "auto" and cfg.jacobian.penalty != "l1":
        raise UserError(f"jacobian.coef: auto is a rule for l1 only, not for {cfg.jacobian.penalty}: give a number")
    steps = cfg.trainer.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"trainer.max_steps: {steps} is no number of steps: give a whole number from 1")
    if cfg.optim.warmup_fraction + cfg.optim.decay_fraction > 1:
        raise UserError(
            f"optim.decay_fraction: {cfg.optim.decay_fraction} and optim.warmup_fraction "
            f"{cfg.optim.warmup_fraction} overlap: lower one, their sum is at most 1"
        )
    if cfg.jacobian.warmup_fraction + cfg.jacobian.decay_fraction > 1:
        raise UserError(
            f"jacobian.decay_fraction: {cfg.jacobian.decay_fraction} and jacobian.warmup_fraction "
            f"{cfg.jacobian.warmup_fraction} overlap: lower one, their sum is at most 1"
        )
    if not 0 < cfg.jacobian.token_fraction <= 1:
        raise UserError(
            f"jacobian.token_fraction: {cfg.jacobian.token_fraction} is no share of the tokens: give a number above 0 "
            "and at most 1 (jacobian.coef=0 leaves the penalty out)"
        )
    if cfg.ckpt_path not in (None, "auto") and not Path(cfg.ckpt_path).is_file():
        raise UserError(f"ckpt_path: there is no file '{cfg.ckpt_path}': give a checkpoint, auto or null")
    if "jacobian_histograms" in cfg.callbacks and "evaluation" not in cfg.callbacks:
        raise UserError(
            "callbacks.jacobian_histograms: draws what callbacks.evaluation measures, which is missing: leave both out"
        )
    check_batch(cfg)


def _target_nodes(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name in map(str, node):
            yield from _target_nodes(node._get_node(name), f"{key}.{name}")


def _check_constructor(key: str, node: DictConfig) -> None:
    """Compare a node's keys with the constructor's signature, read from its source without importing it."""
    known = constructor_arguments(node["_target_"])
    for name in map(str, node):
        if known is not None and name not in known and not name.startswith("_"):
            raise UserError(
                f"{key}.{name}: {node['_target_']} has no such argument: correct the key; "
                f"it knows {', '.join(sorted(known))}"
            )


def constructor_arguments(target: str) -> set[str] | None:
    """Return the argument names of a class's `__init__`, or None where its source does not tell (it is then checked
    when it is built).
    """  # noqa: D205
    module, _, name = target.rpartition(".")
    if target == "lightning.Trainer":
        module = "lightning.pytorch.trainer.trainer"
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0], *parts).with_suffix(".py")
    if not source.is_file():
        return None
    for definition in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(definition, ast.ClassDef) and definition.name == name:
            for member in definition.body:
                if isinstance(member, ast.FunctionDef) and member.name == "__init__" and member.args.kwarg is None:
                    return {argument.arg for argument in (*member.args.args[1:], *member.args.kwonlyargs)}
    return None


register()  # at once: a task of submitit's composes its configuration before it calls anything of this package
