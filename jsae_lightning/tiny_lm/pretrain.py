"""Train the embedded language model and write it as a Hugging Face directory.

    python -m jsae_lightning.tiny_lm.pretrain --out weights --seed 0

A GPT-NeoX (Pythia's architecture: parallel attention and MLP, biases, exact GELU, rotary on a quarter of each
head) of 4 layers, d_model 128, d_mlp 512, context 256, over a byte-level BPE of 2,048 tokens. Everything is
drawn from `--seed`. Weights are stored in float16 and evaluated after that rounding.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from jsae_lightning.tiny_lm.corpus import stdlib_documents

VOCAB_SIZE = 2048
CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 2,048 tokens on the training files."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for _, text in stdlib_documents(held_out=False)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def packed_tokens(tokenizer: PreTrainedTokenizerFast, *, held_out: bool) -> torch.Tensor:
    """Return all tokens of a split as (sequences, 256) int64, files joined by the end-of-text token."""
    texts = [text for _, text in stdlib_documents(held_out=held_out)]
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream.extend(ids)
        stream.append(tokenizer.eos_token_id)
    usable = len(stream) // CONTEXT * CONTEXT
    return torch.tensor(stream[:usable]).view(-1, CONTEXT)


def unigram_entropy(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Cross-entropy (nats a token) of `held_out` under the token frequencies of `train`, add-one smoothed."""
    counts = torch.bincount(train.flatten(), minlength=VOCAB_SIZE).double() + 1
    return float(-(counts / counts.sum()).log()[held_out.flatten()].mean())


@torch.no_grad()
def cross_entropy(model: GPTNeoXForCausalLM, sequences: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats over all sequences."""
    losses = [model(batch, labels=batch).loss * len(batch) for batch in sequences.split(64)]
    return float(torch.stack(losses).sum() / len(sequences))


def batches(sequences: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield shuffled batches for ever, one permutation of the data an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        for chosen in order.split(batch_size)[: len(sequences) // batch_size]:
            yield sequences[chosen]


def build_model(seed: int) -> GPTNeoXForCausalLM:
    """Build the untrained model."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            use_parallel_residual=True,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def train(model: GPTNeoXForCausalLM, sequences: torch.Tensor, *, num_tokens: int, batch_size: int, seed: int) -> None:
    """AdamW, peak learning rate 3e-3, 100 steps of warm-up, cosine to a hundredth of it."""
    steps = num_tokens // (batch_size * CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    started = time.monotonic()
    for step, batch in zip(range(steps), batches(sequences, batch_size, seed), strict=False):
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Train tokenizer and model, evaluate on the held-out files, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-tokens", type=int, default=16_000_000, help="tokens to train on, repeats counted")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of 256 tokens a step")
    args = parser.parse_args()

    tokenizer = train_tokenizer()
    train_set, held_out = (packed_tokens(tokenizer, held_out=flag) for flag in (False, True))
    print(f"{train_set.numel():,} training tokens, {held_out.numel():,} held out", flush=True)
    model = build_model(args.seed)
    train(model, train_set, num_tokens=args.num_tokens, batch_size=args.batch_size, seed=args.seed)

    model.eval().half().float()
    figures = {
        "held_out_cross_entropy": cross_entropy(model, held_out),
        "unigram_entropy": unigram_entropy(train_set, held_out),
        "training_tokens": train_set.numel(),
        "held_out_tokens": held_out.numel(),
        "tokens_trained_on": args.num_tokens,
        "seed": args.seed,
    }
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out.parent / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
