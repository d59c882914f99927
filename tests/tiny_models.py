"""Tiny random language models, written as Hugging Face folders with a tokenizer, so that tests need no network.

Weights are large enough for pre-activations of order 1 (where the activation functions differ from one another), and
biases and norm gains are random too, so that dropping any of them shows.
"""

from pathlib import Path
from typing import Any

import torch

FAMILIES = ("gpt_neox", "gpt2", "opt", "llama", "gemma2", "qwen2", "nemotron", "phi3", "mixtral")
"""What `make_model_dir` can make; mixtral is there to be refused."""

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 288

_TOKENIZER_TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "def forward(self, x):\n    return self.norm(x)\n",
    "numbers 0 1 2 3 4 5 6 7 8 9 10, and some punctuation: (a) [b] {c}!",
]


def make_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE of at most VOCAB_SIZE entries to `folder`; every text survives a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast.save_pretrained(str(folder))
    return folder


def make_config(family: str, *, d_model: int, d_mlp: int, num_layers: int, context_length: int, **others: Any) -> Any:
    """The transformers config of a tiny model of `family`; `others` override its own fields."""
    import transformers

    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "vocab_size": VOCAB_SIZE}
    common = special | {
        "hidden_size": d_model,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": context_length,
    }
    plain = common | {"intermediate_size": d_mlp}
    grouped = plain | {"num_key_value_heads": 2}
    head_dim = {"head_dim": d_model // 4}
    gpt2 = special | {
        "n_embd": d_model,
        "n_layer": num_layers,
        "n_head": 4,
        "n_positions": context_length,
        "n_inner": d_mlp,
    }
    fields = {
        "gpt_neox": (transformers.GPTNeoXConfig, plain),
        "gpt2": (transformers.GPT2Config, gpt2),
        "opt": (transformers.OPTConfig, common | {"pad_token_id": 1, "ffn_dim": d_mlp, "word_embed_proj_dim": d_model}),
        "llama": (transformers.LlamaConfig, grouped | head_dim),
        "gemma2": (transformers.Gemma2Config, grouped | head_dim | {"query_pre_attn_scalar": d_model // 4}),
        "qwen2": (transformers.Qwen2Config, grouped),
        "nemotron": (transformers.NemotronConfig, grouped | head_dim),
        "phi3": (transformers.Phi3Config, grouped),
        "mixtral": (transformers.MixtralConfig, grouped | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    }
    if family not in fields:
        raise ValueError(f"no tiny model of the family {family!r}: choose among {', '.join(FAMILIES)}")
    make, own = fields[family]
    return make(**(own | others))


def randomize(model: torch.nn.Module, d_model: int, seed: int) -> None:
    """Draw every matrix from N(0, 1/d_model) and add N(0, 0.1^2) to every vector, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / d_model**0.5)
            else:
                parameter.add_(0.1 * noise)


def make_model_dir(
    family: str,
    folder: Path,
    *,
    d_model: int = 32,
    d_mlp: int = 48,
    num_layers: int = 3,
    context_length: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Write a tiny random model of `family` (one of FAMILIES) to `folder` and return it.

    `dtype` is that of the stored weights; `config` overrides fields of the family's transformers config, such as
    `hidden_act="relu"` or `vocab_size=512`.
    """
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"d_model": d_model, "d_mlp": d_mlp, "num_layers": num_layers, "context_length": context_length}
    model = transformers.AutoModelForCausalLM.from_config(make_config(family, **sizes, **config))
    randomize(model, d_model, seed)
    model.to(dtype).save_pretrained(str(folder))
    if tokenizer:
        make_tokenizer(folder)
    return folder
