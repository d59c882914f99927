"""The activation functions of MLPs, each with its derivative in closed form.

Both are ordinary differentiable torch operations, so autograd gives the second derivative that a gradient through the
Jacobian needs. GELU's work in place where autograd allows it: on a CPU fresh memory costs more than the arithmetic.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jsae_lightning.errors import UserError

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715  # the constant of the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415)


class Activation(NamedTuple):
    """An elementwise function and its derivative, both Tensor -> Tensor of the same shape and dtype."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _gelu_derivative(h: Tensor) -> Tensor:
    """Phi(h) + h phi(h), with Phi and phi the standard normal's distribution function and density."""
    exponential = h.square().mul_(-0.5).exp_()
    return torch.erf(h / math.sqrt(2)).add_(1).mul_(0.5).addcmul_(h, exponential, value=1 / math.sqrt(2 * math.pi))


def _gelu_tanh_derivative(h: Tensor) -> Tensor:
    """(1 + t) / 2 + h (1 - t^2) u' / 2, with t = tanh u, u = sqrt(2 / pi) (h + 0.044715 h^3)."""
    h_squared = h.square()
    t = torch.addcmul(h, h, h_squared, value=_CUBIC).mul_(_SQRT_2_OVER_PI).tanh_()
    half_slope = (h_squared * (1.5 * _CUBIC * _SQRT_2_OVER_PI)).add_(0.5 * _SQRT_2_OVER_PI)
    return (0.5 * t).add_(0.5).addcmul_(h * half_slope, 1 - t.square())


def _silu_derivative(h: Tensor) -> Tensor:
    """sigma(h) (1 + h (1 - sigma(h)))."""
    sigma = torch.sigmoid(h)
    return sigma * (1 + h * (1 - sigma))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(torch.nn.functional.gelu, _gelu_derivative),
    "gelu_tanh": Activation(lambda h: torch.nn.functional.gelu(h, approximate="tanh"), _gelu_tanh_derivative),
    # The derivative at exactly 0 is taken as 0.
    "relu": Activation(torch.relu, lambda h: (h > 0).to(h.dtype)),
    "relu2": Activation(lambda h: torch.relu(h).square(), lambda h: 2 * torch.relu(h)),
    "silu": Activation(torch.nn.functional.silu, _silu_derivative),
}
"""Canonical name -> function and derivative."""

# Names that transformers and transformer-lens use for the same functions. Not here, because they are other functions:
# quick_gelu (h sigma(1.702 h)) and gelu_10 (clipped).
_OTHER_NAMES = {
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # its sqrt(2 / pi) has ten digits: equal to 1e-10
    "relu_2": "relu2",
    "relu_squared": "relu2",
    "swish": "silu",
}


def canonical_activation(name: str) -> str:
    """Return the key of ACTIVATIONS for a model's name of its activation function.

    Raises UserError for a function that is not among them.
    """
    canonical = _OTHER_NAMES.get(name, name)
    if canonical not in ACTIVATIONS:
        raise UserError(
            f"model: its MLP uses the activation function {name!r}, which is not supported: "
            f"choose a model with one of {', '.join(ACTIVATIONS)}"
        )
    return canonical
