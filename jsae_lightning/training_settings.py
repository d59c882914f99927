"""What the training of an exported pair depended on, beside the penalty, the seed and the sizes of its SAEs."""

from typing import Any

from jsae_lightning.config import absolute

_HOW_NOT_WHAT = (
    "prefetch", "cache_dir", "lm_batch_sequences", "stream_retries", "stream_timeout_s", "streaming", "train_tokens",
    "val_sequences", "val_fraction", "val_split",
)  # fmt: skip
"""Keys of `data` that say how activations are made or which are judged (the tokens that were seen are told apart)."""


def training_settings(pair: dict[str, Any]) -> dict[str, Any]:
    """Return tokens, data and recipe of an export's `config.json`, flat; older ones do not tell their recipe."""
    data = {key: value for key, value in pair.get("data", {}).items() if key not in _HOW_NOT_WHAT}
    if data.get("path"):  # as older exports have it, it may be relative
        data["path"] = absolute(data["path"])
    found = {"tokens_seen": pair.get("tokens_seen")} | {f"data.{key}": value for key, value in data.items()}
    return found | (pair.get("recipe") or {})
