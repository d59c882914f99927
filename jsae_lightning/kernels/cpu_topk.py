"""The encoder's k largest pre-activations on processors: from the plain product, or screened by a bfloat16 one.

A processor with bfloat16 products makes x W more than twice as fast in bfloat16, with errors that can be bounded. So
that product only proposes: the candidates that look largest are computed again in float32, and the k largest of
those are the plain product's result if no other latent can reach them. With u = 2^-8 and hats for rounded values,

    |z - z_hat| <= |x_t - x_hat_t| max_j |w_j| + |x_hat_t| max_j |w_j - w_hat_j| + d_model 2^-22 |x_t| max_j |w_j|
                   + 2.05 u (|z_hat| + max_j |b_j|) + 2^-100           (token t, latent j; Cauchy and Schwarz)

for the rounding of inputs and weights, the sums in float32, the rounding of the product, of the bias and of their sum
(0.05 for the terms in u^2), and products that are too small for float32. A latent that is no candidate has z_hat at
most that of the last candidate, hence z at most a limit. A token whose k-th float32 value lies below its limit goes to
the plain product: with trained dictionaries about one in a thousand.
"""

import functools
import math

import torch
from torch import Tensor

from jsae_lightning.kernels.blocks import blocks

CANDIDATES = 1.5
CANDIDATES_PER_D_MODEL = 1 / 1024
"""So many for each latent to be chosen: slightly more than lie within the bound where everything is normal."""

MIN_D_MODEL = 256
"""With shorter products the candidates take it."""

MIN_D_SAE = 256
"""For each latent to be chosen."""

MIN_TOKENS = 2048
"""With fewer the copies of the weights, by rows and rounded, take what the product saves."""

MOST_UNCERTAIN = 0.5
"""With a larger share of a chunk's tokens uncertain, the other chunks go to the plain product."""

BLOCK_ELEMENTS = 2**19
"""Of the encoder's rows that are gathered at a time: 2 MB, which stay in cache."""

_ROUNDING = 2.05 * 2.0**-8
_SUMS = 2.0**-22
_TINY = 2.0**-100
"""The numbers of the bound in the module's docstring."""

_TINY_LENGTH = 2.0**-64
"""What a vector of up to 2^20 numbers is longer at most than a float32 sum of their squares says."""

Chosen = tuple[Tensor, Tensor]


class DenseTopK:
    """The k largest entries of each row of x W + b, from the whole product in its dtype."""

    def __init__(self, W: Tensor, b: Tensor, k: int, max_tokens: int) -> None:
        """Take W (d_model, d_sae), b, how many to choose, and how many rows `topk` is given at most."""
        self.W, self.b, self.k, self.max_tokens = W, b, k, max_tokens

    @functools.cached_property
    def products(self) -> Tensor:
        """One buffer for all calls: fresh memory for each costs as much as a fifth of the product."""
        return self.W.new_empty(self.max_tokens, self.W.shape[1])

    def topk(self, x: Tensor) -> Chosen:
        """Return the values in descending order and their columns."""
        return torch.addmm(self.b, x, self.W, out=self.products[: len(x)]).topk(self.k, dim=1)


