"""The embedded language model: a small GPT-NeoX trained on Python's own standard library.

`WEIGHTS` is an ordinary Hugging Face directory (config, weights, tokenizer); the package loads it by the
same code path as a hub name. `corpus.py` yields the text, `pretrain.py` is what made the weights.
"""

from pathlib import Path

NAME = "jsae-lightning/tiny-lm"
"""What it is called where a hub name is expected; it is never looked for on the hub."""

WEIGHTS = Path(__file__).parent / "weights"
"""Directory with `config.json`, `model.safetensors` and `tokenizer.json`."""
