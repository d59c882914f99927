"""TopK SAEs: formula, initialisation, decoder constraint."""

import pytest
import torch

from factories import make_pair, make_x
from jsae_lightning import kernels
from jsae_lightning.errors import UserError
from jsae_lightning.sae import Latents, SAEPair, TopKSAE


def test_forward_by_hand():
    sae = TopKSAE(2, 3, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0, 0.0]))
        sae.b_dec.copy_(torch.tensor([10.0, 20.0]))
    x_hat, latents = sae(torch.tensor([[2.0, -1.0]]))
    # z = (2.5, -1, -2): TopK keeps latents 0 and 1, the ReLU zeroes the second.
    assert latents.indices.tolist() == [[0, 1]]
    assert latents.values.tolist() == [[2.5, 0.0]]
    assert latents.active.tolist() == [[True, False]]
    assert x_hat.tolist() == [[12.5, 20.0]]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (), (0, 4)])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_tokens_may_have_any_shape(monkeypatch, name, shape):
    """(batch, seq, d_model), as a language model hands it out; one token; none."""
    monkeypatch.setattr(kernels, "_forced", [kernels.IMPLEMENTATIONS[name]])
    sae = TopKSAE(6, 12, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1))
    x_hat, latents = sae(x)
    flat_hat, flat = sae(x.reshape(-1, 6))
    assert x_hat.shape == x.shape and torch.equal(x_hat.reshape(-1, 6), flat_hat)
    assert latents.values.shape == latents.indices.shape == latents.active.shape == (*shape, 3)
    assert torch.equal(latents.values.reshape(-1, 3), flat.values)
    assert torch.equal(latents.fired(12), flat.fired(12))
    grads = []
    for out in (x_hat, flat_hat):
        sae.zero_grad()
        out.square().sum().backward()
        grads.append(sae.W_enc.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize(("key", "value"), [("k_output", 0), ("d_sae_output", 0), ("k_output", 13)])
def test_no_latents_are_no_default(key, value):
    with pytest.raises(UserError, match="does not lie between 1 and d_sae"):
        SAEPair(6, 12, 3, **{key: value})


def test_an_input_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"x: has shape \[2, 5\], not \(tokens, 6\)"):
        TopKSAE(6, 12, 3).encode(torch.zeros(2, 5))


def test_a_latent_has_fired_if_it_is_active_for_some_token():
    """0 for one token of two, 2 for none, 3 for both, 1 and 4 are chosen by none."""
    latents = Latents(torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]]), torch.tensor([[0, 2, 3], [3, 2, 0]]))
    assert latents.fired(5).tolist() == [True, False, False, True, False]
    assert Latents(latents.values[:0], latents.indices[:0]).fired(2).tolist() == [False, False]


def test_initialisation():
    sae = TopKSAE(16, 64, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


def test_b_dec_is_subtracted_only_if_asked():
    x = make_x(d_model=6).float()
    for subtract in (False, True):
        sae = TopKSAE(6, 12, 3, subtract_b_dec=subtract, generator=torch.Generator().manual_seed(0))
        before = sae.encode(x).values
        with torch.no_grad():
            sae.b_dec += 1.0
        assert torch.equal(sae.encode(x).values, before) is not subtract
        if subtract:
            torch.testing.assert_close(sae.encode(x + 1).values, before)


def test_no_gradient_through_the_choice_of_latents():
    """A latent that TopK did not choose gets no gradient."""
    sae = TopKSAE(6, 12, 3, generator=torch.Generator().manual_seed(0))
    x_hat, latents = sae(make_x(tokens=1, d_model=6).float())
    x_hat.square().sum().backward()
    reached = sae.W_enc.grad.abs().sum(dim=0).nonzero()[:, 0]
    assert set(reached.tolist()) == set(latents.indices[latents.active].tolist())


def test_projected_gradient_is_orthogonal_to_the_rows_and_keeps_the_rest():
    sae = make_pair().input_sae
    sae(make_x())[0].pow(3).sum().backward()
    before = sae.W_dec.grad.clone()
    sae.project_decoder_gradient()
    assert (before * sae.W_dec).sum(dim=1).abs().max() > 1e-3
    assert (sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max() < 1e-12
    removed = before - sae.W_dec.grad
    cosine = torch.nn.functional.cosine_similarity(removed, sae.W_dec, dim=1).abs()
    active = removed.norm(dim=1) > 0
    torch.testing.assert_close(cosine[active], torch.ones_like(cosine[active]))


def test_normalize_decoders():
    pair = make_pair()
    with torch.no_grad():
        pair.output_sae.W_dec *= 3
    direction = pair.output_sae.W_dec / pair.output_sae.W_dec.norm(dim=1, keepdim=True)
    pair.normalize_decoders()
    torch.testing.assert_close(pair.output_sae.W_dec.detach(), direction.detach())


def test_pair_takes_different_widths_and_k():
    pair = SAEPair(d_model=4, d_sae=8, k=2, d_sae_output=16, k_output=3)
    assert (pair.input_sae.d_sae, pair.input_sae.k, pair.output_sae.d_sae, pair.output_sae.k) == (8, 2, 16, 3)
    assert SAEPair(d_model=4, d_sae=8, k=2).output_sae.d_sae == 8


@pytest.mark.parametrize("k", [0, 9])
def test_k_outside_the_width_is_refused(k):
    with pytest.raises(UserError, match=f"sae.k: {k}"):
        TopKSAE(4, 8, k)
