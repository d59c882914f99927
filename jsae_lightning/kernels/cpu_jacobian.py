"""The Jacobian for processors: J of all tokens is whole, everything of (tokens, k, d_mlp) lives in cache-sized blocks.

    P = encoder_rows W_out^T,   Q = decoder_rows weight
    J[t, i, j] = sum over terms and m of P[i, m] slope[t, m] Q[j, m]        (i, j: latents of token t)

The products for P, Q and their gradients are dense, but only over latents that some token uses; they are made for a
slice of d_mlp at a time where P, Q and their gradients would be larger than the rest of a training step. First
derivatives only; every sum runs in a fixed order, so results repeat bit for bit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**19
"""Of a block's gathered rows: 8 tokens at k 32 and d_mlp 2048, 2 MB in float32, which stay in cache."""

DENSE_SHARE = 0.8
"""With a larger share of the latents in use all are projected: to copy the used ones would cost more."""

Terms = Sequence[tuple[Tensor, Tensor]]


class _Rows(NamedTuple):
    """The rows of a dictionary that some token uses, and the tokens' indices among them."""

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
    return _Rows(rows[used], (is_used.cumsum(0) - 1)[indices], used, len(rows))


def num_slices(tokens: int, d_model: int, d_mlp: int, terms: int) -> int:
    """Return into how many slices of d_mlp the projections are cut.

    P, Q and their gradients are 2 (1 + terms) tensors of (d_sae, d_mlp). They take the place of what a training step
    needs at another time, two tensors of (tokens, d_sae) and two weights' gradients of (d_sae, d_model):

        (1 + terms) d_mlp / slices <= tokens + d_model
    """
    return min(d_mlp, -(-(1 + terms) * d_mlp // (tokens + d_model)))


class _Part(NamedTuple):
    """What belongs to a slice of the MLP's hidden units."""

    P: Tensor
    Qs: list[Tensor]
    W_out: Tensor
    weights: list[Tensor]
    slopes: list[Tensor]


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
                part = ctx.last or _project(ctx.out, ctx.in_, W_out, terms, units, ctx.dtype)
                ctx.last = None
                grad_P, grad_Qs = _projection_gradients(
                    grad, part, ctx.out.indices, ctx.in_.indices, [total[:, units] for total in grad_slopes]
                )
                grad_out = _add_product(grad_out, grad_P, part.W_out, ctx.dtype)
                for grad_Q, weight in zip(grad_Qs, part.weights, strict=True):
                    grad_in = _add_product(grad_in, grad_Q, weight.T, ctx.dtype)
                del part, grad_P, grad_Qs, grad_Q
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
    size = -(-d_mlp // num_slices(tokens, d_model, d_mlp, len(terms) // 2))
    return [slice(start, min(start + size, d_mlp)) for start in range(0, d_mlp, size)]


def _project(out: _Rows, in_: _Rows, W_out: Tensor, terms: Sequence[Tensor], units: slice, dtype: torch.dtype) -> _Part:
    weights = [weight[:, units] for weight in terms[: len(terms) // 2]]
    slopes = [slope[:, units] for slope in terms[len(terms) // 2 :]]
    P = _product(out.rows, W_out[units].T, dtype)
    return _Part(P, [_product(in_.rows, weight, dtype) for weight in weights], W_out[units], weights, slopes)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b in the dtype of b, computed in `dtype`."""
    return (a.to(dtype) @ b.to(dtype)).to(b.dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + a b, in the place of `total`; None is zero."""
    if total is None:
        return _product(a, b, dtype)
    return total.addmm_(a, b) if dtype == total.dtype else total.add_(a.to(dtype) @ b.to(dtype))


class _Workspace:
    """A block's tensors, made once: allocating some megabytes anew for each block costs as much as its sums."""

    def __init__(self, blocks: list[slice], part: _Part, k_out: int, k_in: int, *, gradients: bool = False) -> None:
        tokens = blocks[0].stop if blocks else 0

        def rows(k: int) -> Tensor:
            return part.P.new_empty(tokens, k, part.P.shape[1])

        self.rows_out, self.rows_in = rows(k_out), rows(k_in)
        # Where nothing needs the unscaled rows afterwards they are scaled in place.
        self.scaled_out = rows(k_out) if gradients or len(part.Qs) > 1 else self.rows_out
        if gradients:
            self.grad_in, self.grad_scaled = rows(k_in), rows(k_out)


def _add_values(values: Tensor, part: _Part, indices_out: Tensor, indices_in: Tensor) -> None:
    blocks = _blocks(indices_out, indices_in, part.P.shape[1])
    work = _Workspace(blocks, part, indices_out.shape[1], indices_in.shape[1])
    for block in blocks:
        rows_out = _gather(part.P, indices_out[block], work.rows_out)
        scaled = work.scaled_out[: len(rows_out)]
        for Q, slope in zip(part.Qs, part.slopes, strict=True):
            torch.mul(rows_out, slope[block][:, None], out=scaled)
            values[block].baddbmm_(scaled, _gather(Q, indices_in[block], work.rows_in).mT)


def _projection_gradients(
    grad: Tensor, part: _Part, indices_out: Tensor, indices_in: Tensor, grad_slopes: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of P and of each Q; fill `grad_slopes` where it is not empty."""
    grad_P, grad_Qs = torch.zeros_like(part.P), [torch.zeros_like(Q) for Q in part.Qs]
    blocks = _blocks(indices_out, indices_in, part.P.shape[1])
    work = _Workspace(blocks, part, indices_out.shape[1], indices_in.shape[1], gradients=True)
    for block in blocks:
        grad_block = grad[block]
        rows_out = _gather(part.P, indices_out[block], work.rows_out)
        scaled, grad_scaled, grad_in = (t[: len(rows_out)] for t in (work.scaled_out, work.grad_scaled, work.grad_in))
        for term, (Q, slope) in enumerate(zip(part.Qs, part.slopes, strict=True)):
            block_slope = slope[block][:, None]
            torch.mul(rows_out, block_slope, out=scaled)
            torch.bmm(grad_block.mT, scaled, out=grad_in)
            _add_rows(grad_Qs[term], indices_in[block], grad_in)
            torch.bmm(grad_block, _gather(Q, indices_in[block], work.rows_in), out=grad_scaled)
            if grad_slopes:
                grad_slopes[term][block] = torch.mul(grad_scaled, rows_out, out=scaled).sum(dim=1)
            _add_rows(grad_P, indices_out[block], grad_scaled.mul_(block_slope))
    return grad_P, grad_Qs


def _blocks(indices_out: Tensor, indices_in: Tensor, d_mlp: int) -> list[slice]:
    tokens, k = len(indices_out), max(indices_out.shape[1], indices_in.shape[1])
    size = max(1, BLOCK_ELEMENTS // (k * d_mlp))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _gather(rows: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    out = out[: len(indices)]
    torch.index_select(rows, 0, indices.flatten(), out=out.flatten(0, 1))
    return out


def _add_rows(total: Tensor, indices: Tensor, values: Tensor) -> None:
    total.index_add_(0, indices.flatten(), values.flatten(0, 1))
