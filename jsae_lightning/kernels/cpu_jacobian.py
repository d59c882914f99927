"""The Jacobian for processors: J of all tokens is whole, everything of (tokens, k, d_mlp) lives in cache-sized blocks.

    P = encoder_rows W_out^T,   Q = decoder_rows weight
    J[t, i, j] = sum over terms and m of P[i, m] slope[t, m] Q[j, m]        (i, j: latents of token t)

The products for P, Q and their gradients are dense, but only over latents that some token uses; they are made for a
slice of d_mlp at a time where P, Q and their gradients would be larger than the rest of a training step.

Within a block each thread has its own part of the hidden units: all that is gathered from P and Q, and their
gradients, are (parts, ..., units of a part), and torch shares out the operations along the first dimension, so that no
thread reads what another wrote; where they have no cache in common, that is worth half the time.

First derivatives only; every sum runs in a fixed order, so results repeat bit for bit with the same number of threads.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jsae_lightning.kernels.blocks import blocks
from jsae_lightning.kernels.cpu_products import add_product_, product

BLOCK_ELEMENTS = 2**20
"""Of a block's gathered rows: 16 tokens at k 32 and d_mlp 2048, 4 MB in float32, which stay in cache."""

PART_MULTIPLE = 64
"""Of hidden units in a slice, so that it can be cut into equal parts."""

MIN_PART_UNITS = 256
"""With fewer hidden units a part's rows are too short to be gathered at the memory's speed."""

DENSE_SHARE = 0.8
"""With a larger share of the latents in use all are projected: to copy the used ones would cost more."""

USED_STEPS = 32
"""Numbers of rows that may be projected, of a dictionary: others are padded with unused ones.

oneDNN keeps what it has prepared for each shape of a product, for ever and scattered over the heap: with as many shapes
as there are numbers of used latents a training's memory would grow from step to step.
"""

BLOCK_ROWS = 4096
"""Of a dictionary, that are rounded and multiplied at a time under autocast."""

Terms = Sequence[tuple[Tensor, Tensor]]


class _Rows(NamedTuple):
    """The rows of a dictionary that some token uses, perhaps with some more, and the tokens' indices among them."""

    rows: Tensor
    indices: Tensor
    used: Tensor | None
    """Which of the dictionary's rows; None: all."""
    total: int
    """Rows in the dictionary."""

    def expand(self, grad: Tensor) -> Tensor:
        """Return the gradient of the whole dictionary."""
        return grad if self.used is None else grad.new_zeros(self.total, grad.shape[1]).index_copy_(0, self.used, grad)


