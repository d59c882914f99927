"""The language model around a known MLP: tokens to features, features to the MLP's input, and a linear readout.

    x_t = sum_j s_j(tokens up to t) d_j;    logits_t = (x_t + MLP(x_t)) W_U
    token t + 1 ~ softmax(logits_t)

Sequences are sampled from the model itself (`documents`), so the clean cross-entropy is the entropy rate of the source,
and what a splice adds to it is the loss of prediction. Without the MLP's output the model still predicts from x.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jsae_lightning.architecture import synthetic_architecture
from jsae_lightning.cache_files import bytes_hash
from jsae_lightning.language_model import LanguageModel, Splice
from jsae_lightning.synthetic import NAME
from jsae_lightning.synthetic.computation import SyntheticComputation, make_computation
from jsae_lightning.synthetic.spec import SyntheticSpec, make_spec
from jsae_lightning.synthetic.tokens import TokenFeatures


class SyntheticLanguageModel(LanguageModel):
    """A `LanguageModel` of one layer, float32, whose `computation` is known."""

    spec: SyntheticSpec
    computation: SyntheticComputation

    def __init__(self, values: Mapping[str, Any], *, device: str | torch.device = "cpu") -> None:
        """Build the model from the keys of `model.synthetic`; UserError if they fit no computation."""
        self.spec = make_spec(values)
        self.computation = make_computation(self.spec)
        super().__init__(
            None,
            self.computation.mlp().to(device),
            name=NAME,
            revision=None,
            layer=0,
            architecture=synthetic_architecture(self.spec),
            device=torch.device(device),
        )
        self._token_features = TokenFeatures(self.spec)
        generator = torch.Generator().manual_seed(self.spec.seed + 2)
        unembed = torch.randn(self.spec.d_model, self.spec.vocab_size, generator=generator, dtype=torch.float64)
        self._unembed = (unembed * self.spec.readout_scale).to(device, torch.float32)
        self._directions_in = self.computation.directions_in.to(device, torch.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that it computes with."""
        return self._unembed.nbytes + self._directions_in.nbytes

    @property
    def itemsize(self) -> int:
        """Bytes of one of its numbers."""
        return self._unembed.element_size()

    @torch.no_grad()
    def features(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq n_in"]:
        """Return the true activation of each input feature, float64."""
        self.check_tokens(tokens)
        return self._token_features(tokens.to(self.device))

    @torch.no_grad()
    def mlp_in(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Return x, float32."""
        return self._mlp_in_of(self.features(tokens))

    @torch.no_grad()
    def logits(
        self,
        tokens: Int64[Tensor, "batch seq"],
        *,
        replace_mlp_in: Splice | None = None,
        replace_mlp_out: Splice | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return (x + MLP(x)) W_U, float32; the replaced x enters the MLP alone, as in any language model."""
        residual = self.mlp_in(tokens)
        mlp_in = residual if replace_mlp_in is None else replace_mlp_in(residual)
        mlp_out = self._mlp(mlp_in)
        return self._readout(residual, mlp_out if replace_mlp_out is None else replace_mlp_out(mlp_out))

    @torch.no_grad()
    def next_logits(self, window: Int64[Tensor, "batch active_groups"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits at one position from the tokens t, t - 1, ...: what sampling needs."""
        mlp_in = self._mlp_in_of(self._token_features.activations(window.to(self.device)))
        return self._readout(mlp_in, self._mlp(mlp_in))

    def weights_hash(self) -> str:
        """Hash (hex) of the parameters and of every tensor that the model computes with."""
        parts = [json.dumps(self.spec.to_dict(), sort_keys=True), self.frozen_mlp.weights_hash()]
        parts += [bytes_hash(tensor) for tensor in (self._directions_in, self._unembed, self._token_features.table)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _mlp_in_of(self, features: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return features.float() @ self._directions_in

    def _mlp(self, mlp_in: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.frozen_mlp(mlp_in.float().reshape(-1, self.spec.d_model)).view(mlp_in.shape)

    def _readout(self, residual: Tensor, mlp_out: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return (residual + mlp_out).float() @ self._unembed
