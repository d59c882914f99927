"""FrozenMLP: formulas, derivatives by hand and by autograd, precision, hash."""

import pytest
import torch
from torch.func import jacrev, vmap

from jsae_lightning.activation_functions import ACTIVATIONS, canonical_activation
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP

D_MODEL, D_MLP, TOKENS = 5, 7, 6


def make_mlp(activation: str = "gelu", *, gated: bool = False, biases: bool = True, seed: int = 0) -> FrozenMLP:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return FrozenMLP(
        draw(D_MODEL, D_MLP),
        draw(D_MLP, D_MODEL),
        activation=activation,
        b_in=draw(D_MLP) if biases else None,
        b_out=draw(D_MODEL) if biases else None,
        W_gate=draw(D_MODEL, D_MLP) if gated else None,
        b_gate=draw(D_MLP) if gated and biases else None,
    )


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assemble(mlp: FrozenMLP, x: torch.Tensor) -> torch.Tensor:
    """The derivative that the slopes stand for, one (d_model in, d_model out) matrix a token."""
    _, slopes = mlp.forward_with_slopes(x)
    terms = [torch.einsum("dm,tm,mo->tdo", weight, slope, mlp.W_out) for weight, slope in slopes]
    return torch.stack(terms).sum(dim=0)


# From the definitions with a pocket calculator: value and derivative at -1, 0.5 and 2. For gelu at 0.5, say:
# Phi(0.5) = 0.691462 and phi(0.5) = 0.352065, so 0.5 Phi = 0.345731 and Phi + 0.5 phi = 0.867495.
BY_HAND = {
    "gelu": ([-0.158655, 0.345731, 1.954500], [-0.083315, 0.867495, 1.085232]),
    "gelu_tanh": ([-0.158808, 0.345714, 1.954598], [-0.082964, 0.867370, 1.086099]),
    "relu": ([0.0, 0.5, 2.0], [0.0, 1.0, 1.0]),
    "relu2": ([0.0, 0.25, 4.0], [0.0, 1.0, 4.0]),
    "silu": ([-0.268941, 0.311230, 1.761594], [0.072329, 0.739961, 1.090784]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_derivative_have_their_hand_computed_values(name):
    h = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    value, derivative = BY_HAND[name]
    assert ACTIVATIONS[name].value(h).tolist() == pytest.approx(value, abs=2e-6)
    assert ACTIVATIONS[name].derivative(h).tolist() == pytest.approx(derivative, abs=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_first_and_second_derivative_agree_with_autograd(name):
    h = torch.linspace(-6, 6, 241, dtype=torch.float64) + 0.003  # no point at the kink of relu
    h.requires_grad_()
    (first,) = torch.autograd.grad(ACTIVATIONS[name].value(h).sum(), h, create_graph=True)
    assert (ACTIVATIONS[name].derivative(h) - first).abs().max() < 1e-12
    if name == "relu":
        assert not ACTIVATIONS[name].derivative(h).requires_grad  # piecewise constant: no second derivative
        return
    (second,) = torch.autograd.grad(first.sum(), h)
    (ours,) = torch.autograd.grad(ACTIVATIONS[name].derivative(h).sum(), h)
    assert (ours - second).abs().max() < 1e-12


def test_relu_has_slope_zero_at_zero():
    zero = torch.zeros(1)
    assert ACTIVATIONS["relu"].derivative(zero).item() == 0
    assert ACTIVATIONS["relu2"].derivative(zero).item() == 0


def test_activation_names_mean_what_transformers_means_by_them():
    from transformers.activations import ACT2FN

    h = torch.linspace(-5, 5, 101, dtype=torch.float64)
    names = ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"]
    for name in [*names, "relu", "relu2", "silu", "swish"]:
        ours = ACTIVATIONS[canonical_activation(name)].value(h)
        assert (ours - ACT2FN[name](h)).abs().max() < 1e-9, name


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_10", "xielu", "tanh"])
def test_other_functions_are_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        canonical_activation(name)


def test_plain_mlp_by_hand():
    mlp = FrozenMLP(
        torch.tensor([[1.0, -1.0], [2.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [3.0, 1.0]]),
        activation="relu2",
        b_in=torch.tensor([0.0, 3.0]),
        b_out=torch.tensor([0.5, -0.5]),
    )
    # h = [1 + 2 * 1, -1 + 3] = [3, 2]; act = [9, 4]; out = [9 + 12 + 0.5, 4 - 0.5]
    out, ((weight, slope),) = mlp.forward_with_slopes(torch.tensor([[1.0, 1.0]]))
    assert out.tolist() == [[21.5, 3.5]]
    assert slope.tolist() == [[6.0, 4.0]]
    assert weight is mlp.W_in


def test_gated_mlp_by_hand():
    mlp = FrozenMLP(
        torch.tensor([[2.0], [0.0]]),
        torch.tensor([[1.0, -1.0]]),
        activation="relu",
        W_gate=torch.tensor([[0.0], [3.0]]),
        b_gate=torch.tensor([1.0]),
        b_in=torch.tensor([-1.0]),
    )
    # g = 3 + 1 = 4, u = 2 - 1 = 1: out = 4 * 1 * [1, -1]; slopes act'(g) u = 1 and act(g) = 4
    out, ((gate_weight, gate_slope), (in_weight, in_slope)) = mlp.forward_with_slopes(torch.tensor([[1.0, 1.0]]))
    assert out.tolist() == [[4.0, -4.0]]
    assert (gate_slope.item(), in_slope.item()) == (1.0, 4.0)
    assert gate_weight is mlp.W_gate and in_weight is mlp.W_in


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_the_derivative_of_forward(name, gated, biases):
    mlp = make_mlp(name, gated=gated, biases=biases).double()
    x = inputs()
    expected = vmap(jacrev(lambda row: mlp(row[None])[0]))(x).transpose(1, 2)  # [token, in, out]
    assert (assemble(mlp, x) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert torch.equal(mlp.forward_with_slopes(x)[0], mlp(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu2", "silu"])
def test_gradient_through_the_slopes_is_the_second_derivative(name, gated):
    mlp = make_mlp(name, gated=gated).double()
    x = inputs().requires_grad_()
    weights = torch.randn(TOKENS, D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (ours,) = torch.autograd.grad((assemble(mlp, x) * weights).sum(), x)
    jacobians = vmap(jacrev(lambda row: mlp(row[None])[0]))(x).transpose(1, 2)
    (expected,) = torch.autograd.grad((jacobians * weights).sum(), x)
    assert (ours - expected).abs().max() < 1e-12 * expected.abs().max()


def test_tensors_are_frozen_float32_copies_that_no_state_dict_holds():
    weight = torch.randn(D_MODEL, D_MLP, dtype=torch.bfloat16, requires_grad=True)
    mlp = FrozenMLP(weight, torch.randn(D_MLP, D_MODEL), activation="gelu_new")
    assert mlp.state_dict() == {}
    assert list(mlp.parameters()) == []
    assert (mlp.W_in.dtype, mlp.W_in.requires_grad, mlp.b_in, mlp.W_gate) == (torch.float32, False, None, None)
    assert (mlp.activation, mlp.kind, mlp.is_gated) == ("gelu_tanh", "plain", False)
    assert (mlp.d_model, mlp.d_mlp) == (D_MODEL, D_MLP)
    assert mlp.double().W_in.dtype == torch.float64
    with torch.no_grad():
        weight.zero_()
    assert mlp.W_in.abs().sum() > 0
    assert make_mlp(gated=True).kind == "gated"


@pytest.mark.parametrize("biases", [True, False])  # a float32 bias by itself would make the sum float32
@pytest.mark.parametrize("gated", [False, True])
def test_autocast_leaves_results_and_elementwise_steps_in_float32(gated, biases):
    mlp, x = make_mlp("silu", gated=gated, biases=biases), inputs().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, slopes = mlp.forward_with_slopes(x)
        assert mlp(x).dtype == torch.float32
    assert out.dtype == torch.float32
    assert all(slope.dtype == torch.float32 for _, slope in slopes)
    exact, exact_slopes = mlp.forward_with_slopes(x)
    assert (out - exact).norm() < 0.02 * exact.norm()
    # A slope rounded to bfloat16 would sit on its grid; these are computed in float32 from the products.
    assert any((slope != slope.bfloat16().float()).any() for _, slope in slopes)
    assert mlp(x.bfloat16()).dtype == torch.float32


def test_weights_hash_tells_every_part_apart():
    reference = make_mlp(gated=True).weights_hash()
    assert len(reference) == 64
    assert make_mlp(gated=True).weights_hash() == reference
    assert make_mlp(gated=True).double().weights_hash() == reference
    assert make_mlp("silu", gated=True).weights_hash() != reference
    for name in ("W_in", "W_out", "W_gate", "b_in", "b_out", "b_gate"):
        mlp = make_mlp(gated=True)
        getattr(mlp, name).view(-1)[-1] += 1e-6
        assert mlp.weights_hash() != reference, name
    swapped = make_mlp(gated=True)
    swapped.W_in, swapped.W_gate = swapped.W_gate, swapped.W_in
    assert swapped.weights_hash() != reference
    zeros = FrozenMLP(torch.ones(2, 3), torch.ones(3, 2), activation="relu", b_in=torch.zeros(3))
    none = FrozenMLP(torch.ones(2, 3), torch.ones(3, 2), activation="relu")
    assert zeros.weights_hash() != none.weights_hash()


def test_tensors_that_do_not_fit_are_refused():
    good = {"W_in": torch.ones(2, 3), "W_out": torch.ones(3, 2), "activation": "relu"}
    with pytest.raises(ValueError, match="b_gate"):
        FrozenMLP(**good, b_gate=torch.ones(3))  # a bias of a gate that is not there
    with pytest.raises(UserError, match="mish"):
        FrozenMLP(**good | {"activation": "mish"})
