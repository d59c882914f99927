"""Triton kernels for the Jacobian's entries, J[t, i, j] = sum_m A[t, i, m] slope[t, m] B[t, j, m], and its gradients.

A = rows_out[indices_out] and B = rows_in[indices_in] are (tokens, k, d_mlp) and never exist: every program gathers the
tiles it multiplies. With G the gradient by J,

    dA[t, i, m] = slope[t, m] sum_j G[t, i, j] B[t, j, m]          dB[t, j, m] = slope[t, m] sum_i G[t, i, j] A[t, i, m]
    dslope[t, m] = sum_ij A[t, i, m] G[t, i, j] B[t, j, m]

and the gradient of a row of the tables is the sum of dA or dB over the entries that name it. Those sums are taken a
slice of columns at a time: dA of the slice goes to a workspace of `WORKSPACE_BYTES`, and `sums_by_row` adds it up in a
fixed order. To compute an entry where it is summed would instead read k rows for each of the tokens * k entries.

Importing this file imports Triton; `kernels/triton.py` does so at the first use.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from jsae_lightning.kernels.triton import interpreted
from jsae_lightning.kernels.triton_sparse import accumulator, group_by_row, sums_by_row

WORKSPACE_BYTES = 2**27
"""Of the gradients by gathered rows; at least `MIN_COLUMNS` columns of each entry are kept, however many there are."""
MIN_COLUMNS = 64
MAX_SLOTS, COLUMNS_PER_STEP = 64, 64


def bilinear_forward(
    rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return J (tokens, k_out, k_in) in `dtype`; the products take the dtype of the rows and add in at least float32.

    One program a token and up to 64 x 64 entries of J; it walks over d_mlp, 64 columns at a time.
    """
    (tokens, k_out), k_in = indices_out.shape, indices_in.shape[1]
    values = rows_out.new_empty(tokens, k_out, k_in, dtype=dtype)
    slots_out, slots_in = _slots(k_out), _slots(k_in)
    grid = (tokens, triton.cdiv(k_out, slots_out), triton.cdiv(k_in, slots_in))
    _bilinear_forward[grid](
        values, rows_out, slope, rows_in, indices_out, indices_in, k_out, k_in, rows_out.shape[1],
        OUT=slots_out, IN=slots_in, COLUMNS=COLUMNS_PER_STEP,
        PRECISION=dot_precision(rows_out), MULTIPLY=dot_dtype(rows_out), ACCUMULATE=accumulator(rows_out), num_stages=2,
    )  # fmt: skip
    return values


