"""The sparse operations for CUDA devices, in Triton: gradients touch k of d_sae latents, nothing is (tokens, k, d_mlp).

Only the encoder's forward product is dense, and it is torch's. float32, float64, bfloat16 and float16; sums are taken
in at least float32, float32 products in TF32 only where torch's own are. First derivatives only. Gradients are the same
bits every time on the same card: each is a sum that one program takes in a fixed order, without atomics.

What is known: values and gradients agree with `reference.py` in Triton's interpreter, and the kernels compile for
compute capabilities 8.0, 8.6 and 9.0 within 64 KB of shared memory. None has run on a card yet.

Triton itself is imported when the first kernel runs: this file costs no start-up time and imports without Triton.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jsae_lightning.errors import UserError
from jsae_lightning.kernels import reference

OLDEST_CAPABILITY = (8, 0)
"""The oldest compute capability that Triton supports; bfloat16 begins there too."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, so on CPU tensors too: `TRITON_INTERPRET=1`, slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_unavailable() -> str | None:
    """Return what these kernels lack on this machine, with the remedy; None if they can run."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton, or choose kernels=auto"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device: choose kernels=auto"
    if (found := torch.cuda.get_device_capability()) < OLDEST_CAPABILITY:
        return f"this GPU's compute capability is {found[0]}.{found[1]}, below 8.0: choose kernels=reference"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler: install gcc or set CC, or choose kernels=reference"
    if not (header := _python_header()).is_file():
        return f"Triton needs {header}, which is not there: install python3-dev, or choose kernels=reference"
    return None


def _python_header() -> Path:
    """Return the header that Triton compiles its driver with, where it looks for it."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]) / "Python.h"


def _on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, where Triton launches; raise UserError for a tensor on the CPU."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if interpreted():
        return nullcontext()
    raise UserError(f"kernels: triton works on CUDA devices, and this tensor lies on {tensor.device}: choose auto")


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        # torch's own top-k: a radix select that reads each row a few times whatever k is, chooses the same of equal
        # entries as the reference on the same card, and repeats. A sorting network in Triton does work that grows
        # with log^2 k for each of the d_sae entries; whether it is faster can only be told on a card.
        values, indices = torch.addmm(b_enc, x, W_enc).topk(k, dim=1)
        values = values.to(torch.promote_types(values.dtype, torch.float32)).relu()
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.bias_dtype = b_enc.dtype
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor, _grad_indices: Tensor):  # type: ignore[override]
        from jsae_lightning.kernels.triton_sparse import group_by_row, sums_by_row, sums_by_token

        x, W_enc, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_z = (grad_values * (values > 0)).contiguous()
        grad_x = grad_rows = grad_bias = None
        with _on_device_of(x):
            if needs_x:
                grad_x = sums_by_token(grad_z, indices, W_enc.T).to(x.dtype)
            if needs_weight or needs_bias:
                grouping = group_by_row(indices, W_enc.shape[1])
            if needs_weight:
                grad_rows = torch.empty_like(W_enc.T, memory_format=torch.contiguous_format)
                sums_by_row(grad_rows, grouping, x, grad_z)
            if needs_bias:
                grad_bias = values.new_empty(W_enc.shape[1], 1, dtype=ctx.bias_dtype)
                sums_by_row(grad_bias, grouping, values.new_ones(len(values), 1), grad_z)
        return grad_x, _transposed(grad_rows), None if grad_bias is None else grad_bias[:, 0], None


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.T


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.topk_encode`; gradients by sums over the entries of each latent, in the order of the tokens."""
    return _TopKEncode.apply(x, W_enc, b_enc, k)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:  # type: ignore[override]
        from jsae_lightning.kernels.triton_sparse import sums_by_token

        ctx.save_for_backward(values, indices, W_dec)
        with _on_device_of(W_dec):
            return sums_by_token(values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from jsae_lightning.kernels.triton_sparse import group_by_row, products_by_token, sums_by_row

        values, indices, W_dec = ctx.saved_tensors
        grad, grad_values, grad_W_dec = grad.contiguous(), None, None
        with _on_device_of(W_dec):
            if ctx.needs_input_grad[0]:
                grad_values = products_by_token(grad, indices, W_dec, values.dtype)
            if ctx.needs_input_grad[2]:
                grad_W_dec = torch.empty_like(W_dec, memory_format=torch.contiguous_format)
                sums_by_row(grad_W_dec, group_by_row(indices, len(W_dec)), grad, values.contiguous())
        return grad_values, None, grad_W_dec


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See `kernels.sparse_decode`; the gradient of W_dec by sums over the entries of each latent, in token order."""
    return _SparseDecode.apply(values, indices, W_dec)


class _BilinearRows(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor
    ) -> Tensor:
        from jsae_lightning.kernels.triton_bilinear import bilinear_forward

        ctx.dtypes = rows_out.dtype, rows_in.dtype
        product_dtype = _product_dtype(rows_out)
        tensors = (
            rows_out.to(product_dtype).contiguous(),
            slope.contiguous(),
            rows_in.to(product_dtype).contiguous(),
            indices_out.contiguous(),
            indices_in.contiguous(),
        )
        ctx.save_for_backward(*tensors)
        with _on_device_of(rows_out):
            return bilinear_forward(*tensors, torch.promote_types(rows_out.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        from jsae_lightning.kernels.triton_bilinear import gradient_of_rows, gradient_of_slope

        rows_out, slope, rows_in, indices_out, indices_in = ctx.saved_tensors
        dtype_out, dtype_in = ctx.dtypes
        grad_out = grad_slope = grad_in = None
        with _on_device_of(rows_out):
            if ctx.needs_input_grad[0]:
                grad_out = gradient_of_rows(grad, rows_in, indices_in, slope, indices_out, len(rows_out), dtype_out)
            if ctx.needs_input_grad[1]:
                grad_slope = gradient_of_slope(grad, *ctx.saved_tensors)
            if ctx.needs_input_grad[2]:
                grad_in = gradient_of_rows(grad.mT, rows_out, indices_out, slope, indices_in, len(rows_in), dtype_in)
        return grad_out, grad_slope, grad_in, None, None


def _product_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype of the rows' products: as autocast has it for torch's, which leaves float64 alone."""
    device = rows.device.type
    if torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return rows.dtype


def bilinear_rows(rows_out: Tensor, slope: Tensor, rows_in: Tensor, indices_out: Tensor, indices_in: Tensor) -> Tensor:
    """See `reference.bilinear_rows`; at least float32; autocast rounds the rows before the products."""
    return _BilinearRows.apply(rows_out, slope, rows_in, indices_out, indices_in)


def jacobian_values(
    encoder_rows: Tensor,
    decoder_rows: Tensor,
    W_out: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    indices_out: Tensor,
    indices_in: Tensor,
) -> Tensor:
    """See `kernels.jacobian_values`."""
    return reference.projected(bilinear_rows, encoder_rows, decoder_rows, W_out, terms, indices_out, indices_in)
