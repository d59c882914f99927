"""The configuration of an evaluation: what the pair was trained with, `conf/eval.yaml`, and the user's overrides.

Imports neither torch nor lightning, so that mistakes answer at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from jsae_lightning.config import (
    absolute,
    check_data,
    check_values,
    choices,
    config_dir,
    make_paths_absolute,
    register,
    to_dict,
)
from jsae_lightning.config_schema import DataConfig, ModelConfig
from jsae_lightning.errors import UserError
from jsae_lightning.suggestions import check_keys

PARTS = ("figures", "fidelity", "graph", "ground_truth")
"""What can be measured; `evaluation_parts` has the functions."""

_OF_TRAINING = {  # keys of `data` without a meaning here, and what they are set to
    "train_tokens": 1, "batch_tokens": 64, "buffer_batches": 1, "num_shards": 1, "lm_batch_sequences": 1,
    "prefetch": False, "repeat": True, "cache_dir": None, "cache_dtype": "float32",
}  # fmt: skip
_OF_THE_SAES = ("context_length", "exclude_first_position", "exclude_special_tokens")
_POSITIVE = (
    "data.val_sequences", "data.context_length", "data.stream_timeout_s", "eval.tokens", "eval.jacobian_tokens",
    "eval.fidelity_tokens", "eval.curve_sequences", "eval.contexts", "eval.top_edges", "eval.groups",
    "eval.batch_sequences", "num_threads",
)  # fmt: skip
_SAME_DATA = ("source", "name", "config_name")  # and the path and the split, see `_place`
_HELD_OUT_BY = ("val_split", "streaming", "document_separator", "val_fraction", "text_column", "token_column")


@dataclass
class EvaluationConfig:
    """The extent of an evaluation: `eval` in `conf/eval.yaml`."""

    tokens: int | float | None = MISSING  # 1e6 is welcome
    jacobian_tokens: int | float | None = MISSING
    fidelity_tokens: int | float = MISSING
    curve_sequences: int = MISSING
    contexts: int = MISSING
    top_edges: int = MISSING
    groups: int = MISSING
    batch_sequences: int = MISSING
    exclude_first_position: bool = MISSING
    parts: list[str] | None = MISSING
    out: str | None = MISSING


@dataclass
class EvaluateConfig:
    """The whole configuration: `conf/eval.yaml`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = MISSING
    kernels: str = MISSING
    num_threads: int | None = MISSING
    device: str = MISSING


def compose_evaluation(
    folder: Path, pair: dict[str, Any], overrides: Sequence[str], config_dirs: Sequence[str] = ()
) -> DictConfig:
    """Return the checked configuration for the pair of a run or export folder.

    The starting point is what the pair was trained with, so that without overrides the same held-out tokens are
    judged as at the end of training. With other data (`data=GROUP`) the context length and the excluded positions
    stay those of training unless they are given.

    Args:
        folder: the run's folder (or the export's), whose `.hydra/config.yaml` is read if `pair` does not tell all.
        pair: the export's `config.json`.
        overrides: of `conf/eval.yaml`, in Hydra's notation.
        config_dirs: folders with the user's own presets.

    Raises:
        UserError: the first key that is wrong.
        HydraException: a key or a choice that there is not.
    """
    register()
    store = ConfigStore.instance()
    store.store(name="eval_root_schema", node=EvaluateConfig)
    store.store(group="model", name="of_run", node=_model_of_run(pair["model"]))
    store.store(group="data", name="of_run", node=_data_of_run(pair))
    _refuse_keys_of_training(overrides)
    defaults = []
    given = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    if "model.path" in given and "model.revision" not in given:
        defaults.append("model.revision=null")  # of the hub's model, which a folder is a copy of
    if any(override.startswith("data=") for override in overrides):
        kept = {key: value for key, value in pair.get("data", {}).items() if key in _OF_THE_SAES}
        defaults += [f"data.{key}={'null' if value is None else value}" for key, value in kept.items()]
    if _judged_without_first(folder, pair):
        defaults.append("eval.exclude_first_position=true")
    if config_dirs:
        paths = ", ".join(json.dumps(f"file://{Path(path).resolve()}") for path in config_dirs)
        defaults.append(f"hydra.searchpath=[{paths}]")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("eval", overrides=[*defaults, *overrides])
    make_paths_absolute(cfg)
    _check(cfg)
    return cfg


