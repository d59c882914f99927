"""Dense products on processors, by the faster of the two libraries that torch brings.

torch.mm gives float32 to MKL, which leaves half of AVX-512's width unused on processors that are not Intel's; oneDNN,
to which torch gives bfloat16 and compiled models, uses it. So there a float32 product goes to oneDNN, which takes
about half the time; everywhere else, and in every other dtype, to torch.mm. oneDNN keeps some hundred kB for each
shape that it meets: callers are to have few.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.kernels.blocks import blocks

MIN_OPERATIONS = 2**24
"""Multiplications and additions; with fewer, what oneDNN prepares for each call takes what it saves."""


BLOCK_ELEMENTS = 2**21
"""Of a product that is added to something: 8 MB, which stay in cache."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b: (rows, inner) times (inner, columns)."""
    return _by_onednn(a, b) if _goes_to_onednn(a, b) else a @ b


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total` in its place."""
    if not _goes_to_onednn(a, b):
        total.addmm_(a, b)
        return
    for rows in blocks(len(a), BLOCK_ELEMENTS // b.shape[1]):
        total[rows] += _by_onednn(a[rows], b)


def _goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    is_large = len(a) * b.numel() >= MIN_OPERATIONS
    return a.dtype == b.dtype == torch.float32 and is_large and _is_enabled() and onednn_is_faster()


def _is_enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled)


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    # Rows with gaps between them, such as a slice of columns, would go to its reference code, hundreds of times slower.
    linear: Any = torch.ops.mkldnn._linear_pointwise
    return linear(_without_gaps(a), _without_gaps(b).T, None, "none", [], "")


def _without_gaps(matrix: Tensor) -> Tensor:
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether this processor multiplies float32 faster with oneDNN than with MKL, as far as its name tells."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(processor.get("avx512_f")) and "intel" not in str(processor.get("cpu_name", "intel")).lower()
