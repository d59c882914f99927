"""Who is measured, by name: each a function that runs one step, forward and backward, and returns its loss.

The floor and the language model's forward have no backward pass and no loss. The floor is the dense products alone,
each once and forward only, every result in memory of its own, in the run's dtype:

    x W_enc_x,  y W_enc_y          (tokens, d_sae) each
    y = MLP(x)                     two products and the activation function; three products if gated
    W_dec_x W_in,  W_out W_enc_y   (d_sae, d_mlp) each; one more, W_dec_x W_gate, if gated

All but the MLP's are made by the faster float32 library where `kernels.cpu_products` knows of one. Not in it: the
choice of the k largest, decoding, every gradient, J itself. Under bf16-mixed its MLP is bfloat16 too, although
training keeps it in float32.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from jsae_lightning.benchmarking import published
from jsae_lightning.benchmarking.language_models import ModelForward
from jsae_lightning.benchmarking.names import (
    FLOOR,
    MODEL,
    OURS,
    OURS_QUARTER,
    OURS_WITHOUT,
    PAIR_DENSE,
    PUBLISHED,
    SINGLE_DENSE,
)
from jsae_lightning.benchmarking.problem import Loss, Problem
from jsae_lightning.jacobians import edge_penalty
from jsae_lightning.kernels import cpu_products
from jsae_lightning.losses import pair_losses
from jsae_lightning.penalties import make_penalty
from jsae_lightning.schedules import penalizes

Step = Callable[[], Tensor | None]
QUARTER = 0.25
"""Of the tokens: `jacobian.token_fraction=0.25` gives every fourth step a penalty, of four times the weight."""
_PENALTY = edge_penalty(make_penalty("l1"), "jacobian")


def make_steps(name: str, problem: Problem, model: ModelForward | None = None) -> list[Step]:
    """Return the steps of the contestant `name`: one, or several whose mean is a step of it.

    `model` is needed for the language model alone.
    """
    if name == FLOOR:
        return [lambda: run_floor(problem)]
    if name == MODEL:
        assert model is not None
        return [model]
    return [partial(problem.forward_and_backward, loss) for loss in losses(problem)[name]]


def losses(problem: Problem) -> dict[str, list[Loss]]:
    """Return the losses of every contestant that has some."""
    pair, mlp, x, coef = problem.pair, problem.mlp, problem.x, problem.coef
    return {
        SINGLE_DENSE: [partial(published.traditional_loss, pair.input_sae, x)],
        PAIR_DENSE: [partial(published.traditional_pair_loss, pair, mlp, x)],
        PUBLISHED: [partial(published.jsae_loss, pair, mlp, x, coef)],
        OURS_WITHOUT: [partial(own_loss, problem, 0.0)],
        OURS: [partial(own_loss, problem, coef)],
        OURS_QUARTER: [
            partial(own_loss, problem, coef / QUARTER if penalizes(step, QUARTER) else 0.0)
            for step in range(round(1 / QUARTER))
        ],
    }


def own_loss(problem: Problem, coef: float) -> Float[Tensor, ""]:
    """The loss that `JSAEModule` trains with, the paper's penalty, without AuxK: MSE(x) + MSE(y) + coef mean |J|."""
    return pair_losses(problem.pair, problem.mlp, problem.x, _PENALTY if coef else None).total(coef)


@torch.no_grad()
def run_floor(problem: Problem) -> None:
    """Compute the products that the module's docstring lists."""
    pair, mlp, x = problem.pair, problem.mlp, problem.x
    product = torch.mm if problem.is_mixed or x.device.type != "cpu" else cpu_products.product
    with problem.autocast():
        y = mlp(x)
        product(x, pair.input_sae.W_enc)
        product(y, pair.output_sae.W_enc)
        product(pair.output_sae.W_enc.T, mlp.W_out.T)
        for weight in (mlp.W_in, mlp.W_gate):
            if weight is not None:
                product(pair.input_sae.W_dec, weight)
