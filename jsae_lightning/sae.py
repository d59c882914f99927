"""TopK sparse autoencoders and the input/output pair.

    z = x W_enc + b_enc;   s = relu(topk_k(z));   x_hat = s W_dec + b_dec          (Farnik et al., section 3)

Latents are kept sparse, as k values and k indices a token; nothing of shape (tokens, d_sae) outlives the encoder.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jsae_lightning import kernels
from jsae_lightning.errors import UserError


class Latents(NamedTuple):
    """The k latents that TopK chose for each token. An entry is active if and only if its value is above zero."""

    values: Float[Tensor, "*tokens k"]
    """Activations after the ReLU, >= 0."""
    indices: Int[Tensor, "*tokens k"]
    """Which latents, in [0, d_sae)."""

    @property
    def active(self) -> Bool[Tensor, "*tokens k"]:
        """Mask of the entries that the ReLU let through."""
        return self.values > 0

    def fired(self, d_sae: int) -> Bool[Tensor, " d_sae"]:
        """Return which latents are active for some token. To index with `active` instead would wait for the device."""
        counts = torch.zeros(d_sae, dtype=torch.int32, device=self.values.device)
        return counts.index_add_(0, self.indices.flatten(), self.active.flatten().int()) > 0


class TopKSAE(nn.Module):
    """A TopK sparse autoencoder with unit-norm decoder rows.

    Initialised as in the paper's section 4: decoder rows random of norm 1, `W_enc = W_dec^T` taken after the
    normalisation, biases 0. `subtract_b_dec=True` encodes x - b_dec instead of x (the paper does not).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        k: int,
        *,
        subtract_b_dec: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the decoder from `generator` (None: torch's global one). Raise UserError if k > d_sae."""
        super().__init__()
        if not 0 < k <= d_sae:
            raise UserError(f"sae.k: {k} does not lie between 1 and d_sae = {d_sae}: lower sae.k or raise the width")
        self.d_model, self.d_sae, self.k = d_model, d_sae, k
        self.subtract_b_dec = subtract_b_dec
        W_dec = torch.randn(d_sae, d_model, generator=generator)
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_dec.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, x: Float[Tensor, "*tokens d_model"]) -> Latents:
        """S = relu(topk_k((x [- b_dec]) W_enc + b_enc)); no gradient through the choice of the k.

        Raises UserError where x is not as wide as the SAE.
        """
        if x.shape[-1:] != (self.d_model,):
            raise UserError(f"x: has shape {list(x.shape)}, not (tokens, {self.d_model}), the d_model of this SAE")
        if self.subtract_b_dec:
            x = x - self.b_dec
        values, indices = kernels.topk_encode(x.reshape(-1, self.d_model), self.W_enc, self.b_enc, self.k)
        shape = (*x.shape[:-1], self.k)
        return Latents(values.view(shape), indices.view(shape))

    def decode(self, latents: Latents) -> Float[Tensor, "*tokens d_model"]:
        """x_hat = s W_dec + b_dec."""
        values, indices = (tensor.reshape(-1, tensor.shape[-1]) for tensor in latents)
        x_hat = kernels.sparse_decode(values, indices, self.W_dec) + self.b_dec
        return x_hat.view(*latents.values.shape[:-1], self.d_model)

    def forward(self, x: Float[Tensor, "*tokens d_model"]) -> tuple[Float[Tensor, "*tokens d_model"], Latents]:
        """Return the reconstruction x_hat and the latents, for tokens in any shape: (batch, seq, d_model) too."""
        latents = self.encode(x)
        return self.decode(latents), latents

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to norm 1, in place: to be called after every optimizer step."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove the component of the decoder's gradient along each (unit) row, in place.

        g <- g - (g . w / |w|^2) w, before the optimizer step, so that Adam's moments never see the radial part, which
        the normalisation undoes anyway. The published code did it after the step, where it has no effect.
        """
        if self.W_dec.grad is None:
            return
        norm_squared = self.W_dec.square().sum(dim=1, keepdim=True)
        along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True) / norm_squared
        self.W_dec.grad -= along * self.W_dec


class SAEPair(nn.Module):
    """Two TopK SAEs, one on an MLP's input and one on its output.

    `d_sae_output` and `k_output` default to the input SAE's width and k.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        k: int,
        *,
        d_sae_output: int | None = None,
        k_output: int | None = None,
        subtract_b_dec: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.input_sae = TopKSAE(d_model, d_sae, k, subtract_b_dec=subtract_b_dec, generator=generator)
        self.output_sae = TopKSAE(
            d_model,
            d_sae if d_sae_output is None else d_sae_output,
            k if k_output is None else k_output,
            subtract_b_dec=subtract_b_dec,
            generator=generator,
        )

    @classmethod
    def of(cls, input_sae: TopKSAE, output_sae: TopKSAE) -> "SAEPair":
        """Make a pair of two SAEs, which are not copied. Raises UserError where their d_model differ."""
        if input_sae.d_model != output_sae.d_model:
            raise UserError(f"output_sae: its d_model is {output_sae.d_model}, the input SAE's {input_sae.d_model}")
        with torch.device("meta"):
            pair = cls(input_sae.d_model, 1, 1)
        pair.input_sae, pair.output_sae = input_sae, output_sae
        return pair

    @property
    def d_model(self) -> int:
        """Width of the residual stream, the same for both SAEs."""
        return self.input_sae.d_model

    def named_saes(self) -> tuple[tuple[str, TopKSAE], tuple[str, TopKSAE]]:
        """(("input", input SAE), ("output", output SAE)): the suffixes of every logged quantity."""
        return (("input", self.input_sae), ("output", self.output_sae))

    def normalize_decoders(self) -> None:
        """Scale both decoders' rows to norm 1."""
        for _, sae in self.named_saes():
            sae.normalize_decoder()

    def project_decoder_gradients(self) -> None:
        """Remove the radial component of both decoders' gradients."""
        for _, sae in self.named_saes():
            sae.project_decoder_gradient()

    def save(self, folder: str | Path, *, metadata: dict | None = None) -> Path:
        """Write `model.safetensors`, `config.json` and a model card to `folder`; see `checkpoint.save_pair`."""
        from jsae_lightning.checkpoint import save_pair

        return save_pair(self, folder, metadata=metadata)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "SAEPair":
        """Read a folder written by `save`; see `checkpoint.load_pair`."""
        from jsae_lightning.checkpoint import load_pair

        return load_pair(folder, device=device)
