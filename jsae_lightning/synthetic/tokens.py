"""Which features a sequence of tokens activates, and how strongly: a pure function of the tokens up to a position.

The groups of input features are dealt to `active_groups` slots. At position t, slot i activates one of its groups,
chosen by the token at t - i through a table (what an embedding and heads that copy from the positions before would
write): always `active_groups` groups, so active_groups * group_size features. The magnitude of each is drawn from
[magnitude_low, magnitude_high) by a hash of the tokens t, t - 1, ..., t - active_groups + 1, so features of one group
are active together but vary independently.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jsae_lightning.synthetic.spec import SyntheticSpec

_BITS = 53
"""A float64 holds so many bits exactly."""


class TokenFeatures:
    """The map from tokens to feature activations, drawn from the spec's seed."""

    def __init__(self, spec: SyntheticSpec) -> None:
        """Draw the tables; each group of a slot is named by about as many tokens as another."""
        self._spec = spec
        generator = torch.Generator().manual_seed(spec.seed + 1)
        per_slot = spec.groups_in // spec.active_groups
        # One id more than tokens: what stands before the beginning of a sequence.
        dealt = [torch.randperm(spec.vocab_size + 1, generator=generator) % per_slot for _ in range(spec.active_groups)]
        self.table: Int64[Tensor, "active_groups ids"] = torch.stack(
            [groups * spec.active_groups + slot for slot, groups in enumerate(dealt)]
        )

    def windows(self, tokens: Int64[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq active_groups"]:
        """Return tokens t, t - 1, ..., t - active_groups + 1 of each position; vocab_size before the beginning."""
        before = tokens.new_full((len(tokens), self._spec.active_groups - 1), self._spec.vocab_size)
        return torch.cat([before, tokens], dim=1).unfold(1, self._spec.active_groups, 1).flip(-1)

    def activations(self, windows: Int64[Tensor, "*positions active_groups"]) -> Float[Tensor, "*positions n_in"]:
        """Return s >= 0, float64, on the windows' device."""
        spec, device = self._spec, windows.device
        slots = torch.arange(spec.active_groups, device=device)
        groups = self.table.to(device)[slots, windows]
        context = torch.zeros_like(windows[..., 0]) + _mixed(torch.tensor(spec.seed, device=device))
        for slot in range(spec.active_groups):
            context = _mixed(context ^ windows[..., slot])
        members = torch.arange(spec.group_size, device=device)
        features = (groups[..., None] * spec.group_size + members).flatten(-2)
        drawn = _mixed(_mixed(context)[..., None] ^ features)
        share = _shifted(drawn, 64 - _BITS).double() / 2**_BITS
        magnitudes = spec.magnitude_low + (spec.magnitude_high - spec.magnitude_low) * share
        activations = torch.zeros(*windows.shape[:-1], spec.n_in, dtype=torch.float64, device=device)
        return activations.scatter(-1, features, magnitudes)

    def __call__(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq n_in"]:
        """Return the activation of each input feature at each position, float64."""
        return self.activations(self.windows(tokens))


def _mixed(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Scramble 64-bit integers: splitmix64 (Steele, Lea and Flood 2014), the same on every device."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
