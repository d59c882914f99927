"""The sparse operations in plain torch: short, differentiable any number of times, any dtype and device."""

from collections.abc import Callable, Sequence

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


def jacobian_values(
    encoder_rows: Tensor,
    decoder_rows: Tensor,
    W_out: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    indices_out: Tensor,
    indices_in: Tensor,
) -> Tensor:
    """See `kernels.jacobian_values`."""
    return projected(bilinear_rows, encoder_rows, decoder_rows, W_out, terms, indices_out, indices_in)


def projected(
    bilinear_rows: Callable[..., Tensor],
    encoder_rows: Tensor,
    decoder_rows: Tensor,
    W_out: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    indices_out: Tensor,
    indices_in: Tensor,
) -> Tensor:
    """Return the sum over terms of `bilinear_rows` on the projections e W_out^T and d weight of both dictionaries."""
    encoder_rows, indices_out = _gathered(encoder_rows, indices_out)
    decoder_rows, indices_in = _gathered(decoder_rows, indices_in)
    rows_out = (encoder_rows @ W_out.T).to(W_out.dtype)
    values = [
        bilinear_rows(rows_out, slope, (decoder_rows @ weight).to(weight.dtype), indices_out, indices_in)
        for weight, slope in terms
    ]
    return values[0] if len(values) == 1 else values[0] + values[1]


def _gathered(rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gather rows first when fewer are used than there are, so that a sentence does not project a whole dictionary."""
    if indices.numel() >= rows.shape[0]:
        return rows, indices
    return rows[indices.flatten()], torch.arange(indices.numel(), device=indices.device).view_as(indices)


def bilinear_rows(rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor) -> Tensor:
    """Return J[t, i, j] = sum_m rows_out[indices_out[t, i], m] slope[t, m] rows_in[indices_in[t, j], m]."""
    return torch.einsum("tim,tm,tjm->tij", rows_out[indices_out], slope.to(rows_out.dtype), rows_in[indices_in])
