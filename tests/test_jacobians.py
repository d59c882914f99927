"""The closed-form Jacobian against automatic differentiation of the composed function."""

import pytest
import torch

from factories import MLP_KINDS, make_mlp, make_pair, make_x
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobians import edge_penalty, jacobian, jacobian_reference
from jsae_lightning.penalties import make_penalty
from jsae_lightning.sae import SAEPair


def _dense(found, d_sae_out, d_sae_in):
    """Scatter the k x k values of each token into (d_sae_out, d_sae_in)."""
    dense = found.values.new_zeros(len(found.values), d_sae_out, d_sae_in)
    for token, values in enumerate(found.values):
        dense[token][found.indices_out[token][:, None], found.indices_in[token][None, :]] = values
    return dense


@pytest.mark.parametrize("at", ["input", "reconstruction"])
@pytest.mark.parametrize("kind", MLP_KINDS)
def test_equals_jacrev_of_the_composed_function(kind, at):
    pair, mlp, x = make_pair(d_sae_output=40, k_output=6), make_mlp(kind), make_x()
    found = _dense(jacobian(pair, mlp, x, at), 40, 32)
    expected = torch.stack([jacobian_reference(pair, mlp, token, at) for token in x])
    assert expected.abs().max() > 0.01
    assert (found - expected).norm() < 1e-9 * expected.norm()


def test_by_hand():
    """One latent each: J = W_enc_y W_out act'(h) W_in W_dec_x with ReLU, h > 0."""
    pair = SAEPair(1, 1, 1).double()
    with torch.no_grad():
        pair.input_sae.W_dec.fill_(1.0)
        pair.input_sae.W_enc.fill_(1.0)
        pair.output_sae.W_enc.fill_(3.0)
    mlp = FrozenMLP(torch.tensor([[2.0]]), torch.tensor([[5.0]]), activation="relu").double()
    assert jacobian(pair, mlp, torch.tensor([[1.0]], dtype=torch.float64)).values.item() == 30.0


@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_inactive_entries_are_exactly_zero(at):
    """With k = d_sae, TopK chooses every latent, and the ReLU zeroes about half of them."""
    pair, mlp, x = make_pair(d_sae=12, k=12), make_mlp(), make_x()
    found = jacobian(pair, mlp, x, at)
    assert 0 < found.active.float().mean() < 1
    assert (found.values[~found.active] == 0).all()
    assert (found.values[found.active] != 0).all()


def _penalty_from_formula(pair, mlp, x, at):
    """Mean |J| with every product written out densely, to be differentiated by autograd."""
    latents_in = pair.input_sae.encode(x)
    point = x if at == "input" else pair.input_sae.decode(latents_in)
    mlp_out, slopes = mlp.forward_with_slopes(point)
    latents_out = pair.output_sae.encode(mlp_out)
    total = 0
    for token in range(len(x)):
        middle = sum(weight @ slope[token].diag() for weight, slope in slopes) @ mlp.W_out
        values = (
            pair.output_sae.W_enc.T[latents_out.indices[token]]
            @ middle.T
            @ pair.input_sae.W_dec[latents_in.indices[token]].T
        )
        active = latents_out.active[token][:, None] & latents_in.active[token][None, :]
        total = total + (values * active).abs().mean()
    return total / len(x)


@pytest.mark.parametrize("at", ["input", "reconstruction"])
@pytest.mark.parametrize("kind", ["gelu", "gated_silu"])
def test_penalty_gradients_against_the_written_out_formula(kind, at):
    pair, mlp, x = make_pair(k_output=4), make_mlp(kind), make_x()
    parameters = dict(pair.named_parameters())
    found = torch.autograd.grad(jacobian(pair, mlp, x, at).values.abs().mean(), parameters.values(), allow_unused=True)
    expected = torch.autograd.grad(_penalty_from_formula(pair, mlp, x, at), parameters.values(), allow_unused=True)
    reached = set()
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        ours, theirs = (torch.zeros(1) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14, msg=name)
        if ours.abs().max() > 0:
            reached.add(name)
    at_input = {"input_sae.W_dec", "output_sae.W_enc"}
    assert reached == at_input if at == "input" else reached > at_input


def test_permuting_latents_permutes_rows_and_columns():
    pair, mlp, x = make_pair(), make_mlp(), make_x()
    before = _dense(jacobian(pair, mlp, x), 32, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae = pair.input_sae
        sae.W_enc.copy_(sae.W_enc[:, order])
        sae.b_enc.copy_(sae.b_enc[order])
        sae.W_dec.copy_(sae.W_dec[order])
    torch.testing.assert_close(_dense(jacobian(pair, mlp, x), 32, 32), before[:, :, order])


def test_few_tokens_take_the_gathering_path_and_agree():
    """With fewer rows in use than latents the rows are gathered before they are projected."""
    pair, mlp, x = make_pair(d_sae=64), make_mlp(), make_x(tokens=40)
    whole = jacobian(pair, mlp, x).values
    torch.testing.assert_close(jacobian(pair, mlp, x[:2]).values, whole[:2], rtol=1e-12, atol=1e-14)


def test_unknown_point_is_refused():
    with pytest.raises(UserError, match="jacobian.at: 'output'"):
        jacobian(make_pair(), make_mlp(), make_x(), "output")


@pytest.mark.parametrize("shape", [(3, 9), (10,)])
def test_input_of_another_shape_is_refused(shape):
    from jsae_lightning import jacobians

    plain = getattr(jacobians.jacobian, "__wrapped__", jacobians.jacobian)  # without the shape check of the tests
    with pytest.raises(UserError, match=r"mlp_in: has shape .* not \(tokens, 10\)"):
        plain(make_pair(), make_mlp(), torch.zeros(shape, dtype=torch.float64))


def test_the_public_name_is_the_function():
    """A submodule of the same name would hide it once anything has imported that."""
    import jsae_lightning
    import jsae_lightning.jacobians

    assert callable(jsae_lightning.jacobian)


def test_contributions_and_the_penalty_on_them():
    """J_ij s_j, the activations detached: the gradient with respect to J is scaled by s_j, none reaches s_j."""
    pair, mlp, x = make_pair(), make_mlp(), make_x()
    found = jacobian(pair, mlp, x)
    latents = pair.input_sae.encode(x)
    torch.testing.assert_close(found.contributions, found.values * latents.values[:, None, :])
    on_contributions = edge_penalty(make_penalty("l1"), "contribution")
    torch.testing.assert_close(on_contributions(found), (found.values.abs() * latents.values[:, None]).mean())
    torch.testing.assert_close(edge_penalty(make_penalty("l1"), "jacobian")(found), found.values.abs().mean())
    on_contributions(found).backward()
    assert pair.input_sae.W_enc.grad is None
    assert (pair.input_sae.W_dec.grad != 0).any()
    with pytest.raises(UserError, match="jacobian.edges: 'values'"):
        edge_penalty(make_penalty("l1"), "values")
