"""The sparse operations in plain torch: short, differentiable any number of times, any dtype and device."""

import torch
from torch import Tensor


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.topk_encode`."""
    values, indices = torch.addmm(b_enc, x, W_enc).topk(k, dim=1)
    # Under autocast the product is bfloat16; everything after the choice is at least float32.
    return values.to(torch.promote_types(values.dtype, torch.float32)).relu(), indices


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See `kernels.sparse_decode`."""
    return (values.to(W_dec.dtype)[:, :, None] * W_dec[indices]).sum(dim=1)


def bilinear_rows(rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor) -> Tensor:
    """See `kernels.bilinear_rows`."""
    return torch.einsum("tim,tm,tjm->tij", rows_out[indices_out], slope.to(rows_out.dtype), rows_in[indices_in])