def gradient_of_rows(
    grad: Tensor, rows: Tensor, indices: Tensor, slope: Tensor, own_indices: Tensor, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """Return the gradient (num_rows, d_mlp) of one of the two tables of rows, in `dtype`.

    `grad` is the gradient by J with the slots of that table (`own_indices`) first: (tokens, own k, other k), of any
    strides; `rows` and `indices` are the other table. Deterministic: see `sums_by_row`.
    """
    d_mlp, entries = rows.shape[1], own_indices.numel()
    grads = rows.new_empty(num_rows, d_mlp, dtype=dtype)
    grouping = group_by_row(own_indices, num_rows)
    fitting = WORKSPACE_BYTES // max(1, entries * rows.element_size())
    width = min(d_mlp, max(1, fitting // MIN_COLUMNS) * MIN_COLUMNS)
    # In the dtype of the rows: under autocast, each entry is rounded as a product of torch's would be; sums are not.
    workspace = rows.new_empty(entries, width)
    for start in range(0, d_mlp, width):
        columns = slice(start, min(start + width, d_mlp))
        _entry_gradients(grad, rows, indices, slope, columns, workspace)
        sums_by_row(grads[:, columns], grouping, workspace)
    return grads


def _entry_gradients(
    grad: Tensor, rows: Tensor, indices: Tensor, slope: Tensor, columns: slice, workspace: Tensor
) -> None:
    """Set workspace[(t, a)] = slope[t] * sum_b grad[t, a, b] rows[indices[t, b]], the given columns of it."""
    tokens, k_own, k_other = grad.shape
    width = columns.stop - columns.start
    _gradient_by_gathered_rows[(tokens, triton.cdiv(width, COLUMNS_PER_STEP), triton.cdiv(k_own, _slots(k_own)))](
        workspace, grad, rows, indices, slope, k_own, k_other, rows.shape[1], columns.start, width,
        workspace.stride(0), *grad.stride(),
        OWN=_slots(k_own), OTHER=_slots(k_other), COLUMNS=COLUMNS_PER_STEP,
        PRECISION=dot_precision(rows), MULTIPLY=dot_dtype(rows), ACCUMULATE=accumulator(rows), num_stages=2,
    )  # fmt: skip


def gradient_of_slope(
    grad: Tensor, rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor
) -> Tensor:
    """Return the gradient (tokens, d_mlp) of the slope, in its dtype: one program a token and 64 columns."""
    (tokens, k_out), k_in, d_mlp = indices_out.shape, indices_in.shape[1], rows_out.shape[1]
    grad_slope = torch.empty_like(slope)
    _gradient_of_slope[(tokens, triton.cdiv(d_mlp, COLUMNS_PER_STEP))](
        grad_slope, grad, rows_out, rows_in, indices_out, indices_in, k_out, k_in, d_mlp, *grad.stride(),
        OUT=_slots(k_out), IN=_slots(k_in), COLUMNS=COLUMNS_PER_STEP,
        PRECISION=dot_precision(rows_out), MULTIPLY=dot_dtype(rows_out), ACCUMULATE=accumulator(rows_out), num_stages=2,
    )  # fmt: skip
    return grad_slope


def _slots(k: int) -> int:
    """Slots of a tile: a power of two from 16, the least that matrix units take; what is beyond k is masked."""
    return min(MAX_SLOTS, max(16, triton.next_power_of_2(k)))


def dot_precision(rows: Tensor) -> str:
    """Return how float32 products are taken: as torch's own on the same device, TF32 only where that is allowed."""
    if rows.dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # newer torch; it follows the older switches, which must not be read with it
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def dot_dtype(rows: Tensor) -> tl.dtype:
    """Return the dtype of the factors, that of the rows; the interpreter multiplies no bfloat16, so float32 there."""
    if rows.dtype == torch.bfloat16:
        return tl.float32 if interpreted() else tl.bfloat16
    return {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16}[rows.dtype]


@triton.jit
@no_type_check
def _bilinear_forward(
    values_ptr, rows_out_ptr, slope_ptr, rows_in_ptr, indices_out_ptr, indices_in_ptr, k_out, k_in, d_mlp,
    OUT: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slots_out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    slots_in = tl.program_id(2) * IN + tl.arange(0, IN)
    rows_out = tl.load(indices_out_ptr + token * k_out + slots_out, mask=slots_out < k_out, other=0).to(tl.int64)
    rows_in = tl.load(indices_in_ptr + token * k_in + slots_in, mask=slots_in < k_in, other=0).to(tl.int64)
    total = tl.zeros((OUT, IN), dtype=ACCUMULATE)
    for first in range(0, d_mlp, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns < d_mlp)[None, :]
        slope = tl.load(slope_ptr + token * d_mlp + columns, mask=columns < d_mlp, other=0.0).to(ACCUMULATE)
        tile_out = tl.load(
            rows_out_ptr + rows_out[:, None] * d_mlp + columns[None, :],
            mask=(slots_out < k_out)[:, None] & inside,
            other=0.0,
        )
        tile_in = tl.load(
            rows_in_ptr + rows_in[:, None] * d_mlp + columns[None, :],
            mask=(slots_in < k_in)[:, None] & inside,
            other=0.0,
        )
        left = (tile_out.to(ACCUMULATE) * slope[None, :]).to(tile_out.dtype).to(MULTIPLY)
        right = tl.trans(tile_in).to(MULTIPLY)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=ACCUMULATE)
    places = (token * k_out + slots_out)[:, None] * k_in + slots_in[None, :]
    tl.store(values_ptr + places, total, mask=(slots_out < k_out)[:, None] & (slots_in < k_in)[None, :])


@triton.jit
@no_type_check
def _grad_times_rows(
    grad_ptr, rows_ptr, indices_ptr, token, slots, columns, k_own, k_other, d_mlp, inside,
    grad_stride_token, grad_stride_own, grad_stride_other,
    OWN: tl.constexpr, OTHER: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Sum over b of grad[token, a, b] rows[indices[token, b]]: a tile (OWN, COLUMNS)."""
    total = tl.zeros((OWN, COLUMNS), dtype=ACCUMULATE)
    for first in range(0, k_other, OTHER):
        others = first + tl.arange(0, OTHER)
        rows = tl.load(indices_ptr + token * k_other + others, mask=others < k_other, other=0).to(tl.int64)
        tile = tl.load(
            rows_ptr + rows[:, None] * d_mlp + columns[None, :],
            mask=(others < k_other)[:, None] & inside[None, :],
            other=0.0,
        )
        grad = tl.load(
            grad_ptr + token * grad_stride_token
            + slots[:, None] * grad_stride_own + others[None, :] * grad_stride_other,
            mask=(slots < k_own)[:, None] & (others < k_other)[None, :],
            other=0.0,
        )  # fmt: skip
        left, right = grad.to(tile.dtype).to(MULTIPLY), tile.to(MULTIPLY)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=ACCUMULATE)
    return total


@triton.jit
@no_type_check
def _gradient_by_gathered_rows(
    workspace_ptr, grad_ptr, rows_ptr, indices_ptr, slope_ptr, k_own, k_other, d_mlp, first_column, width,
    workspace_stride, grad_stride_token, grad_stride_own, grad_stride_other,
    OWN: tl.constexpr, OTHER: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slots = tl.program_id(2) * OWN + tl.arange(0, OWN)
    columns, inside = first_column + places, places < width
    total = _grad_times_rows(
        grad_ptr, rows_ptr, indices_ptr, token, slots, columns, k_own, k_other, d_mlp, inside,
        grad_stride_token, grad_stride_own, grad_stride_other, OWN, OTHER, COLUMNS,
        PRECISION, MULTIPLY, ACCUMULATE,
    )  # fmt: skip
    slope = tl.load(slope_ptr + token * d_mlp + columns, mask=inside, other=0.0).to(ACCUMULATE)
    tl.store(
        workspace_ptr + (token * k_own + slots)[:, None] * workspace_stride + places[None, :],
        total * slope[None, :],
        mask=(slots < k_own)[:, None] & inside[None, :],
    )


@triton.jit
@no_type_check
def _gradient_of_slope(
    grad_slope_ptr, grad_ptr, rows_out_ptr, rows_in_ptr, indices_out_ptr, indices_in_ptr, k_out, k_in, d_mlp,
    grad_stride_token, grad_stride_out, grad_stride_in,
    OUT: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_mlp
    total = tl.zeros((COLUMNS,), dtype=ACCUMULATE)
    for first in range(0, k_out, OUT):
        slots = first + tl.arange(0, OUT)
        scaled = _grad_times_rows(
            grad_ptr, rows_in_ptr, indices_in_ptr, token, slots, columns, k_out, k_in, d_mlp, inside,
            grad_stride_token, grad_stride_out, grad_stride_in, OUT, IN, COLUMNS,
            PRECISION, MULTIPLY, ACCUMULATE,
        )  # fmt: skip
        rows = tl.load(indices_out_ptr + token * k_out + slots, mask=slots < k_out, other=0).to(tl.int64)
        tile = tl.load(
            rows_out_ptr + rows[:, None] * d_mlp + columns[None, :],
            mask=(slots < k_out)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(scaled * tile.to(ACCUMULATE), axis=0)
    tl.store(grad_slope_ptr + token * d_mlp + columns, total, mask=inside)
