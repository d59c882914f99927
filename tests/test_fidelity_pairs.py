"""Fidelity of single entries of J: ablations, shapes and curvature, on known maps and against one token at a time."""

import dataclasses
import math

import pytest
import torch

from factories import MLP_KINDS, make_mlp, make_pair, make_x
from jsae_lightning.fidelity import ablation, curvature, linearity
from jsae_lightning.fidelity.points import Pairs, Points, draw_entries, points_at, spread
from jsae_lightning.fidelity.scalar_functions import values_at
from jsae_lightning.jacobians import jacobian, latent_map
from jsae_lightning.sae import SAEPair
from known_graphs import graph_mlp, identity_pair, sparse_inputs

AT = ["input", "reconstruction"]


def all_pairs(points: Points) -> Pairs:
    """Every co-active pair of every token."""
    drawn = []
    for entry in range(points.jacobian.values[0].numel()):
        drawn.append(draw_entries(points, torch.full((len(points.x),), entry))[0])
    return Pairs(*(torch.cat([getattr(p, f.name) for p in drawn]) for f in dataclasses.fields(Pairs)))


def regression(pair, mlp, points, pairs):
    with torch.no_grad():
        changes = ablation.predicted_and_measured(pair, mlp, points, pairs)
    figures = {}
    for name, change in changes.items():
        terms = ablation.regression_terms(*change)
        figures[name] = ablation.regression_figures({key: value.sum() for key, value in terms.items()})
    return figures


def shares(classes):
    return linearity.class_figures({key: value.sum() for key, value in linearity.class_terms(classes).items()})