def held_out_sequences(cfg: DictConfig, pair: dict[str, Any], model_length: int) -> tuple[int, str | None]:
    """Return how many held-out sequences to ask for, and a remark if they cannot be all that the user wants.

    ceil(eval.tokens / data.context_length), or data.val_sequences. A stream without a split of its own for validation
    has held out the tokens at its start and trained on the next: of the data of training no more than those.

    Args:
        cfg: the composed configuration.
        pair: the export's `config.json`.
        model_length: what a `data.context_length` of null stands for.

    Raises:
        UserError: of the data of training, others are asked for than training held out.
    """
    length = cfg.data.context_length or model_length
    asked, wanted = f"data.val_sequences: {cfg.data.val_sequences:,}", cfg.data.val_sequences
    if cfg.eval.tokens is not None:
        asked, wanted = f"eval.tokens: {int(cfg.eval.tokens):,}", -(-int(cfg.eval.tokens) // length)
    trained_on = pair.get("data", {})
    if not is_same_data(cfg, pair) or cfg.data.val_split is not None:
        return wanted, None
    for key in _HELD_OUT_BY:
        if cfg.data[key] != (trained := trained_on.get(key, cfg.data[key])):
            raise UserError(
                f"data.{key}: {cfg.data[key]}, but the pair was trained on these data with {trained}, so on some of "
                "what would be held out now: leave it out, or judge other data"
            )
    if not cfg.data.streaming:
        return wanted, None
    tokens = trained_on["val_sequences"] * (trained_on.get("context_length") or model_length)
    most = tokens // length
    if not most:
        raise UserError(
            f"data.context_length: {length}, but training held out only the first {tokens:,} tokens of this stream: "
            "lower it"
        )
    if wanted <= most:
        return wanted, None
    return most, (
        f"{asked} asked for, but training held out the first {tokens:,} tokens of this stream and learnt from the "
        f"next: {most} sequences of {length} tokens are used"
    )


def is_same_data(cfg: DictConfig, pair: dict[str, Any]) -> bool:
    """Whether these may be the data of training, perhaps another revision or part of them."""
    return _place(to_dict(cfg.data)) == _place(pair.get("data", {}))


def _place(data: dict[str, Any]) -> tuple[Any, ...]:
    path, split = data.get("path"), data.get("train_split")
    # Older exports have paths as they were given. A slice of a split is a part of it.
    others = (absolute(path) if path else path, split.partition("[")[0] if split else split)
    return (*(data.get(key) for key in _SAME_DATA), *others)


def held_out_as_in_training(cfg: DictConfig, pair: dict[str, Any]) -> dict[str, Any] | None:
    """Return `data` of training where it decides what may be judged: of its own stream, rows at the start."""
    is_own_stream = cfg.data.streaming and cfg.data.val_split is None and is_same_data(cfg, pair)
    return pair["data"] if is_own_stream else None


def data_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return `data` for the data module, with the least of what only training needs."""
    return to_dict(cfg.data) | _OF_TRAINING


def settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys that decide on the figures, flat: what makes two evaluations of one pair the same."""
    flat: dict[str, Any] = {"seed": cfg.seed}
    for section in ("model", "data", "eval"):
        flat |= {f"{section}.{key}": value for key, value in to_dict(cfg[section]).items()}
    for key in ("eval.out", "eval.batch_sequences", "data.stream_retries", "data.stream_timeout_s"):
        del flat[key]
    return {key: value for key, value in flat.items() if key.removeprefix("data.") not in _OF_TRAINING}


def chosen_settings(overrides: Sequence[str], cfg: DictConfig) -> dict[str, Any]:
    """Return those of `settings` that the overrides are about: `data=c4` about all keys of `data`."""
    keys = [override.split("=", 1)[0].lstrip("+~") for override in overrides]
    return {
        name: value
        for name, value in settings(cfg).items()
        if any(name == key or name.startswith(f"{key}.") for key in keys)
    }


def covers(earlier: dict[str, Any], overrides: Sequence[str], cfg: DictConfig) -> bool:
    """Whether results hold what is asked for: the same `chosen_settings`, and the parts among those measured.

    `earlier` is `evaluation` in their `eval.json`.
    """
    asked = chosen_settings(overrides, cfg)
    found = {key: earlier["settings"].get(key) for key in asked}
    if "eval.parts" in asked and set(parts(cfg)) <= set(earlier["parts"]):
        del asked["eval.parts"], found["eval.parts"]
    return asked == found


def parts(cfg: DictConfig) -> list[str]:
    """Return the parts to run, in their own order: those asked for, or all that make sense for the model."""
    if cfg.eval.parts is not None:
        return [name for name in PARTS if name in cfg.eval.parts]
    return [name for name in PARTS if name != "ground_truth" or cfg.model.synthetic is not None]


def _check(cfg: DictConfig) -> None:
    check_keys(cfg)
    for section in ("model", "data", "eval"):
        for key in cfg[section]:
            if OmegaConf.is_missing(cfg[section], key):
                raise UserError(f"{section}.{key}: has no value and no default: give {section}.{key}=...")
    check_values(cfg, choices("data.", "model.", "kernels") | {"device": ("auto", "cpu", "cuda")}, _POSITIVE)
    if not 0 <= cfg.data.val_fraction <= 1:
        raise UserError(f"data.val_fraction: {cfg.data.val_fraction} is not a share: give a number from 0 to 1")
    if cfg.model.path is not None and not Path(cfg.model.path).is_dir():
        raise UserError(
            f"model.path: there is no directory '{cfg.model.path}': say where that model is now, model.path=DIR"
        )
    for name in cfg.eval.parts or ():
        if name not in PARTS:
            raise UserError(f"eval.parts: '{name}' is not known: choose among {', '.join(PARTS)}")
    if "ground_truth" in (cfg.eval.parts or ()) and cfg.model.synthetic is None:
        raise UserError(
            f"eval.parts: ground_truth needs a known graph, but the model is {cfg.model.path or cfg.model.name}: "
            "leave it out"
        )
    if cfg.eval.parts is not None and not len(cfg.eval.parts):
        raise UserError(f"eval.parts: [] measures nothing: choose among {', '.join(PARTS)}, or give null for all")
    check_data(cfg)


def _refuse_keys_of_training(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key.removeprefix("data.") in _OF_TRAINING and key.startswith("data."):
            raise UserError(f"{key}: matters in training only: leave it out (eval.tokens sets the extent)")


def _model_of_run(model: dict[str, Any]) -> dict[str, Any]:
    is_folder = Path(model["name"]).is_absolute() or Path(model["name"]).is_dir()
    return {
        "name": None if is_folder else model["name"],
        "path": model["name"] if is_folder else None,
        **{key: model[key] for key in ("revision", "layer", "dtype", "random_weights", "random_seed")},
        "synthetic": model.get("synthetic"),
    }


def _data_of_run(pair: dict[str, Any]) -> dict[str, Any]:
    base = to_dict(OmegaConf.load(config_dir() / "data" / "base.yaml"))  # type: ignore[arg-type]
    return base | pair.get("data", {}) | _OF_TRAINING


def _judged_without_first(folder: Path, pair: dict[str, Any]) -> bool:
    """Whether the run's own evaluations left position 0 out; False where neither the export nor a run tells."""
    if "exclude_first_position" in pair.get("evaluation", {}):
        return bool(pair["evaluation"]["exclude_first_position"])
    resolved = folder.resolve()  # exports of earlier versions do not tell, but their run does
    run = resolved.parent if resolved.name == "sae_pair" else resolved
    path = run / ".hydra" / "config.yaml"
    return path.is_file() and bool(OmegaConf.select(OmegaConf.load(path), "eval.exclude_first_position"))
