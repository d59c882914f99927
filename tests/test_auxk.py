"""The auxiliary loss for dead latents."""

import pytest
import torch

from factories import make_x
from jsae_lightning.auxk import auxk_loss
from jsae_lightning.sae import TopKSAE


def _case():
    sae = TopKSAE(6, 16, 2, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        sae.b_dec += 0.7
    x = make_x(tokens=20, d_model=6)
    return sae, x, torch.arange(16) >= 10


def test_equals_the_dense_formula():
    sae, x, dead = _case()
    x_hat, _ = sae(x)
    residual = (x - x_hat).detach()
    z = (x @ sae.W_enc + sae.b_enc).masked_fill(~dead, float("-inf"))
    chosen = z.topk(3)
    sparse = torch.zeros_like(z).scatter(1, chosen.indices, chosen.values.relu())
    expected = (residual - sparse @ sae.W_dec).square().mean()
    torch.testing.assert_close(auxk_loss(sae, x, x_hat, dead, 3), expected)


def test_gradient_reaches_dead_encoder_rows_only_and_the_residual_is_detached():
    sae, x, dead = _case()
    x_hat, _ = sae(x)
    auxk_loss(sae, x, x_hat, dead, 3).backward()
    reached = sae.W_enc.grad.abs().sum(dim=0) > 0
    assert reached[dead].any()
    assert not reached[~dead].any()
    assert sae.b_dec.grad is None, "b_dec is counted in x_hat already, and x_hat is detached"
    assert (sae.W_dec.grad.abs().sum(dim=1) > 0)[~dead].sum() == 0


def test_no_dead_latent_no_loss():
    sae, x, _ = _case()
    assert auxk_loss(sae, x, sae(x)[0], torch.zeros(16, dtype=torch.bool), 3).item() == 0


def test_fewer_dead_latents_than_k():
    sae, x, _ = _case()
    dead = torch.arange(16) == 3
    assert auxk_loss(sae, x, sae(x)[0], dead, 8).item() > 0


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_loss_over_halves_averages_to_the_whole(shift):
    """Additive over tokens, so that ranks and micro-batches agree with one process."""
    sae, x, dead = _case()
    x = x + shift
    whole = auxk_loss(sae, x, sae(x)[0], dead, 3)
    halves = [auxk_loss(sae, part, sae(part)[0], dead, 3) for part in x.chunk(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
