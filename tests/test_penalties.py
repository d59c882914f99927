"""Penalties: hand-computed values, gradients against finite differences, behaviour at zero, symmetries, precision."""

import inspect
import math

import pytest
import torch

from jsae_lightning.errors import UserError
from jsae_lightning.penalties import PENALTIES, make_penalty

# Two tokens, k_out = k_in = 2; the second has a single edge.
J = torch.tensor([[[1.0, -3.0], [0.0, 0.2]], [[0.0, 0.0], [2.0, 0.0]]], dtype=torch.float64)
SMOOTHED = ("log", "l04", "l1_rows_l05")
OURS = ("hoyer_rows", "hoyer_token_rows", "l1_scaled")
SCALE_FREE = ("l1_over_l2_batch", "l1_over_l2_token", "kurtosis", "hoyer", *OURS)
BY_ROW = ("l1_rows_l05", "hoyer_rows", "hoyer_token_rows", "hoyer_l1")
EXACT = {"eps": 1e-300}  # switches the smoothing of powers off where a value is computed by hand


def p(x):
    """SCAD at L = .5, a = 4.3, by its defining pieces."""
    if x <= 0.5:
        return 0.5 * x
    return (4.3 * x - x * x - 0.25) / 6.6 if x <= 2.15 else 5.3 * 0.25 / 2


BY_HAND = {
    "l1": (1 + 3 + 0.2 + 2) / 8,
    "l1_over_l2_batch": (6.2 / 8) / math.sqrt(14.04 / 8),
    "l1_over_l2_token": (4.2 / 4 / math.sqrt(10.04 / 4) + 0.5) / 2,
    "log": sum(math.log(1 + x**0.4) for x in (1, 3, 0.2, 2)) / 8,
    "l04": (((1 + 3**0.4 + 0.2**0.4) / 4) ** 2.5 + (2**0.4 / 4) ** 2.5) / 2,
    "exp": sum(1 - math.exp(-2.5 * x) for x in (1, 3, 0.2, 2)) / 8,
    "tanh": sum(math.tanh(100 * x * x) for x in (1, 3, 0.2, 2)) / 8,
    "scad": sum(p(x) for x in (1, 3, 0.2, 2)) / 8,
    "capped_l1": (0.5 + 0.5 + 0.2 + 0.5) / 8,
    "kurtosis": ((10.04 / 4) ** 2 / ((1 + 81 + 0.2**4) / 4) + 0.25) / 2,
    "hoyer": (4.2 / math.sqrt(10.04) - 1) / 2,
    "l1_rows_l05": (((1 + math.sqrt(3)) / 2) ** 2 + 0.2 / 4 + 2 / 4) / 4,
    "hoyer_rows": ((4 / math.sqrt(10) - 1) / (math.sqrt(2) - 1) / 2 + 0) / 2,  # rows of one edge cost nothing
    "l1_scaled": (4.2 / 4 / math.sqrt(10.04 / 4) + 0.5) / 2,
}
BY_HAND["hoyer_l1"] = (BY_HAND["hoyer"] + BY_HAND["hoyer_rows"]) / 2 + 5 * BY_HAND["l1"]
BY_HAND["hoyer_token_rows"] = (BY_HAND["hoyer"] + BY_HAND["hoyer_rows"]) / 2


def random_jacobian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_penalty_of_the_paper_and_ours_is_there():
    assert set(PENALTIES) == set(BY_HAND)


@pytest.mark.parametrize("name", PENALTIES)
def test_value_by_hand(name):
    penalty = make_penalty(name, **(EXACT if name in SMOOTHED else {}))
    assert penalty(J).item() == pytest.approx(BY_HAND[name], rel=1e-9)