def _used_rows(rows: Tensor, indices: Tensor) -> _Rows:
    is_used = torch.zeros(len(rows), dtype=torch.bool)
    is_used[indices.flatten()] = True
    if int(is_used.sum()) > DENSE_SHARE * len(rows):
        return _Rows(rows, indices, None, len(rows))
    used = is_used.nonzero()[:, 0]
    padding = -len(used) % max(1, len(rows) // USED_STEPS)
    used = torch.cat([used, (~is_used).nonzero()[:padding, 0]])
    return _Rows(rows[used], (is_used.cumsum(0) - 1)[indices], used, len(rows))


def num_slices(tokens: int, d_model: int, d_mlp: int, terms: int) -> int:
    """Return into how many slices of d_mlp the projections are cut.

    P, Q and their gradients are 2 (1 + terms) tensors of (d_sae, d_mlp). They take the place of what a training step
    needs at another time, two tensors of (tokens, d_sae) and two weights' gradients of (d_sae, d_model):

        (1 + terms) d_mlp / slices <= tokens + d_model
    """
    return min(d_mlp, -(-(1 + terms) * d_mlp // (tokens + d_model)))


def slice_units(tokens: int, d_model: int, d_mlp: int, terms: int) -> int:
    """Return the hidden units of a slice (the last one may have fewer): a multiple of 64, which parts divide."""
    size = -(-d_mlp // num_slices(tokens, d_model, d_mlp, terms))
    return min(d_mlp, -(-size // PART_MULTIPLE) * PART_MULTIPLE) if size > PART_MULTIPLE else size


def num_parts(units: int, threads: int) -> int:
    """Return into how many parts of equal size the hidden units of a slice are cut: at most one a thread."""
    return next(n for n in range(max(1, min(threads, units // MIN_PART_UNITS)), 0, -1) if units % n == 0)


class _Projections(NamedTuple):
    """The projected dictionaries, and what else belongs to a slice of the hidden units, in parts."""

    P: Tensor
    """(rows of the output SAE, parts, units of a part)."""
    Qs: list[Tensor]
    W_out: Tensor
    """(units, d_model)."""
    weights: list[Tensor]
    slopes: list[Tensor]
    """(parts, tokens, 1, units of a part)."""


class _JacobianValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, encoder_rows, decoder_rows, W_out, indices_out, indices_in, *terms):  # type: ignore[override]
        ctx.save_for_backward(W_out, *terms)
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else W_out.dtype
        with torch.autocast("cpu", enabled=False):
            ctx.out, ctx.in_ = _used_rows(encoder_rows, indices_out), _used_rows(decoder_rows, indices_in)
            values = W_out.new_zeros(*indices_out.shape, indices_in.shape[1])
            for units in _slices(len(values), W_out, terms):
                ctx.last = None  # frees the slice before
                ctx.last = _project(ctx.out, ctx.in_, W_out, terms, units, ctx.dtype)
                _add_values(values, ctx.last, ctx.out.indices, ctx.in_.indices)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        W_out, *terms = ctx.saved_tensors
        num_terms = len(terms) // 2
        grad_out = grad_in = None
        needs_slopes = any(ctx.needs_input_grad[5 + num_terms :])
        grad_slopes = [torch.zeros_like(slope) for slope in terms[num_terms:]] if needs_slopes else []
        with torch.autocast("cpu", enabled=False):
            for units in reversed(_slices(len(grad), W_out, terms)):
                # The forward pass ended with the last slice and kept it; the others are made again.
                projections = ctx.last or _project(ctx.out, ctx.in_, W_out, terms, units, ctx.dtype)
                ctx.last = None
                grad_P, grad_Qs = _projection_gradients(
                    grad, projections, ctx.out.indices, ctx.in_.indices, [total[:, units] for total in grad_slopes]
                )
                grad_out = _add_products(grad_out, grad_P, projections.W_out, ctx.dtype)
                for grad_Q, weight in zip(grad_Qs, projections.weights, strict=True):
                    grad_in = _add_products(grad_in, grad_Q, weight.T, ctx.dtype)
                del projections, grad_P, grad_Qs, grad_Q
        slopes = grad_slopes or [None] * num_terms
        return ctx.out.expand(grad_out), ctx.in_.expand(grad_in), *[None] * (3 + num_terms), *slopes


def jacobian_values(
    encoder_rows: Tensor, decoder_rows: Tensor, W_out: Tensor, terms: Terms, indices_out: Tensor, indices_in: Tensor
) -> Tensor:
    """See `kernels.jacobian_values`."""
    weights, slopes = zip(*terms, strict=True)
    return _JacobianValues.apply(
        encoder_rows, decoder_rows, W_out, indices_out, indices_in, *weights, *(s.to(W_out.dtype) for s in slopes)
    )


def _slices(tokens: int, W_out: Tensor, terms: Sequence[Tensor]) -> list[slice]:
    d_mlp, d_model = W_out.shape
    return blocks(d_mlp, slice_units(tokens, d_model, d_mlp, len(terms) // 2))


def _project(
    out: _Rows, in_: _Rows, W_out: Tensor, terms: Sequence[Tensor], units: slice, dtype: torch.dtype
) -> _Projections:
    weights = [weight[:, units] for weight in terms[: len(terms) // 2]]
    parts = num_parts(weights[0].shape[1], torch.get_num_threads())
    P, *Qs = (
        _products(rows, weight, dtype).unflatten(1, (parts, -1))
        for rows, weight in [(out.rows, W_out[units].T), *((in_.rows, weight) for weight in weights)]
    )
    slopes = [_in_parts(slope[:, units], parts) for slope in terms[len(terms) // 2 :]]
    return _Projections(P, Qs, W_out[units], weights, slopes)


def _in_parts(columns: Tensor, parts: int) -> Tensor:
    """Return a view of (tokens, units) as (parts, tokens, 1, units of a part)."""
    return columns.unflatten(1, (parts, -1)).transpose(0, 1)[:, :, None]


def _products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b in the dtype of b, computed in `dtype`."""
    if dtype == b.dtype:
        return product(a, b)
    products, rounded = b.new_empty(len(a), b.shape[1]), b.to(dtype)
    for rows in blocks(len(a), BLOCK_ROWS):
        products[rows] = a[rows].to(dtype) @ rounded
    return products


def _add_products(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + the sum over parts of a[part] b[part], in the place of `total`; None is zero."""
    for part, rows in zip(a, b.chunk(len(a)), strict=True):
        if total is None:
            total = _products(part, rows, dtype)
        elif dtype == total.dtype:
            add_product_(total, part, rows)
        else:
            total.add_(_products(part, rows, dtype))
    assert total is not None
    return total


class _Latents(NamedTuple):
    """Which rows a block's tokens use of P or Q and of its gradient, in the order of parts, tokens and latents."""

    indices: Tensor
    """Of P or Q, (rows, parts, units of a part)."""
    grad_indices: Tensor
    """Of its gradient, (parts, rows, units of a part)."""
    shape: tuple[int, int, int]
    """Parts, tokens, k."""

    def gather(self, rows: Tensor, out: Tensor) -> Tensor:
        """Return the rows, (parts, tokens, k, units of a part), in the memory of the flat `out`."""
        gathered = _view(out, *self.shape, rows.shape[2])
        torch.index_select(rows.flatten(0, 1), 0, self.indices, out=gathered.flatten(0, 2))
        return gathered

    def add_to(self, grad_rows: Tensor, values: Tensor) -> None:
        """Add what `gather` has the gradient `values` of."""
        grad_rows.flatten(0, 1).index_add_(0, self.grad_indices, values.flatten(0, 2))


def _latents(indices: Tensor, rows: Tensor) -> _Latents:
    total, parts, _ = rows.shape
    part, flat = torch.arange(parts)[:, None], indices.flatten()
    return _Latents((flat * parts + part).flatten(), (flat + total * part).flatten(), (parts, *indices.shape))


def _view(flat: Tensor, *shape: int) -> Tensor:
    return flat[: math.prod(shape)].view(shape)


def _workspace(projections: _Projections, token_blocks: list[slice], k: int, count: int) -> list[Tensor]:
    """Return flat tensors that hold a block's rows: made once, for to allocate them anew costs as much as their sums.

    As few as can be: each keeps another out of the cache.
    """
    tokens = token_blocks[0].stop if token_blocks else 0
    return [projections.P.new_empty(tokens * k * projections.W_out.shape[0]) for _ in range(count)]


def _add_values(values: Tensor, projections: _Projections, indices_out: Tensor, indices_in: Tensor) -> None:
    k_out, k_in = indices_out.shape[1], indices_in.shape[1]
    token_blocks = blocks(len(values), BLOCK_ELEMENTS // (max(k_out, k_in) * projections.W_out.shape[0]))
    work_out, work_in, *work_scaled = _workspace(
        projections, token_blocks, max(k_out, k_in), 2 if len(projections.Qs) == 1 else 3
    )
    for block in token_blocks:
        out, in_ = _latents(indices_out[block], projections.P), _latents(indices_in[block], projections.Qs[0])
        rows_out = out.gather(projections.P, work_out)
        scaled = _view(work_scaled[0], *rows_out.shape) if work_scaled else rows_out
        for Q, slope in zip(projections.Qs, projections.slopes, strict=True):
            torch.mul(rows_out, slope[:, block], out=scaled)
            products = torch.bmm(scaled.flatten(0, 1), in_.gather(Q, work_in).flatten(0, 1).mT)
            values[block] += products.unflatten(0, out.shape[:2]).sum(dim=0)


def _projection_gradients(
    grad: Tensor, projections: _Projections, indices_out: Tensor, indices_in: Tensor, grad_slopes: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of P and of each Q; fill `grad_slopes` where it is not empty."""
    grad_P, *grad_Qs = (rows.new_zeros(rows.transpose(0, 1).shape) for rows in (projections.P, *projections.Qs))
    k_out, k_in = indices_out.shape[1], indices_in.shape[1]
    token_blocks = blocks(len(grad), BLOCK_ELEMENTS // (max(k_out, k_in) * projections.W_out.shape[0]))
    keeps_rows = bool(grad_slopes) or len(projections.Qs) > 1
    work, work_grad, *work_out = _workspace(projections, token_blocks, max(k_out, k_in), 3 if keeps_rows else 2)
    for block in token_blocks:
        out, in_ = _latents(indices_out[block], projections.P), _latents(indices_in[block], projections.Qs[0])
        rows_out = out.gather(projections.P, work_out[0]) if keeps_rows else None
        grad_block = grad[block].repeat(len(grad_P), 1, 1)
        for term, (Q, slope) in enumerate(zip(projections.Qs, projections.slopes, strict=True)):
            slope_block = slope[:, block]
            grad_scaled = _view(work_grad, *out.shape, Q.shape[2])
            torch.bmm(grad_block, in_.gather(Q, work).flatten(0, 1), out=grad_scaled.flatten(0, 1))
            scaled = _view(work, *grad_scaled.shape)
            if grad_slopes and rows_out is not None:
                sums = torch.mul(grad_scaled, rows_out, out=scaled).sum(dim=2)
                _in_parts(grad_slopes[term], len(grad_P))[:, block, 0] = sums
            out.add_to(grad_P, grad_scaled.mul_(slope_block))
            torch.mul(out.gather(projections.P, work) if rows_out is None else rows_out, slope_block, out=scaled)
            grad_in = _view(work_grad, *in_.shape, Q.shape[2])
            torch.bmm(grad_block.mT, scaled.flatten(0, 1), out=grad_in.flatten(0, 1))
            in_.add_to(grad_Qs[term], grad_in)
    return grad_P, grad_Qs