def shuffled(pairs: Pairs) -> Pairs:
    order = torch.randperm(len(pairs.token), generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(pairs, jacobian=pairs.jacobian[order])


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize(("kind", "subtract_b_dec"), [("gelu", False), ("gated_silu", True), ("relu2", False)])
def test_moved_latents_against_the_dense_map_of_each_token(kind, at, subtract_b_dec):
    pair, mlp, x = make_pair(d_sae_output=24, k_output=4, subtract_b_dec=subtract_b_dec), make_mlp(kind), make_x(5)
    with torch.no_grad():
        points = points_at(pair, mlp, x, at)
        pairs = all_pairs(points)
        moved = pairs.s_in[:, None] * torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
        found = values_at(pair, mlp, points, pairs, moved)
        for row in range(0, len(pairs.token), 7):  # a seventh of them: all tokens, all slots
            function, latents = latent_map(pair, mlp, x[pairs.token[row]], at)
            for column in range(moved.shape[1]):
                changed = latents.clone()
                changed[pairs.input[row]] = moved[row, column]
                assert found[row, column].item() == pytest.approx(
                    function(changed)[pairs.output[row]].item(), abs=1e-12
                )
    assert (found == 0).any() and (found > 0).any()  # some leave the top k, most do not
    torch.testing.assert_close(found[:, 2], pairs.s_out)


def test_points_are_those_of_the_jacobian():
    pair, mlp, x = make_pair(), make_mlp("gated_silu"), make_x()
    for at in AT:
        found, expected = points_at(pair, mlp, x, at).jacobian, jacobian(pair, mlp, x, at=at)
        torch.testing.assert_close(found.values, expected.values)
        assert torch.equal(found.indices_out, expected.indices_out)


def test_draws_are_uniform_over_active_entries_only():
    pair, mlp = make_pair(k=3), make_mlp()
    with torch.no_grad():
        pair.output_sae.b_enc -= 1.5  # so that some of the chosen latents are not active
        points = points_at(pair, mlp, make_x(40).repeat(500, 1), "input")
    random = torch.randint(9, (20000,), generator=torch.Generator().manual_seed(0))
    pairs, kept = draw_entries(points, random)
    active = points.jacobian.active
    assert 0.05 < kept.double().mean() < 0.95
    assert (pairs.s_in > 0).all() and (pairs.s_out > 0).all()
    counts = torch.zeros(40, 9, dtype=torch.float64)
    counts.index_put_((pairs.token % 40, random[kept]), torch.ones(len(pairs.token)).double(), accumulate=True)
    expected = active[:40].flatten(1).double() * 20000 / 40 / 9
    chi_squared = ((counts - expected).square() / expected.clamp(min=1e-9))[active[:40].flatten(1)].sum().item()
    entries = int(active[:40].sum())
    assert chi_squared < entries + 5 * math.sqrt(2 * entries)
    assert counts[~active[:40].flatten(1)].sum() == 0


def linear_case(k=3, d_model=8):
    """All outputs depend on all inputs, by positive weights; k_output = d_model, so nothing can drop out."""
    edges = 0.5 + torch.rand(d_model, d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pair, mlp = identity_pair(d_model, k, k_output=d_model), graph_mlp(edges)
    return pair, mlp, points_at(pair, mlp, sparse_inputs(200, d_model, k), "input")


def test_a_linear_map_is_predicted_exactly_and_a_shuffled_graph_is_not():
    pair, mlp, points = linear_case()
    pairs = all_pairs(points)
    for figures in regression(pair, mlp, points, pairs).values():
        for key in ("slope", "r2", "correlation", "slope_through_origin", "identity_r2"):
            assert figures[key] == pytest.approx(1), key
        assert figures["drop_out_share"] == 0
    broken = regression(pair, mlp, points, shuffled(pairs))
    assert broken["unit"]["r2"] < 0.05 and broken["unit"]["identity_r2"] < 0
    assert broken["ablation"]["identity_r2"] < 0.6
    scaled = dataclasses.replace(pairs, jacobian=pairs.jacobian / 10)  # ordered rightly, of the wrong size
    figures = regression(pair, mlp, points, scaled)["unit"]
    assert figures["slope"] == pytest.approx(10) and figures["r2"] == pytest.approx(1)
    assert figures["identity_r2"] < 0.1


def test_drop_outs_are_counted_and_kept_out_of_the_regression():
    # One input for each output: without it the output is 0, and every ablation drops its own output out.
    pair, mlp = identity_pair(), graph_mlp(torch.eye(8, dtype=torch.float64))
    points = points_at(pair, mlp, sparse_inputs(), "input")
    pairs = all_pairs(points)
    own = pairs.input == pairs.output
    assert own.sum() == 600 and len(own) == 1800
    figures = regression(pair, mlp, points, pairs)
    assert figures["ablation"]["drop_out_share"] == pytest.approx(1 / 3)
    assert math.isnan(figures["ablation"]["slope"])  # all survivors are predicted, and measured, as 0
    assert figures["unit"]["drop_out_share"] == 0 and figures["unit"]["slope"] == pytest.approx(1)


def test_regression_by_hand():
    p, m = torch.tensor([0.0, 1.0, 2.0, 9.0]).double(), torch.tensor([1.0, 2.0, 6.0, 7.0]).double()
    terms = ablation.regression_terms(p, m, torch.tensor([True, True, True, False]))
    figures = ablation.regression_figures({key: value.sum() for key, value in terms.items()})
    # means 1 and 3; deviations (-1, 0, 1) and (-2, -1, 3): cov 5, var 2 and 14; residuals m - p (1, 1, 4)
    assert figures == pytest.approx({
        "slope": 2.5, "r2": 25 / 28, "correlation": 5 / math.sqrt(28), "slope_through_origin": 14 / 5,
        "identity_r2": 1 - 18 / 14, "drop_out_share": 0.25,
    })  # fmt: skip


def test_linear_maps_are_linear_and_unused_inputs_flat():
    pair, mlp, points = linear_case()
    pairs = all_pairs(points)
    with torch.no_grad():
        _, values = linearity.scalar_functions(pair, mlp, points, pairs)
    found = shares(linearity.classify(values, pairs.scale))
    assert found == {"linear_share": 1, "jump_relu_share": 0, "other_share": 0, "flat_share": 0}

    diagonal = graph_mlp(torch.eye(8, dtype=torch.float64))
    pair = identity_pair()
    points = points_at(pair, diagonal, sparse_inputs(), "input")
    pairs = all_pairs(points)
    with torch.no_grad():
        _, values = linearity.scalar_functions(pair, diagonal, points, pairs)
    classes = linearity.classify(values, pairs.scale)
    assert torch.equal(classes == linearity.CLASSES.index("flat"), pairs.input != pairs.output)
    assert shares(classes)["flat_share"] == pytest.approx(2 / 3) and shares(classes)["linear_share"] == 1


def test_thresholds_are_jump_relus():
    # y_i = relu(x_i - 0.4): 0 for the first quarter or more of the grid, as s_j is at most 0.8.
    pair, mlp = identity_pair(), graph_mlp(torch.eye(8, dtype=torch.float64), b_in=-0.4)
    points = points_at(pair, mlp, 0.3 * sparse_inputs(low=1.5), "input")
    pairs = all_pairs(points)
    with torch.no_grad():
        moved, values = linearity.scalar_functions(pair, mlp, points, pairs)
    own = pairs.input == pairs.output
    torch.testing.assert_close(values[own], (moved[own] - 0.4).relu(), atol=1e-7, rtol=0.0)
    found = shares(linearity.classify(values, pairs.scale))
    assert found["jump_relu_share"] == 1 and found["flat_share"] == pytest.approx(2 / 3)


def test_classes_of_single_functions():
    x = torch.linspace(0, 2, linearity.GRID_POINTS, dtype=torch.float64)
    functions = {
        "linear": [x, 3 - x, 100 + x, x + 0.03 * (5 * x).sin()],
        "jump_relu": [(x - 0.7).relu(), torch.where(x > 0.5, 2 + x, 0.0), torch.where(x < 1.5, 4 - x, 0.0),
                      torch.where(x > 0.2, 3.0, 0.0)],
        "flat": [1 + 0.004 * x, torch.full_like(x, 2.0)],
        "other": [x.square(), (5 * x).sin() + 1, torch.where((x > 0.5) & (x < 1.5), x, 0.0),
                  torch.where(x > 0.5, x.square(), 0.0), (x - 1).abs() + 0.5],
    }  # fmt: skip
    for name, some in functions.items():
        for number, values in enumerate(some):
            for scale in (
                1.0,
                1e-3,
                1e4,
            ):  # flatness is judged against the scale of outputs, all else against the range
                classes = linearity.classify(scale * values[None], torch.tensor([scale]).double())
                assert linearity.CLASSES[classes.item()] == name, (name, number)
    assert shares(torch.tensor([0, 0, 1, 2, 2, 2, 3])) == {
        "linear_share": 0.5, "jump_relu_share": 0.25, "other_share": 0.25, "flat_share": 3 / 7,
    }  # fmt: skip


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("kind", MLP_KINDS)
def test_second_derivatives_against_autograd(kind, at):
    pair, mlp, x = make_pair(k=3), make_mlp(kind), make_x(3)
    with torch.no_grad():
        points = points_at(pair, mlp, x, at)
        pairs = all_pairs(points)
        found = curvature.second_derivatives(pair, mlp, points, pairs)
    assert kind == "relu" or (found.abs() > 1e-4).any()
    for row in range(0, len(pairs.token), 2):
        function, latents = latent_map(pair, mlp, x[pairs.token[row]], at)
        unit = torch.nn.functional.one_hot(pairs.input[row], len(latents)).double()

        def along(t, function=function, latents=latents, unit=unit, output=pairs.output[row]):
            return function(latents + t * unit)[output]

        start = torch.zeros((), dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(along(start), start, create_graph=True)[0]
        second = torch.autograd.grad(first, start)[0].item() if first.requires_grad else 0.0
        assert found[row].item() == pytest.approx(second, abs=1e-10)
        assert pairs.jacobian[row].item() == pytest.approx(first.item(), abs=1e-6)


def test_curvature_of_squares_is_known_and_scale_free():
    # y = relu(x)^2: f' = 2 s, f'' = 2, so q = s^2 / (2 s^2 + s^2) = 1/3 whatever s.
    pair = identity_pair()
    for scale in (1.0, 1e-3):
        mlp = graph_mlp(scale * torch.eye(8, dtype=torch.float64), activation="relu2")
        points = points_at(pair, mlp, sparse_inputs(), "input")
        pairs = all_pairs(points)
        share = curvature.curvature_share(
            pairs.jacobian, curvature.second_derivatives(pair, mlp, points, pairs).detach(), pairs.s_in
        )
        own = pairs.input == pairs.output
        torch.testing.assert_close(share[own], torch.full((600,), 1 / 3, dtype=torch.float64))
        assert share[~own].isnan().all()  # no derivative at all
        terms = curvature.curvature_terms(share)
        figures = curvature.curvature_figures({key: value.sum(dim=0) for key, value in terms.items()})
        assert figures["curvature_mean"] == pytest.approx(1 / 3)
        assert figures["curvature_median"] == pytest.approx(1 / 3, rel=0.13)


def test_a_linear_map_has_no_curvature():
    pair, mlp, points = linear_case()
    pairs = all_pairs(points)
    share = curvature.curvature_share(
        pairs.jacobian, curvature.second_derivatives(pair, mlp, points, pairs).detach(), pairs.s_in
    )
    terms = curvature.curvature_terms(share)
    found = curvature.curvature_figures({key: value.sum(dim=0) for key, value in terms.items()})
    assert found == {"curvature_median": 0.0, "curvature_mean": 0.0}


def test_median_from_bins():
    share = 10 ** (-6 * torch.rand(4001, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    terms = curvature.curvature_terms(share)
    found = curvature.curvature_figures({key: value.sum(dim=0) for key, value in terms.items()})
    assert found["curvature_median"] == pytest.approx(share.median().item(), rel=0.03)
    assert found["curvature_mean"] == pytest.approx(share.mean().item())
    edges = torch.cat([torch.zeros(1).double(), torch.logspace(-8, 0, curvature.NUM_BINS, dtype=torch.float64)])
    bins = curvature.curvature_bins(share)
    assert (edges[bins] <= share * (1 + 1e-9)).all() and (share <= edges[bins + 1] * (1 + 1e-9)).all()
    ends = torch.tensor([0.0, 1e-9, 1.0], dtype=torch.float64)
    assert curvature.curvature_bins(ends).tolist() == [0, 0, curvature.NUM_BINS - 1]


def test_permuting_latents_changes_nothing():
    pair, mlp, x = make_pair(), make_mlp("gated_silu"), make_x(6)
    permuted = SAEPair(10, 32, 5).double()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for (_, old), (_, new) in zip(pair.named_saes(), permuted.named_saes(), strict=True):
            new.W_enc.copy_(old.W_enc[:, order])
            new.b_enc.copy_(old.b_enc[order])
            new.W_dec.copy_(old.W_dec[order])
            new.b_dec.copy_(old.b_dec)
        figures = []
        for some in (pair, permuted):
            points = points_at(some, mlp, x, "input")
            pairs, _ = draw_entries(points, torch.arange(6) * 4)
            _, values = linearity.scalar_functions(some, mlp, points, pairs)
            figures.append((values, curvature.second_derivatives(some, mlp, points, pairs), pairs.jacobian))
    for one, other in zip(*figures, strict=True):
        torch.testing.assert_close(one, other)


def test_spread():
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 5) == [0, 1, 2] and spread(5, 5) == list(range(5))