@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_against_finite_differences(name):
    # Away from the kinks at 0, .5 (SCAD, capped l1) and 2.15 (SCAD), with values on all of their sides.
    magnitudes = torch.tensor([0.07, 0.3, 0.8, 1.4, 2.6, 3.3], dtype=torch.float64)
    values = (magnitudes * torch.tensor([1.0, -1, 1, -1, -1, 1])).reshape(1, 2, 3).repeat(2, 1, 1)
    values[1] *= -1.02
    if name == "l1_scaled":  # as a function of J at the scale that it detaches
        scale = values.square().mean(dim=(1, 2), keepdim=True).sqrt()
        values.requires_grad_()
        (expected,) = torch.autograd.grad((values.abs() / scale).mean(), values)
        (found,) = torch.autograd.grad(make_penalty(name)(values), values)
        torch.testing.assert_close(found, expected)
        return
    assert torch.autograd.gradcheck(make_penalty(name), values.requires_grad_(), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PENALTIES)
def test_zeros_cost_nothing_and_get_no_gradient(name, dtype):
    values = J.to(dtype, copy=True)
    values[1] = 0  # a whole token without edges, beside inactive entries in the first one
    values.requires_grad_()
    make_penalty(name)(values).backward()
    assert torch.isfinite(values.grad).all()
    assert (values.grad[values == 0] == 0).all()
    # The three are flat at the large entries; a row of a single edge is as sparse as a row can be.
    if name not in ("tanh", "scad", "capped_l1", "hoyer_rows"):
        assert (values.grad[values != 0] != 0).all()
    zero = torch.zeros(3, 2, 4, dtype=dtype, requires_grad=True)
    loss = make_penalty(name)(zero)
    loss.backward()
    assert loss.item() == 0
    assert (zero.grad == 0).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_next_to_zero_the_gradient_is_finite(name):
    values = torch.full((1, 2, 2), 1e-11, requires_grad=True)
    make_penalty(name)(values).backward()
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_order_of_entries_does_not_matter(name):
    values = random_jacobian(3, 4, 5)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    penalty = make_penalty(name)
    torch.testing.assert_close(penalty(values[:, rows][:, :, columns]), penalty(values))
    torch.testing.assert_close(penalty(-values), penalty(values))
    anywhere = values.flatten(1)[:, torch.randperm(20, generator=generator)].reshape(3, 4, 5)
    # Only sums over rows know which entries share a row.
    assert torch.isclose(penalty(anywhere), penalty(values)).item() == (name not in BY_ROW)


@pytest.mark.parametrize("name", PENALTIES)
def test_scale(name):
    values, penalty = random_jacobian(3, 4, 5, dtype=torch.float32), make_penalty(name)
    if name in SCALE_FREE:
        for power_of_two in (2.0**-30, 0.25, 2.0**30):
            assert penalty(values * power_of_two).item() == penalty(values).item()
        torch.testing.assert_close(penalty(values / 6.7), penalty(values))
    else:
        assert penalty(values * 0.5) < 0.999 * penalty(values)


@pytest.mark.parametrize("name", ["l1_over_l2_token", "kurtosis", "hoyer", *OURS])
def test_per_token_penalties_ignore_each_tokens_own_scale(name):
    values = random_jacobian(3, 4, 5)
    scaled = values * torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(make_penalty(name)(scaled), make_penalty(name)(values))
    batch = make_penalty("l1_over_l2_batch")
    assert batch(scaled) < 0.9 * batch(values)


@pytest.mark.parametrize("name", ["l1_over_l2_token", "kurtosis", "hoyer", *OURS, "l04", "l1_rows_l05", "log", "exp"])
def test_one_edge_costs_less_than_the_same_spread_out(name):
    single, spread = torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.01)
    equal_l1_norm = name in ("l04", "l1_rows_l05", "log", "exp")
    single[0, 1, 2] = 0.16 if equal_l1_norm else 0.04
    assert make_penalty(name)(single) < 0.95 * make_penalty(name)(spread)


@pytest.mark.parametrize("name", ["l04", "l1_rows_l05"])
def test_quasi_norms_equal_l1_on_uniform_entries(name):
    values = torch.full((2, 3, 4), -0.3, dtype=torch.float64)
    assert make_penalty(name, **EXACT)(values).item() == pytest.approx(0.3)


def test_hoyer_of_extremes():
    hoyer, single = make_penalty("hoyer"), torch.zeros(1, 3, 3)
    single[0, 0, 0] = -5
    assert hoyer(single).item() == pytest.approx(0, abs=1e-6)
    assert hoyer(torch.full((1, 3, 3), 7.0)).item() == pytest.approx(1)
    assert hoyer(torch.ones(2, 1, 1)).item() == 0


