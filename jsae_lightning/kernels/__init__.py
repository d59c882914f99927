"""The three sparse operations that training spends its time in, behind one interface.

`reference.py` is plain differentiable torch and the truth in tests; `cpu.py` gives the same values and gradients
with sparse weight gradients and cache-sized blocks, `triton.py` with kernels for CUDA devices. `select_kernels` chooses
for the whole process.
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.kernels import cpu, reference, triton

Terms = Sequence[tuple[Tensor, Tensor]]
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


def selected_kernels(device: torch.device) -> str:
    """Return the name of the implementation that tensors of a device are given to."""
    if _forced:
        return next(name for name, module in IMPLEMENTATIONS.items() if module is _forced[0])
    if device.type == "cpu":
        return "cpu"
    return "triton" if device.type == "cuda" and _triton_runs() else "reference"


def _for(tensor: Tensor) -> ModuleType:
    return _forced[0] if _forced else IMPLEMENTATIONS[selected_kernels(tensor.device)]


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


def jacobian_values(
    encoder_rows: Float[Tensor, "d_sae_out d_model"],
    decoder_rows: Float[Tensor, "d_sae_in d_model"],
    W_out: Float[Tensor, "d_mlp d_model"],
    terms: Terms,
    indices_out: Int[Tensor, "tokens k_out"],
    indices_in: Int[Tensor, "tokens k_in"],
) -> Float[Tensor, "tokens k_out k_in"]:
    """Return J[t, i, j] = sum over terms of e_i W_out^T diag(slope_t) weight^T d_j, for the latents of each token.

    e_i is encoder_rows[indices_out[t, i]], d_j is decoder_rows[indices_in[t, j]]. Differentiable with respect to both
    and to the slopes; the MLP's weights are constants.

    Args:
        encoder_rows: W_enc^T of the output SAE.
        decoder_rows: W_dec of the input SAE.
        W_out: the MLP's.
        terms: (weight (d_model, d_mlp), slope (tokens, d_mlp)), as `FrozenMLP.forward_with_slopes` returns them.
        indices_out: latents of the output SAE.
        indices_in: latents of the input SAE.
    """
    return _for(W_out).jacobian_values(encoder_rows, decoder_rows, W_out, terms, indices_out, indices_in)
