"""The three sparse operations that training spends its time in, behind one interface.

`reference.py` is plain differentiable torch and the truth in tests; `cpu.py` gives the same values and gradients
with sparse weight gradients and cache-sized blocks, `triton.py` with kernels for CUDA devices. `select_kernels` chooses
for the whole process.
"""

import functools
from types import ModuleType

from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.kernels import cpu, reference, triton

IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton}
_forced: list[ModuleType] = []


def select_kernels(name: str) -> None:
    """Use one implementation for every device, or (`auto`) `cpu` on the CPU, `triton` on CUDA, else `reference`.

    `auto` takes `reference` on CUDA where `triton` cannot run. Raises UserError for an unknown name, and for `triton`
    where it cannot run.
    """
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise UserError(f"kernels: '{name}' is not known: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    if name == "triton" and (reason := triton.why_unavailable()):
        raise UserError(f"kernels: triton cannot run: {reason}")
    _forced[:] = [] if name == "auto" else [IMPLEMENTATIONS[name]]


def _for(tensor: Tensor) -> ModuleType:
    if _forced:
        return _forced[0]
    if tensor.device.type == "cpu":
        return cpu
    return triton if tensor.is_cuda and _triton_runs() else reference


@functools.cache
def _triton_runs() -> bool:
    return triton.why_unavailable() is None


def topk_encode(
    x: Float[Tensor, "tokens d_model"],
    W_enc: Float[Tensor, "d_model d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Return relu of the k largest entries of each row of x W_enc + b_enc, and their columns.

    Differentiable with respect to x, W_enc and b_enc through the values; no gradient through the choice.
    """
    return _for(x).topk_encode(x, W_enc, b_enc, k)


def sparse_decode(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], W_dec: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "tokens d_model"]:
    """Return sum_j values[t, j] W_dec[indices[t, j]]."""
    return _for(values).sparse_decode(values, indices, W_dec)


def bilinear_rows(
    rows_out: Float[Tensor, "num_out d_mlp"],
    slope: Float[Tensor, "tokens d_mlp"],
    rows_in: Float[Tensor, "num_in d_mlp"],
    indices_out: Int[Tensor, "tokens k_out"],
    indices_in: Int[Tensor, "tokens k_in"],
) -> Float[Tensor, "tokens k_out k_in"]:
    """Return J[t, i, j] = sum_m rows_out[indices_out[t, i], m] slope[t, m] rows_in[indices_in[t, j], m]."""
    return _for(rows_out).bilinear_rows(rows_out, slope, rows_in, indices_out, indices_in)
