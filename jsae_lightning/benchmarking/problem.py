"""The material of one step: Gaussian MLP inputs, a random frozen MLP, and a freshly initialised pair.

    x ~ N(0, 1) of shape (tokens, d_model);   y = MLP(x), weights ~ N(0, 1 / fan-in)

So the latents that fire are spread almost evenly over the dictionary: of all data the hardest for kernels that gather
rows, because few rows are met again while they are in a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jsae_lightning.activation_functions import ACTIVATIONS
from jsae_lightning.benchmarking.shapes import Settings, Shape
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.sae import SAEPair

Loss = Callable[[], Float[Tensor, ""]]


@dataclass(frozen=True)
class Problem:
    """What every contestant works on."""

    pair: SAEPair
    mlp: FrozenMLP
    x: Float[Tensor, "tokens d_model"]
    coef: float
    """Weight of the penalty."""
    is_mixed: bool
    """Whether losses are computed under bfloat16 autocast."""

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.x.device

    def autocast(self) -> torch.autocast:
        """The precision of the trainer (`trainer.precision`) around a loss."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_mixed)

    def forward_and_backward(self, loss_function: Loss) -> Tensor:
        """Compute a loss and its gradients, as a training step does before the optimizer; return the loss."""
        with self.autocast():
            loss = loss_function()
        loss.backward()
        return loss.detach()

    def clear_gradients(self) -> None:
        """Free the gradients, as Lightning does before every step."""
        self.pair.zero_grad(set_to_none=True)


def make_problem(shape: Shape, *, dtype: str, device: torch.device, seed: int) -> Problem:
    """Draw everything on the CPU from `seed`, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    mlp = make_mlp(shape, generator)
    pair = SAEPair(shape.d_model, shape.d_sae, shape.k, generator=generator)
    x = torch.randn(shape.tokens, shape.d_model, generator=generator)
    return Problem(pair.to(device), mlp.to(device), x.to(device), shape.coef, dtype == "bf16-mixed")


def make_mlp(shape: Shape, generator: torch.Generator) -> FrozenMLP:
    """Draw an MLP: with biases if it is plain, as Pythia's, and without if it is gated, as Gemma's."""

    def draw(*size: int, fan_in: int) -> Tensor:
        return torch.randn(*size, generator=generator) / fan_in**0.5

    d_model, d_mlp = shape.d_model, shape.d_mlp
    weights: dict[str, Any] = {
        "W_in": draw(d_model, d_mlp, fan_in=d_model),
        "W_out": draw(d_mlp, d_model, fan_in=d_mlp),
    }
    if shape.gated:
        weights["W_gate"] = draw(d_model, d_mlp, fan_in=d_model)
    else:
        weights |= {"b_in": draw(d_mlp, fan_in=d_model), "b_out": draw(d_model, fan_in=d_mlp)}
    return FrozenMLP(**weights, activation=shape.activation)


def check_activation(shape: Shape) -> None:
    """Raise UserError for an activation function that is not among `ACTIVATIONS`."""
    if shape.activation not in ACTIVATIONS:
        raise UserError(f"--activation: '{shape.activation}' is not known: choose one of {', '.join(ACTIVATIONS)}")


def choose_device(settings: Settings) -> torch.device:
    """Return the device that the settings stand for; raise UserError where there is no such one."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda, but torch sees no CUDA device: use --device cpu")
    has_cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if has_cuda else "cpu")
