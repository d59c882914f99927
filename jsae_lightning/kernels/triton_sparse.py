"""Triton kernels for weighted sums of gathered rows: the TopK decoder and the weight gradients of both SAE halves.

Importing this file imports Triton; `kernels/triton.py` does so at the first use. Nothing here adds with atomics: what
is summed for one output is summed by one program in a fixed order, so a repeated run gives the same bits.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of 2,048 numbers, 16 for each thread of four warps: no shared memory to speak of on any card.
ROWS_PER_STEP, COLUMNS_PER_PROGRAM = 16, 128
ENTRIES_PER_STEP, SUMMED_COLUMNS_PER_PROGRAM = 32, 64


class Grouping(NamedTuple):
    """The (token, slot) entries of an index tensor in the order of the rows they name."""

    order: Tensor
    """Flat positions (tokens * k), int32; those of row r lie in [starts[r], starts[r + 1]), in ascending order."""
    starts: Tensor
    """(num_rows + 1), int32."""


def group_by_row(indices: Tensor, num_rows: int) -> Grouping:
    """Sort the entries of `indices` (tokens, k) by row, equal rows in the order of the tokens."""
    # 32-bit keys: a radix sort takes as many passes as the key has bytes.
    rows, order = torch.sort(indices.flatten().to(torch.int32), stable=True)
    bounds = torch.arange(num_rows + 1, dtype=torch.int32, device=indices.device)
    return Grouping(order.to(torch.int32), torch.searchsorted(rows, bounds, out_int32=True))


def sums_by_token(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return sum_j values[t, j] rows[indices[t, j]], (tokens, columns), in the dtype of `rows`.

    One program a token and 128 columns; it reads 16 rows at a time.
    """
    (tokens, k), columns = indices.shape, rows.shape[1]
    sums = rows.new_empty(tokens, columns)
    grid = (tokens, triton.cdiv(columns, COLUMNS_PER_PROGRAM))
    _sums_by_token[grid](
        sums, values.contiguous(), indices.contiguous(), rows.contiguous(), k, columns,
        ROWS=ROWS_PER_STEP, COLUMNS=COLUMNS_PER_PROGRAM, ACCUMULATE=accumulator(rows),
    )  # fmt: skip
    return sums


def products_by_token(vectors: Tensor, indices: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return vectors[t] . rows[indices[t, j]], (tokens, k), in `dtype`.

    One program a token and 16 rows; it walks over the columns.
    """
    (tokens, k), columns = indices.shape, rows.shape[1]
    products = rows.new_empty(tokens, k, dtype=dtype)
    grid = (tokens, triton.cdiv(k, ROWS_PER_STEP))
    _products_by_token[grid](
        products, vectors.contiguous(), indices.contiguous(), rows.contiguous(), k, columns,
        ROWS=ROWS_PER_STEP, COLUMNS=COLUMNS_PER_PROGRAM, ACCUMULATE=accumulator(rows),
    )  # fmt: skip
    return products


def sums_by_row(sums: Tensor, grouping: Grouping, vectors: Tensor, weights: Tensor | None = None) -> None:
    """Set sums[r] = sum over the entries (t, j) of row r of weights[t, j] vectors[t], zero if there are none.

    `sums` is (num_rows, columns), its rows contiguous; `weights` (tokens, k). Without `weights`, `vectors` has one row
    for each entry, and row r gets their sum. One program a row and 64 columns, whatever the number of entries: it adds
    32 at a time in the order of `grouping`. So a row that all tokens use is as reproducible as a rare one, but its
    programs run the longest.
    """
    num_rows, columns = sums.shape
    vectors, weights = vectors.contiguous(), None if weights is None else weights.contiguous()
    grid = (num_rows, triton.cdiv(columns, SUMMED_COLUMNS_PER_PROGRAM))
    _sums_by_row[grid](
        sums, *grouping, vectors, weights, 1 if weights is None else weights.shape[1],
        columns, sums.stride(0), vectors.stride(0),
        ENTRIES=ENTRIES_PER_STEP, COLUMNS=SUMMED_COLUMNS_PER_PROGRAM,
        WEIGHTED=weights is not None, ACCUMULATE=accumulator(sums),
    )  # fmt: skip


def accumulator(tensor: Tensor) -> tl.dtype:
    """Return the dtype of sums over `tensor`: at least float32."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


# `no_type_check`: Triton compiles a kernel from its source and its module's names, which a wrapper for checks of shapes
# at run time (in the tests) would hide.


@triton.jit
@no_type_check
def _sums_by_token(
    sums_ptr, values_ptr, indices_ptr, rows_ptr, k, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=ACCUMULATE)
    for first in range(0, k, ROWS):
        slots = first + tl.arange(0, ROWS)
        values = tl.load(values_ptr + token * k + slots, mask=slots < k, other=0.0).to(ACCUMULATE)
        rows = tl.load(indices_ptr + token * k + slots, mask=slots < k, other=0).to(tl.int64)
        mask = (slots < k)[:, None] & (columns < num_columns)[None, :]
        tile = tl.load(rows_ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(values[:, None] * tile.to(ACCUMULATE), axis=0)
    tl.store(sums_ptr + token * num_columns + columns, total, mask=columns < num_columns)


@triton.jit
@no_type_check
def _products_by_token(
    products_ptr, vectors_ptr, indices_ptr, rows_ptr, k, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(indices_ptr + token * k + slots, mask=slots < k, other=0).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATE)
    for first in range(0, num_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        vector = tl.load(vectors_ptr + token * num_columns + columns, mask=columns < num_columns, other=0.0)
        mask = (slots < k)[:, None] & (columns < num_columns)[None, :]
        tile = tl.load(rows_ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        total += vector.to(ACCUMULATE)[None, :] * tile.to(ACCUMULATE)
    tl.store(products_ptr + token * k + slots, tl.sum(total, axis=1), mask=slots < k)


@triton.jit
@no_type_check
def _sums_by_row(
    sums_ptr, order_ptr, starts_ptr, vectors_ptr, weights_ptr, k, num_columns, sums_stride, vectors_stride,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(starts_ptr + row + 1)
    total = tl.zeros((COLUMNS,), dtype=ACCUMULATE)
    for first in range(tl.load(starts_ptr + row), end, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        entries = tl.load(order_ptr + places, mask=places < end, other=0)
        vectors = (entries // k).to(tl.int64)
        mask = (places < end)[:, None] & (columns < num_columns)[None, :]
        tile = tl.load(vectors_ptr + vectors[:, None] * vectors_stride + columns[None, :], mask=mask, other=0.0)
        tile = tile.to(ACCUMULATE)
        if WEIGHTED:
            weights = tl.load(weights_ptr + entries, mask=places < end, other=0.0)
            tile *= weights.to(ACCUMULATE)[:, None]
        total += tl.sum(tile, axis=0)
    tl.store(sums_ptr + row * sums_stride + columns, total, mask=columns < num_columns)
