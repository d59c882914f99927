"""The known computation: features with directions, a sparse graph between them, and the MLP that computes it.

    x = sum_j s_j d_j                         input features j with activations s_j >= 0 and unit directions d_j
    h_i = sum_j A_ij s_j - threshold_i        one neuron for each output feature i
    y = sum_i act(h_i) u_i                    unit directions u_i

The neuron reads s_j by the vector r_j with r_j . d_j = 1 and r_j . d_l = 0 for l != j. Such vectors exist if and only
if the directions are independent, so n <= d_model: the MLP then computes the graph exactly, d y_i / d s_j = A_ij
act'(h_i). With more features than dimensions r_j are those of unit gain and least interference, and h_i is off by
sum_l (R D^T - 1)_jl s_l, summed over the edges: see `SyntheticComputation.interference`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jsae_lightning.activation_functions import ACTIVATIONS, canonical_activation
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.synthetic.spec import SyntheticSpec

_TIGHTENING_STEPS = 100


@dataclass(frozen=True)
class SyntheticComputation:
    """The truth: float64 tensors on the CPU, a pure function of the spec."""

    directions_in: Float[Tensor, "n_in d_model"]
    """Unit rows d_j; orthonormal if they fit into d_model."""
    directions_out: Float[Tensor, "n_out d_model"]
    """Unit rows u_i; orthonormal if they fit into d_model."""
    weights: Float[Tensor, "n_out n_in"]
    """A: 0 where there is no edge."""
    thresholds: Float[Tensor, " n_out"]
    activation: str
    group: Int64[Tensor, " n_in"]
    """The group that each input feature is of; features of one group are always active together."""

    def pre_activations(self, features: Float[Tensor, "tokens n_in"]) -> Float[Tensor, "tokens n_out"]:
        """Return h = A s - thresholds."""
        return features.double() @ self.weights.T - self.thresholds

    def output_features(self, features: Float[Tensor, "tokens n_in"]) -> Float[Tensor, "tokens n_out"]:
        """Return act(h), what each output direction is multiplied by."""
        return ACTIVATIONS[canonical_activation(self.activation)].value(self.pre_activations(features))

    def jacobian(self, features: Float[Tensor, "tokens n_in"]) -> Float[Tensor, "tokens n_out n_in"]:
        """Return the true edges of each token: A_ij act'(h_i) where both s_j > 0 and act(h_i) > 0, else 0.

        The same rule as for a pair's Jacobian, which has no entry for a latent that is not active.
        """
        hidden = self.pre_activations(features)
        act = ACTIVATIONS[canonical_activation(self.activation)]
        active = (act.value(hidden) > 0)[:, :, None] & (features > 0)[:, None, :]
        return torch.where(active, act.derivative(hidden)[:, :, None] * self.weights, 0.0)

    def mlp(self) -> FrozenMLP:
        """Return the MLP: W_in = R^T A^T, b_in = -thresholds, W_out = U; d_mlp = n_out; float32."""
        return FrozenMLP(
            readouts(self.directions_in).T @ self.weights.T,
            self.directions_out,
            activation=self.activation,
            b_in=-self.thresholds,
        )

    def interference(self) -> float:
        """Return the root mean square of (R D^T - 1) off its diagonal: 0 if the features fit into d_model."""
        gain = readouts(self.directions_in) @ self.directions_in.T
        n = len(gain)
        return float((gain - torch.eye(n, dtype=gain.dtype)).square().sum().div(max(1, n * (n - 1))).sqrt())


def make_computation(spec: SyntheticSpec) -> SyntheticComputation:
    """Draw the truth that `spec` describes, from its seed alone.

    Output features come in groups of `group_size` as well. Each output group reads `inputs_per_output` input groups,
    and its r-th feature one feature of each of them, in a random order: the features of an output group, too, fire
    together, and what tells them apart is only which feature of each input group they read.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    size, n_in_groups, n_out_groups = spec.group_size, spec.n_in // spec.group_size, spec.n_out // spec.group_size
    directions_in = _directions(spec.n_in, spec.d_model, generator)
    directions_out = _directions(spec.n_out, spec.d_model, generator)
    weights = torch.zeros(spec.n_out, spec.n_in, dtype=torch.float64)
    for out_group, in_groups in enumerate(_deal(n_out_groups, n_in_groups, spec.inputs_per_output, generator)):
        for nth, in_group in enumerate(in_groups):
            rows = out_group * size + torch.arange(size)
            columns = in_group * size + torch.randperm(size, generator=generator)
            magnitude = spec.weight_low + (spec.weight_high - spec.weight_low) * _uniform(size, generator)
            # The first edge of an output is positive: an output of inhibitions alone would never fire.
            negative = (_uniform(size, generator) < spec.negative_share) & (nth > 0)
            weights[rows, columns] = torch.where(negative, -magnitude, magnitude)
    return SyntheticComputation(
        directions_in=directions_in,
        directions_out=directions_out,
        weights=weights,
        thresholds=spec.threshold_low + (spec.threshold_high - spec.threshold_low) * _uniform(spec.n_out, generator),
        activation=spec.activation,
        group=torch.arange(spec.n_in) // size,
    )


def readouts(directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Return r_j = G^+ d_j / (d_j . G^+ d_j), G = sum_l d_l d_l^T: unit gain, least sum of squared interference.

    For independent directions they are the dual ones, r_j . d_l = 1 if j = l, else 0.
    """
    raw = directions @ torch.linalg.pinv(directions.T @ directions, hermitian=True)
    return raw / (raw * directions).sum(dim=1, keepdim=True)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _directions(n: int, d_model: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows if n <= d_model; else unit rows spread evenly, by making a random frame tight."""
    random = torch.randn(n, d_model, generator=generator, dtype=torch.float64)
    if n <= d_model:
        return torch.linalg.qr(random.T).Q.T.contiguous()
    for _ in range(_TIGHTENING_STEPS):
        random = random / random.norm(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh(random.T @ random)
        random = random @ (vectors * values.rsqrt()) @ vectors.T
    return random / random.norm(dim=1, keepdim=True)


def _deal(hands: int, cards: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """Deal `size` different cards to each hand, every card about equally often, at random."""
    deck: list[int] = []
    dealt = []
    for _ in range(hands):
        hand: list[int] = []
        while len(hand) < size:
            if not any(card not in hand for card in deck):
                deck += torch.randperm(cards, generator=generator).tolist()
            card = next(card for card in deck if card not in hand)
            deck.remove(card)
            hand.append(card)
        dealt.append(hand)
    return dealt
