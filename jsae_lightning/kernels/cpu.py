"""The sparse operations for processors: weight gradients touch k of d_sae latents, the Jacobian works in cache.

Only the encoder's forward product is dense. First derivatives only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Gathered rows of a block (tokens, k, d_mlp) should stay in a core's cache: 64 tokens x k 32 x d_mlp 512 is 4 MB.
BLOCK_ELEMENTS = 2**20


def _weighted_row_sum(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        pre_activations = torch.addmm(b_enc, x, W_enc)
        values, indices = pre_activations.topk(k, dim=1)
        values = values.to(torch.promote_types(values.dtype, torch.float32)).relu()
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


class _BilinearRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor
    ) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows_out, slope, rows_in, indices_out, indices_in)
        values = rows_out.new_empty(*indices_out.shape, indices_in.shape[1])
        for block in _blocks(indices_out, indices_in, rows_out.shape[1]):
            gathered_out, gathered_in = _gather(rows_out, indices_out[block]), _gather(rows_in, indices_in[block])
            values[block] = torch.bmm(gathered_out.mul_(slope[block][:, None]), gathered_in.mT)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows_out, slope, rows_in, indices_out, indices_in = ctx.saved_tensors
        grad_out, grad_in = torch.zeros_like(rows_out), torch.zeros_like(rows_in)
        grad_slope = torch.zeros_like(slope) if ctx.needs_input_grad[1] else None
        for block in _blocks(indices_out, indices_in, rows_out.shape[1]):
            gathered_out, gathered_in = _gather(rows_out, indices_out[block]), _gather(rows_in, indices_in[block])
            block_slope = slope[block][:, None]
            grad_scaled = torch.bmm(grad[block], gathered_in)
            if grad_slope is not None:
                grad_slope[block] = (grad_scaled * gathered_out).sum(dim=1)
            _scatter_add(grad_in, indices_in[block], torch.bmm(grad[block].mT, gathered_out.mul_(block_slope)))
            _scatter_add(grad_out, indices_out[block], grad_scaled.mul_(block_slope))
        return grad_out, grad_slope, grad_in, None, None


def _blocks(indices_out: Tensor, indices_in: Tensor, d_mlp: int) -> list[slice]:
    tokens, k = len(indices_out), max(indices_out.shape[1], indices_in.shape[1])
    size = max(1, BLOCK_ELEMENTS // (k * d_mlp))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _gather(rows: Tensor, indices: Tensor) -> Tensor:
    return rows.index_select(0, indices.flatten()).view(*indices.shape, -1)


def _scatter_add(total: Tensor, indices: Tensor, values: Tensor) -> None:
    total.index_add_(0, indices.flatten(), values.flatten(0, 1))


def bilinear_rows(rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor) -> Tensor:
    """See `kernels.bilinear_rows`."""
    return _BilinearRows.apply(rows_out, slope.to(rows_out.dtype), rows_in, indices_out, indices_in)