def test_rows_are_sparsified_one_by_one():
    """Two edges in one row cost more than two in two rows, a difference that whole-token penalties cannot see."""
    one_row, two_rows = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    one_row[0, 0] = 1
    two_rows[0, 0, 0] = two_rows[0, 1, 1] = 1
    assert make_penalty("l1_rows_l05")(two_rows) < 0.6 * make_penalty("l1_rows_l05")(one_row)
    assert make_penalty("l04")(two_rows).item() == pytest.approx(make_penalty("l04")(one_row).item())


def test_hoyer_of_rows_ignores_each_rows_scale_and_cannot_be_lowered_by_a_few_heavy_rows():
    values, heavy = random_jacobian(2, 4, 5), torch.ones(4, 1, dtype=torch.float64)
    heavy[2] = 100
    torch.testing.assert_close(make_penalty("hoyer_rows")(values * heavy), make_penalty("hoyer_rows")(values))
    assert make_penalty("hoyer")(values * heavy) < 0.8 * make_penalty("hoyer")(values)
    assert make_penalty("hoyer_rows")(torch.ones(2, 3, 1)).item() == 0


def test_zero_rows_are_left_out_of_the_mean_over_rows():
    values = random_jacobian(1, 2, 4)
    padded = torch.cat([values, torch.zeros(1, 3, 4, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(make_penalty("hoyer_rows")(padded), make_penalty("hoyer_rows")(values))


@pytest.mark.parametrize(("row_weight", "alone"), [(1.0, "hoyer_rows"), (1e-12, "hoyer")])
def test_row_weight_goes_from_one_to_the_other(row_weight, alone):
    values = random_jacobian(3, 4, 5)
    both = make_penalty("hoyer_token_rows", row_weight=row_weight)
    torch.testing.assert_close(both(values), make_penalty(alone)(values))


@pytest.mark.parametrize("name", PENALTIES)
def test_half_precision_is_computed_in_float32(name):
    values = random_jacobian(64, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = make_penalty(name)(values)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), make_penalty(name)(values.double()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "param", "value"),
    [("scad", "knot", 0.1), ("scad", "a", 2.5), ("capped_l1", "cap", 0.1), ("exp", "rate", 9)],
)
def test_parameters_reach_the_penalty(name, param, value):
    assert make_penalty(name, **{param: value})(J) != make_penalty(name)(J)


def test_defaults_are_the_published_ones():
    defaults = {
        name: {key: q.default for key, q in inspect.signature(f).parameters.items() if q.default is not q.empty}
        for name, f in PENALTIES.items()
    }
    assert defaults["scad"] == {"knot": 0.5, "a": 4.3}
    assert defaults["log"]["power"] == defaults["l04"]["power"] == 0.4
    assert (defaults["exp"], defaults["capped_l1"]) == ({"rate": 2.5}, {"cap": 0.5})
    assert defaults["l1_rows_l05"]["power"] == 0.5


@pytest.mark.parametrize(
    ("name", "params", "found", "remedy"),
    [
        ("l2", {}, "'l2'", "l1_over_l2_token"),
        ("scad", {"cap": 1.0}, "'cap'", "knot, a"),
        ("l1", {"eps": 1.0}, "'eps'", "no parameters"),
        ("exp", {"rate": -1.0}, "-1.0", "positive"),
        ("exp", {"rate": "2"}, "'2'", "positive"),
        ("exp", {"rate": True}, "True", "positive"),
        ("exp", {"rate": math.nan}, "nan", "positive"),
        ("l04", {"power": 1.5}, "1.5", "to 1"),
        ("tanh", {"power": 0.5}, "0.5", "from 1"),
        ("scad", {"a": 1.0}, "1.0", "from 2"),
        ("hoyer_token_rows", {"row_weight": 1.5}, "1.5", "to 1"),
    ],
)
def test_mistakes_are_named_with_their_remedy(name, params, found, remedy):
    with pytest.raises(UserError, match="jacobian.penalty") as error:
        make_penalty(name, **params)
    assert found in str(error.value)
    assert remedy in str(error.value)
