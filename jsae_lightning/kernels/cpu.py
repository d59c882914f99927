"""The sparse autoencoder's operations for processors: weight gradients touch k of d_sae latents.

Only the encoder's forward product is dense. First derivatives only. The Jacobian is in `cpu_jacobian`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jsae_lightning.kernels.blocks import blocks
from jsae_lightning.kernels.cpu_jacobian import jacobian_values
from jsae_lightning.kernels.cpu_topk import topk_encoder

CHUNK_ELEMENTS = 2**24
"""Pre-activations that exist at a time: 64 MB in float32, 1,024 tokens of 16,384 latents."""

MIN_CHUNK_TOKENS = 512
"""With fewer tokens the product itself gets slower."""

__all__ = ["jacobian_values", "sparse_decode", "topk_encode"]


def _weighted_row_sum(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def chunk_tokens(tokens: int, d_sae: int) -> int:
    """Return of how many tokens the encoder holds the pre-activations at a time."""
    return min(tokens, max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // d_sae))


def _topk_of_chunks(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return relu of the k largest pre-activations and their indices; never holds all (tokens, d_sae) of them."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else W_enc.dtype
    x = x.to(dtype)
    values = x.new_empty(len(x), k, dtype=torch.promote_types(dtype, torch.float32))
    indices = torch.empty(len(x), k, dtype=torch.int64)
    size = chunk_tokens(len(x), W_enc.shape[1])
    encoder = topk_encoder(W_enc.to(dtype), b_enc.to(dtype), k, len(x), size)
    for chunk in blocks(len(x), size):
        values[chunk], indices[chunk] = encoder.topk(x[chunk])
    return values.relu_(), indices


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        values, indices = _topk_of_chunks(x, W_enc, b_enc, k)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, W_enc, values, indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor, _grad_indices: Tensor):  # type: ignore[override]
        x, W_enc, values, indices = ctx.saved_tensors
        grad_z = (grad_values * (values > 0)).to(W_enc.dtype)
        # z[t, j] = x_t . row(indices[t, j]): its gradient over the rows is that of a weighted sum of rows, whose own
        # backward is torch's sparse accumulation; only its output's gradient (here x) and the weights matter.
        with torch.enable_grad():
            rows = torch.empty_like(W_enc.T, memory_format=torch.contiguous_format).requires_grad_()
            bag = _weighted_row_sum(grad_z, indices, rows)
        (grad_rows,) = torch.autograd.grad(bag, rows, x.to(W_enc.dtype))
        grad_b = torch.zeros(W_enc.shape[1], dtype=W_enc.dtype).index_add_(0, indices.flatten(), grad_z.flatten())
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _weighted_row_sum(grad_z, indices, W_enc.T.contiguous()).to(x.dtype)
        return grad_x, grad_rows.T, grad_b, None


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.topk_encode`."""
    return _TopKEncode.apply(x, W_enc, b_enc, k)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See `kernels.sparse_decode`."""
    return _weighted_row_sum(values.to(W_dec.dtype), indices, W_dec)
