"""One MLP of a frozen language model, as plain tensors.

plain:  y = act(x W_in + b_in) W_out + b_out
gated:  y = (act(g) * u) W_out + b_out,   g = x W_gate + b_gate,   u = x W_in + b_in

x is `mlp_in`, the tensor that enters the MLP after its norm; y is `mlp_out`, the tensor that leaves it, before any
post-norm and before it is added to the residual stream.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jsae_lightning.activation_functions import ACTIVATIONS, canonical_activation

Slopes = tuple[tuple[Tensor, Tensor], ...]
"""Terms (weight (d_model, d_mlp), slope (tokens, d_mlp)); see `FrozenMLP.forward_with_slopes`."""

_TENSOR_NAMES = ("W_gate", "b_gate", "W_in", "b_in", "W_out", "b_out")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class FrozenMLP(nn.Module):
    """A frozen MLP, plain or gated, with the derivative of its activation in closed form.

    Its tensors are non-persistent float32 buffers without gradients: they follow `.to(...)` and never enter a state
    dict. Biases that a model lacks are None.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    b_in: Float[Tensor, " d_mlp"] | None
    b_out: Float[Tensor, " d_model"] | None
    b_gate: Float[Tensor, " d_mlp"] | None

    def __init__(
        self,
        W_in: Float[Tensor, "d_model d_mlp"],
        W_out: Float[Tensor, "d_mlp d_model"],
        *,
        activation: str,
        b_in: Float[Tensor, " d_mlp"] | None = None,
        b_out: Float[Tensor, " d_model"] | None = None,
        W_gate: Float[Tensor, "d_model d_mlp"] | None = None,
        b_gate: Float[Tensor, " d_mlp"] | None = None,
    ) -> None:
        """Copy the tensors as float32; `activation` is any name that `canonical_activation` knows.

        Raises UserError for an unsupported activation, ValueError for shapes that do not fit together.
        """
        super().__init__()
        self.activation = canonical_activation(activation)
        self.d_model, self.d_mlp = W_in.shape
        vectors = {"b_in": (b_in, self.d_mlp), "b_gate": (b_gate, self.d_mlp), "b_out": (b_out, self.d_model)}
        wrong = [name for name, (bias, size) in vectors.items() if bias is not None and tuple(bias.shape) != (size,)]
        wrong += ["W_out"] if tuple(W_out.shape) != (self.d_mlp, self.d_model) else []
        wrong += ["W_gate"] if W_gate is not None and W_gate.shape != W_in.shape else []
        wrong += ["b_gate"] if b_gate is not None and W_gate is None else []
        if wrong:
            raise ValueError(f"{', '.join(wrong)} do not fit W_in of shape {tuple(W_in.shape)} (d_model, d_mlp)")
        tensors = {"W_gate": W_gate, "b_gate": b_gate, "W_in": W_in, "b_in": b_in, "W_out": W_out, "b_out": b_out}
        for name, tensor in tensors.items():
            # A copy: the model's own weights may be views in another layout, and are freed with the model.
            frozen = None if tensor is None else tensor.detach().to(torch.float32, copy=True).contiguous()
            self.register_buffer(name, frozen, persistent=False)

    @property
    def is_gated(self) -> bool:
        """Whether the hidden activations are act(g) * u instead of act(h)."""
        return self.W_gate is not None

    @property
    def kind(self) -> Literal["plain", "gated"]:
        """The formula's name."""
        return "gated" if self.is_gated else "plain"

    def extra_repr(self) -> str:
        """Kind, activation and widths."""
        return f"{self.kind}, {self.activation}, d_model={self.d_model}, d_mlp={self.d_mlp}"

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W + b, in at least float32 whatever autocast makes of the matrix product."""
        product = _at_least_float32(x.to(weight.dtype) @ weight)
        return product if bias is None else product + bias

    def forward(self, mlp_in: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        """Return mlp_out, in the dtype of the buffers; see the module's docstring for the formula."""
        act = ACTIVATIONS[self.activation].value
        hidden = self._project(mlp_in, self.W_in, self.b_in)
        if self.W_gate is not None:
            hidden = act(self._project(mlp_in, self.W_gate, self.b_gate)) * hidden
        else:
            hidden = act(hidden)
        return self._project(hidden, self.W_out, self.b_out)

    def forward_with_slopes(
        self, mlp_in: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens d_model"], Slopes]:
        """Return mlp_out and the terms of its derivative by mlp_in.

            d mlp_out / d mlp_in = sum over terms of  weight diag(slope) W_out          (row vectors: y = x M)
            plain: (W_in, act'(h));     gated: (W_gate, act'(g) * u) and (W_in, act(g))

        A term is (weight (d_model, d_mlp), slope (tokens, d_mlp)), in the dtype of the buffers. Differentiable in
        `mlp_in`. Farnik et al. (arXiv 2502.18147) give it for plain MLPs; the gated one is ours.
        """
        act = ACTIVATIONS[self.activation]
        hidden = self._project(mlp_in, self.W_in, self.b_in)
        if self.W_gate is None:
            mlp_out = self._project(act.value(hidden), self.W_out, self.b_out)
            return mlp_out, ((self.W_in, act.derivative(hidden)),)
        gate = self._project(mlp_in, self.W_gate, self.b_gate)
        activated = act.value(gate)
        mlp_out = self._project(activated * hidden, self.W_out, self.b_out)
        return mlp_out, ((self.W_gate, act.derivative(gate) * hidden), (self.W_in, activated))

    def weights_hash(self) -> str:
        """SHA-256 (hex) of the activation's name and of every tensor's name, shape and float32 bytes.

        The same on every device: a checkpoint stores it, and refuses an MLP with another one.
        """
        digest = hashlib.sha256(self.activation.encode())
        for name in _TENSOR_NAMES:
            tensor = getattr(self, name)
            if tensor is not None:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        layer: int,
        revision: str | None = None,
        dtype: str = "float32",
        random_weights: bool | Literal["full"] = False,
        seed: int = 0,
        synthetic: Mapping[str, Any] | None = None,
    ) -> "FrozenMLP":
        """Load the MLP of `layer` of a Hugging Face model, by the path that training and evaluation use.

        The arguments are those of `LanguageModel.load`, and so are the errors.
        """
        from jsae_lightning.language_model import LanguageModel

        return LanguageModel.load(
            name_or_path,
            layer=layer,
            revision=revision,
            dtype=dtype,
            random_weights=random_weights,
            seed=seed,
            synthetic=synthetic,
        ).frozen_mlp