class ScreenedTopK:
    """The same for float32, by candidates from a bfloat16 product; see the module's docstring."""

    def __init__(self, W: Tensor, b: Tensor, k: int, max_tokens: int) -> None:
        """Take the arguments of `DenseTopK`."""
        self.dense = DenseTopK(W, b, k, max_tokens)
        self.k, self.b, self.rows = k, b, W.T.contiguous()
        self.low_rows, self.low_b = self.rows.bfloat16(), b.bfloat16()
        self.norm, self.error = (float(lengths.max()) for lengths in _norms_and_errors(self.rows, self.low_rows))
        self.bias = float(b.abs().max())
        self.candidates = min(math.ceil((CANDIDATES + CANDIDATES_PER_D_MODEL * len(W)) * k), len(self.rows))
        self.is_useful = True

    @functools.cached_property
    def _products(self) -> Tensor:
        """Half of the plain product's memory: the two are never needed at the same time."""
        plain = self.dense.products
        return plain.flatten().view(torch.bfloat16)[: plain.numel()].view_as(plain)

    def topk(self, x: Tensor) -> Chosen:
        """Return the values in descending order and their columns."""
        if not self.is_useful:
            return self.dense.topk(x)
        values, indices, uncertain = self._screen(x)
        if len(uncertain):
            values[uncertain], indices[uncertain] = self.dense.topk(x[uncertain])
            self.is_useful = len(uncertain) <= MOST_UNCERTAIN * len(x)
        return values, indices

    def _screen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, columns, and the tokens of which a latent that is no candidate may be one of the k."""
        low = x.bfloat16()
        products = torch.addmm(self.low_b, low, self.low_rows.T, out=self._products[: len(x)])
        top = products.topk(self.candidates, dim=1, sorted=False)
        exact = _row_products(self.rows, x, top.indices).add_(self.b[top.indices])
        best = exact.topk(self.k, dim=1)
        indices = top.indices.gather(1, best.indices)
        if self.candidates == len(self.rows):
            return best.values, indices, indices.new_empty(0)
        limit = self._limit(x, low, top.values.amin(dim=1).float())
        # Not "<": a NaN makes its token uncertain.
        return best.values, indices, (~(best.values[:, -1] >= limit)).nonzero()[:, 0]

    def _limit(self, x: Tensor, low: Tensor, smallest: Tensor) -> Tensor:
        """Return for each token what no latent exceeds whose bfloat16 pre-activation is at most `smallest`."""
        norm, error = _norms_and_errors(x, low)
        bound = error * self.norm + (norm + error) * self.error + x.shape[1] * _SUMS * norm * self.norm
        return smallest + _ROUNDING * (smallest.abs() + self.bias) + bound + _TINY


def topk_encoder(W: Tensor, b: Tensor, k: int, tokens: int, max_tokens: int) -> DenseTopK | ScreenedTopK:
    """Return what chooses for `tokens` rows, `max_tokens` at a time: screened where that is faster."""
    d_model, d_sae = W.shape
    screens = W.dtype == torch.float32 and screening_pays(tokens, d_model, d_sae, k)
    return (ScreenedTopK if screens else DenseTopK)(W, b, k, max_tokens)


def screening_pays(tokens: int, d_model: int, d_sae: int, k: int) -> bool:
    """Return whether a float32 encoder gains: the processor has bfloat16 products, and this one is long enough."""
    is_large = tokens >= MIN_TOKENS and d_model >= MIN_D_MODEL and d_sae >= MIN_D_SAE * k
    return is_large and _has_bfloat16_products()


def _has_bfloat16_products() -> bool:
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _norms_and_errors(rows: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most that each row's length can be, and that of what rounding took from it."""
    errors = rows.new_empty(len(rows))
    for block in blocks(len(rows), BLOCK_ELEMENTS // rows.shape[1]):
        torch.linalg.vector_norm(rows[block] - low[block], dim=1, out=errors[block])
    return torch.linalg.vector_norm(rows, dim=1) + _TINY_LENGTH, errors + _TINY_LENGTH


def _row_products(rows: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Return x_t . rows[indices[t, j]]."""
    products = x.new_empty(indices.shape)
    token_blocks = blocks(len(x), BLOCK_ELEMENTS // (indices.shape[1] * x.shape[1]))
    gathered = x.new_empty(token_blocks[0].stop, indices.shape[1], x.shape[1])
    for block in token_blocks:
        chosen = gathered[: block.stop - block.start]
        torch.index_select(rows, 0, indices[block].flatten(), out=chosen.flatten(0, 1))
        torch.bmm(x[block, None], chosen.mT, out=products[block, None])
    return products
