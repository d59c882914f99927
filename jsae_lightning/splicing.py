"""The language model's loss with a pair's reconstructions spliced in, in place of the MLP's input, output or both."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jsae_lightning.metrics import Sums, cross_entropies, kl_divergences
from jsae_lightning.sae import SAEPair, TopKSAE

Activations = Float[Tensor, "batch seq d_model"]
Splice = Callable[[Activations], Activations]

VARIANTS = ("input", "output", "both", "zero_input", "zero_output")
"""The splices that are compared with the clean model; see `splices`."""

SPLICE_KEYS = ("positions", "ce_clean", *(f"{loss}_{variant}" for loss in ("ce", "kl") for variant in VARIANTS))
"""The keys of `splice_sums`."""

# The largest temporary tensor, in elements (256 MB of float32): what bounds the memory beside the logits themselves.
MAX_ELEMENTS = 2**26


@runtime_checkable
class Spliceable(Protocol):
    """What is needed of a language model, of which `language_model.LanguageModel` is one."""

    def mlp_in(self, tokens: Int[Tensor, "batch seq"]) -> Activations:
        """Return what enters the MLP of the layer."""
        ...

    def logits(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        replace_mlp_in: Splice | None = None,
        replace_mlp_out: Splice | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return the logits, with the MLP's input or output passed through a function."""
        ...


def chunks(x: Float[Tensor, "tokens d"], elements_per_token: int) -> tuple[Float[Tensor, "chunk d"], ...]:
    """Split tokens so that a temporary of `elements_per_token` each stays below MAX_ELEMENTS; no chunk is empty."""
    return x.split(max(1, MAX_ELEMENTS // elements_per_token)) if len(x) else ()


def reconstruct(sae: TopKSAE, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
    """Return x_hat in bounded memory, computed in the SAE's precision and returned in that of `x`."""
    dtype = sae.W_enc.dtype
    return torch.cat([x[:0], *(sae(chunk.to(dtype))[0].to(x.dtype) for chunk in chunks(x, sae.d_sae))])


def splice_at(included: Bool[Tensor, "batch seq"], function: Callable[[Tensor], Tensor]) -> Splice:
    """Return a splice that applies `function`, of (tokens, d_model), at the included positions only."""

    def splice(activations: Activations) -> Activations:
        spliced = activations.clone()
        spliced[included] = function(activations[included])
        return spliced

    return splice


def splices(pair: SAEPair, included: Bool[Tensor, "batch seq"]) -> dict[str, dict[str, Splice]]:
    """Return, for each of VARIANTS, the keyword arguments for the language model's `logits`.

    In `both` the output SAE gets what the MLP makes of the spliced input: mlp_in -> x_hat -> f(x_hat) -> y_hat.
    """
    input_sae = splice_at(included, lambda x: reconstruct(pair.input_sae, x))
    output_sae = splice_at(included, lambda y: reconstruct(pair.output_sae, y))
    zero = splice_at(included, torch.zeros_like)
    return {
        "input": {"replace_mlp_in": input_sae},
        "output": {"replace_mlp_out": output_sae},
        "both": {"replace_mlp_in": input_sae, "replace_mlp_out": output_sae},
        "zero_input": {"replace_mlp_in": zero},
        "zero_output": {"replace_mlp_out": zero},
    }


def splice_sums(
    pair: SAEPair, language_model: Spliceable, tokens: Int[Tensor, "batch seq"], included: Bool[Tensor, "batch seq"]
) -> Sums:
    """Sum cross-entropies and KL(clean || spliced), in nats, over the included positions that have a successor.

    The cross-entropy at position t is -log p(token t + 1 | tokens up to t); the successor need not be included itself.

    Args:
        pair: the SAEs to splice in.
        language_model: runs clean and once for each of VARIANTS.
        tokens: token ids, on the language model's device.
        included: positions that are spliced and judged; the others keep their own activations.

    Returns:
        Float64 scalars under SPLICE_KEYS, for `metrics.splice_metrics`.
    """
    return splice_sums_of(pair, language_model, tokens, included, [included])[0]


def splice_sums_of(
    pair: SAEPair,
    language_model: Spliceable,
    tokens: Int[Tensor, "batch seq"],
    included: Bool[Tensor, "batch seq"],
    judged: list[Bool[Tensor, "batch seq"]],
) -> list[Sums]:
    """Return `splice_sums` over each of several sets of positions, with all `included` ones spliced for all of them.

    What a position's loss is depends on every splice before it, so a part of the positions is judged with the whole
    sequence spliced. The forward passes are made once, however many sets there are.
    """
    positions = [mask[:, :-1].nonzero() for mask in judged]
    clean_logits = language_model.logits(tokens)
    sums = [{"positions": clean_logits.new_tensor(len(part), dtype=torch.float64)} for part in positions]
    for entry, part in zip(sums, positions, strict=True):
        entry["ce_clean"], _ = _losses(clean_logits, None, tokens, part)
    for variant, replace in splices(pair, included).items():
        logits = language_model.logits(tokens, **replace)
        for entry, part in zip(sums, positions, strict=True):
            entry[f"ce_{variant}"], entry[f"kl_{variant}"] = _losses(logits, clean_logits, tokens, part)
        del logits  # before the next forward pass makes another
    return sums


def _losses(
    logits: Float[Tensor, "batch seq vocab"],
    clean_logits: Float[Tensor, "batch seq vocab"] | None,
    tokens: Int[Tensor, "batch seq"],
    positions: Int[Tensor, "positions 2"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum the cross-entropy and the KL divergence (0 without `clean_logits`) over `positions`, some at a time."""
    cross_entropy, kl = torch.zeros(2, dtype=torch.float64, device=logits.device).unbind()
    for part in positions.split(max(1, MAX_ELEMENTS // logits.shape[-1])):
        sequence, position = part.unbind(dim=1)
        at_positions = logits[sequence, position]
        cross_entropy = cross_entropy + cross_entropies(at_positions, tokens[sequence, position + 1]).double().sum()
        if clean_logits is not None:
            kl = kl + kl_divergences(at_positions, clean_logits[sequence, position]).double().sum()
    return cross_entropy, kl
