"""Data for tests: documents whose every token tells which document it is of, and settings of the data module."""

from typing import Any

EOS = 0
BOS = 1


class NumberTokenizer:
    """Turns "5 5 7" into [5, 5, 7]; adds BOS by itself if told so. Not a fast tokenizer."""

    def __init__(self, *, adds_bos: bool = False, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, None
        self._adds_bos = adds_bos

    def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self._encode(texts, add_special_tokens)}
        return {"input_ids": [self._encode(text, add_special_tokens) for text in texts]}

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        before = [self.bos_token_id] if self._adds_bos and add_special_tokens else []
        return before + [int(word) if word.isdigit() else 2 for word in text.split()]

    def get_vocab(self) -> dict[str, int]:
        return {"all": 0}


def tagged_tokens(index: int, length: int) -> list[int]:
    """A document of `length` tokens, all of them 10 + index."""
    return [10 + index] * length


def tagged_texts(num: int, *, length: int = 37) -> list[str]:
    """Texts of about `length` words, all words of a text the same number, 10 + its index."""
    return [" ".join([str(10 + index)] * (length + index % 11)) for index in range(num)]


def data_settings(**changes: Any) -> dict[str, Any]:
    """Every key of the data settings, small sizes."""
    return {
        "source": "stdlib",
        "path": None,
        "name": None,
        "config_name": None,
        "revision": None,
        "train_split": "train",
        "val_split": None,
        "streaming": False,
        "stream_retries": 2,
        "stream_timeout_s": 60.0,
        "text_column": None,
        "token_column": None,
        "document_separator": None,
        "context_length": 16,
        "bos": "auto",
        "exclude_first_position": False,
        "exclude_special_tokens": False,
        "train_tokens": 320,
        "batch_tokens": 32,
        "buffer_batches": 4,
        "num_shards": None,
        "lm_batch_sequences": 3,
        "prefetch": "auto",
        "val_sequences": 4,
        "val_fraction": 0.2,
        "repeat": True,
        "cache_dir": None,
        "cache_dtype": "float32",
    } | changes
