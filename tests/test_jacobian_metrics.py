"""Sparsity measures of Jacobians: hand-computed values, extremes, invariances, slow definitions beside fast ones."""

import math

import pytest
import torch

from jsae_lightning import jacobian_metrics as jm
from jsae_lightning.errors import UserError
from jsae_lightning.metrics import add_sums

# n = 6, sum|J| = 10, sum J^2 = 30, max 4.
J = torch.tensor([[[4.0, -3.0, 0.0], [0.0, 2.0, 1.0]]])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def measures(values):
    """Every measure, with all latents active."""
    tokens, k_out, k_in = values.shape
    active = torch.ones(tokens, k_out, dtype=torch.bool), torch.ones(tokens, k_in, dtype=torch.bool)
    return jm.jacobian_measures(values, *active)


def means(values):
    tokens, k_out, k_in = values.shape
    active = torch.ones(tokens, k_out, dtype=torch.bool), torch.ones(tokens, k_in, dtype=torch.bool)
    return jm.jacobian_means(jm.jacobian_sums(values, *active))


BY_HAND = {
    "mean_abs": 10 / 6,
    "share_above_0.005": 4 / 6,
    "share_above_0.01": 4 / 6,
    "share_above_0.015": 4 / 6,
    "share_above_0.02": 4 / 6,
    "rms_share_above_0.5": 3 / 6,  # root mean square sqrt(5) = 2.236: above 1.118 are 4, 3, 2
    "rms_share_above_1": 2 / 6,
    "rms_share_above_2": 0,
    "rms_share_above_4": 0,
    "max_share_above_0.01": 4 / 6,
    "max_share_above_0.05": 4 / 6,
    "max_share_above_0.1": 4 / 6,
    "max_share_above_0.5": 2 / 6,  # 2 is not above half of 4
    "effective_edges": 100 / 30,
    "effective_edges_per_output": (49 / 25 + 9 / 5) / 2,
    "hoyer": (math.sqrt(6) - 10 / math.sqrt(30)) / (math.sqrt(6) - 1),
    # Differences over all ordered pairs of 4, 3, 2, 1, 0, 0: twice 1+2+3+4+4 + 1+2+3+3 + 1+2+2 + 1+1 = 30.
    "gini": 60 / (2 * 6 * 10),
    # Mean 4/6; the moments of 4, -3, 0, 0, 2, 1 about it.
    "kurtosis": (sum((x - 2 / 3) ** 4 for x in (4, -3, 0, 0, 2, 1)) / 6)
    / (sum((x - 2 / 3) ** 2 for x in (4, -3, 0, 0, 2, 1)) / 6) ** 2,
    "top_share_1": 0.4,
    "top_share_2": 0.7,
    "top_share_4": 1,
    "top_share_6": 1,
    "edges_for_50": 1,  # 4 of 7; 2 of 3
    "edges_for_90": 2,
    "edges_for_99": 2,
    "active_entries": 6,
    "zero_token_share": 0,
    "zero_row_share": 0,
}


def test_every_measure_by_hand():
    found = {name: value.item() for name, value in measures(J).items()}
    assert found == pytest.approx(BY_HAND)


def test_single_functions_agree_with_the_collection():
    values, found = normal(20, 5, 7) ** 3, measures(normal(20, 5, 7) ** 3)
    expected = {
        **{f"share_above_{t}": jm.share_above(values, t) for t in (0.005, 0.01, 0.015, 0.02)},
        **{f"rms_share_above_{t:g}": jm.rms_share_above(values, t) for t in (0.5, 1.0, 2.0, 4.0)},
        **{f"max_share_above_{t}": jm.max_share_above(values, t) for t in (0.01, 0.05, 0.1, 0.5)},
        **{f"top_share_{m}": share for m, share in jm.top_shares(values).items()},
        **{f"edges_for_{percent}": jm.edges_for(values, percent / 100) for percent in (50, 90, 99)},
        **{name: getattr(jm, name)(values) for name in ("effective_edges", "effective_edges_per_output")},
        **{name: getattr(jm, name)(values) for name in ("hoyer", "gini", "kurtosis")},
    }
    assert set(found) - set(expected) == {"mean_abs", "active_entries", "zero_token_share", "zero_row_share"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_against_slow_definitions():
    values = normal(6, 4, 5, dtype=torch.float64) ** 3
    found = measures(values)
    for token, matrix in enumerate(values.tolist()):
        entries = [abs(x) for row in matrix for x in row]
        n, total = len(entries), sum(entries)
        gini = sum(abs(a - b) for a in entries for b in entries) / (2 * n * total)
        assert found["gini"][token].item() == pytest.approx(gini)
        for m in (1, 2, 4, 8, 16, 20):
            top = sum(sorted(entries, reverse=True)[:m]) / total
            assert found[f"top_share_{m}"][token].item() == pytest.approx(top)
        for percent in (50, 90, 99):
            needed = []
            for row in matrix:
                row = sorted((abs(x) for x in row), reverse=True)
                needed.append(next(m for m in range(1, 6) if sum(row[:m]) >= percent / 100 * sum(row)))
            assert found[f"edges_for_{percent}"][token].item() == pytest.approx(sum(needed) / 4)
        rms = math.sqrt(sum(x * x for x in entries) / n)
        for t in (0.5, 1, 2, 4):
            share = sum(x > t * rms for x in entries) / n
            assert found[f"rms_share_above_{t}"][token].item() == pytest.approx(share)


def test_thresholds_differ_from_one_another():
    """A loop variable bound too late would give every threshold the last one's share."""
    raw = torch.tensor([0.007, 0.012, 0.017, 0.03]).reshape(1, 2, 2)
    found = measures(raw)
    assert [found[f"share_above_{t}"].item() for t in (0.005, 0.01, 0.015, 0.02)] == [1, 0.75, 0.5, 0.25]
    spread = torch.cat([torch.tensor([6.0, 3.0, 1.2, 0.6]), torch.full((60,), 0.25)]).reshape(1, 8, 8)  # rms about 0.9
    found = measures(spread)
    assert [64 * found[f"rms_share_above_{t}"].item() for t in (0.5, 1, 2, 4)] == [4, 3, 2, 1]
    largest = torch.tensor([1.0, 0.3, 0.07, 0.02]).reshape(1, 2, 2)
    found = measures(largest)
    assert [4 * found[f"max_share_above_{t}"].item() for t in (0.01, 0.05, 0.1, 0.5)] == [4, 3, 2, 1]


def test_a_single_edge_is_as_sparse_as_can_be():
    values = torch.zeros(1, 4, 4)
    values[0, 2, 1] = -0.3
    found = {name: value.item() for name, value in measures(values).items()}
    ones = ("effective_edges", "effective_edges_per_output", "hoyer", "top_share_1", "top_share_16")
    ones += ("edges_for_50", "edges_for_90", "edges_for_99")
    assert [found[name] for name in ones] == pytest.approx([1] * len(ones))
    assert found["gini"] == pytest.approx(15 / 16)
    assert found["zero_row_share"] == 3 / 4
    assert [found[f"rms_share_above_{t}"] for t in (0.5, 1, 2, 4)] == [1 / 16] * 3 + [0]  # the edge is 4 times the rms


@pytest.mark.parametrize("size", [0.1, 0.3, 1 / 3, 7.0])
def test_equal_entries_are_as_dense_as_can_be(size):
    values = torch.full((1, 5, 10), size) * torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0)
    found = {name: value.item() for name, value in measures(values).items()}
    assert (found["hoyer"], found["gini"]) == pytest.approx((0, 0), abs=1e-12)
    assert (found["effective_edges"], found["effective_edges_per_output"]) == pytest.approx((50, 10))
    assert (found["top_share_1"], found["top_share_32"], found["top_share_50"]) == pytest.approx((0.02, 0.64, 1))
    assert (found["edges_for_50"], found["edges_for_90"], found["edges_for_99"]) == (5, 9, 10)
    assert (found["rms_share_above_0.5"], found["rms_share_above_1"]) == (1, 0)
    assert found["kurtosis"] == pytest.approx(1)
    assert measures(values.abs())["kurtosis"].item() == 1  # no variance at all


def test_rounding_does_not_decide_ties():
    """Equal entries do not exceed their own root mean square; 4 + 3 + 2 of 10 is 90 %, in any unit."""
    for size in (19, 34, 38):  # where the rounded root mean square falls below 0.1
        equal = torch.full((1, 3, size), 0.1)
        assert jm.rms_share_above(equal, 1.0).item() == measures(equal)["rms_share_above_1"].item() == 0
    for unit in (0.01, 0.03, 0.06, 0.11):
        row = unit * torch.tensor([[[4.0, 3.0, 2.0, 1.0]]], dtype=torch.float64)
        assert jm.edges_for(row, 0.9).item() == 3


def test_kurtosis_of_a_normal_distribution_is_three():
    assert jm.kurtosis(normal(1, 300, 300)).item() == pytest.approx(3, abs=0.05)
    assert jm.kurtosis(normal(1, 300, 300) + 5).item() == pytest.approx(3, abs=0.05)  # about the mean


@pytest.mark.parametrize("scale", [2.0**-40, 1e-3, 1 / 6.7, -2.0, 1e6])
def test_scale_free_measures_ignore_scale_and_raw_ones_do_not(scale):
    values = normal(30, 6, 6, dtype=torch.float64) ** 3
    values[:, 0] = 0
    before, after = measures(values), measures(values * scale)
    for name in before:
        if not jm.is_raw(name):
            torch.testing.assert_close(after[name], before[name], msg=name)
    torch.testing.assert_close(after["mean_abs"], before["mean_abs"] * abs(scale))
    assert not torch.equal(after["share_above_0.01"], before["share_above_0.01"])


def test_order_does_not_matter():
    values, generator = normal(10, 6, 5, dtype=torch.float64), torch.Generator().manual_seed(1)
    shuffled = values[:, torch.randperm(6, generator=generator)]
    shuffled = torch.stack([row[:, torch.randperm(5, generator=generator)] for row in shuffled.unbind(1)], dim=1)
    before, after = measures(values), measures(shuffled)
    for name in before:
        torch.testing.assert_close(after[name], before[name], msg=name)
    anywhere = values.flatten(1)[:, torch.randperm(30, generator=generator)].view_as(values)
    assert not torch.equal(jm.edges_for(anywhere, 0.9), jm.edges_for(values, 0.9))
    torch.testing.assert_close(jm.gini(anywhere), jm.gini(values))


def test_tokens_without_edges_are_counted_and_left_out_of_scale_free_means():
    with_zero = torch.cat([J, torch.zeros_like(J)])
    found = measures(with_zero)
    for name, value in found.items():
        assert math.isnan(value[1].item()) != jm.is_raw(name), name
    averaged = means(with_zero)
    assert averaged["zero_token_share"] == 0.5
    for name, value in BY_HAND.items():
        expected = value / 2 if name == "mean_abs" or name.startswith("share_above") else value
        if name != "zero_token_share":
            assert averaged[name] == pytest.approx(expected), name
    nothing = means(torch.zeros(2, 3, 3))
    assert nothing["mean_abs"] == 0
    assert math.isnan(nothing["gini"])


def test_zero_rows_do_not_make_the_rows_look_sparse():
    values = torch.cat([J, torch.zeros(1, 3, 3)], dim=1)
    found, active_out = measures(values), torch.tensor([[True, True, True, False, False]])
    for name in ("effective_edges_per_output", "edges_for_50", "edges_for_90", "edges_for_99"):
        assert found[name].item() == pytest.approx(BY_HAND[name]), name
    assert found["zero_row_share"].item() == pytest.approx(3 / 5)
    active_in = torch.tensor([[True, True, False]])
    masked = jm.jacobian_measures(values, active_out, active_in)
    assert masked["zero_row_share"].item() == pytest.approx(1 / 3)  # inactive rows are no zero rows
    assert masked["active_entries"].item() == 6


def test_one_by_one_jacobians():
    found = {name: value.item() for name, value in measures(torch.tensor([[[-0.2]]])).items()}
    assert (found["effective_edges"], found["top_share_1"], found["edges_for_99"], found["kurtosis"]) == (1, 1, 1, 1)
    assert (found["hoyer"], found["gini"]) == (0, 0)
    assert all(math.isfinite(value) for value in found.values())


def test_broken_numbers_are_not_averaged_away():
    values = normal(3, 2, 2)
    values[1, 0, 0] = math.nan
    averaged = means(values)
    assert all(math.isnan(averaged[name]) for name in ("mean_abs", "effective_edges", "gini", "hoyer"))


def test_sums_of_parts_equal_the_whole():
    values = normal(40, 4, 4, dtype=torch.float64) ** 3
    values[3:9] = 0
    active = torch.ones(40, 4, dtype=torch.bool)
    parts = [jm.jacobian_sums(values[a:b], active[a:b], active[a:b]) for a, b in ((0, 5), (5, 11), (11, 40))]
    total = add_sums(add_sums(parts[0], parts[1]), parts[2])
    assert jm.jacobian_means(total) == pytest.approx(means(values), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(1, [1]), (2, [1, 2]), (9, [1, 2, 4, 8, 9]), (16, [1, 2, 4, 8, 16]), (1024, [2**p for p in range(11)])],
)
def test_sizes_of_top_shares(n, sizes):
    assert jm.top_share_sizes(n) == sizes


def test_a_shrunken_baseline_passes_thresholds_but_is_no_sparser():
    baseline = 0.05 * normal(50, 8, 8, dtype=torch.float64)
    shrunken = baseline / 6.7
    scale = jm.shrink_matched_scale(shrunken, baseline)
    assert scale == pytest.approx(1 / 6.7)
    for threshold in (0.005, 0.01, 0.015, 0.02):
        raw, matched = jm.share_above(baseline, threshold), jm.share_above(baseline * scale, threshold)
        assert matched.mean() < 0.7 * raw.mean()
        torch.testing.assert_close(matched, jm.share_above(baseline, threshold / scale))
        torch.testing.assert_close(matched, jm.share_above(shrunken, threshold))
    torch.testing.assert_close(jm.effective_edges(shrunken), jm.effective_edges(baseline))
    # Real sparsity: as small on average, yet above the matched baseline at the top, and fewer effective edges.
    sparse = torch.where(baseline.abs() > baseline.abs().quantile(0.9), baseline, 0.0)
    matched = baseline * jm.shrink_matched_scale(sparse, baseline)
    torch.testing.assert_close(matched.abs().mean(), sparse.abs().mean())
    assert jm.share_above(sparse, 0.08).mean() > 3 * jm.share_above(matched, 0.08).mean()
    assert jm.effective_edges(sparse).mean() < 0.3 * jm.effective_edges(matched).mean()


def test_scale_of_an_empty_baseline_is_refused():
    with pytest.raises(UserError, match="zeros"):
        jm.shrink_matched_scale(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))


def test_histogram_by_hand():
    edges = jm.histogram_edges()
    assert len(edges) == 81
    assert edges[[0, 40, 80]].tolist() == pytest.approx([1e-6, 1e-2, 1e2])
    values = torch.tensor([[[0.0, 1e-7, -1.1e-6], [0.011, -0.0115, 99.0]], [[100.0, -1e5, 0.0], [1.0, 0.0, 2.0]]])
    counts = jm.abs_histogram(values, edges)
    assert counts.shape == (83,)
    assert counts.sum() == values.numel()
    assert (counts[0], counts[1], counts[-1]) == (3, 1, 2)  # zeros, below 1e-6, from 100 on
    # Bin b holds [edges[b], edges[b + 1]) and stands at b + 2.
    found = {b: counts[b + 2].item() for b in range(80) if counts[b + 2]}
    lower = {math.floor((math.log10(x) + 6) * 10 + 1e-4): None for x in (1.1e-6, 0.011, 99.0, 1.0, 2.0)}
    assert list(found) == sorted(lower)
    assert found[40] == 2


def test_histograms_of_batches_add_up_and_follow_scale():
    values, edges = normal(9, 4, 4), jm.histogram_edges(-3, 1, 5)
    halves = jm.abs_histogram(values[:4], edges) + jm.abs_histogram(values[4:], edges)
    assert torch.equal(halves, jm.abs_histogram(values, edges))
    rms = jm.abs_histogram(jm.rms_normalized(values.double()), edges)
    assert torch.equal(rms, jm.abs_histogram(jm.rms_normalized(values.double() * 2**-20), edges))
    assert not torch.equal(rms, jm.abs_histogram(values * 2**-20, edges))


def test_normalized_by_root_mean_square_and_maximum():
    values = torch.cat([normal(2, 3, 3), torch.zeros(1, 3, 3)])
    rms, largest = jm.rms_normalized(values), jm.max_normalized(values)
    assert rms[:2].square().mean(dim=(1, 2)).tolist() == pytest.approx([1, 1])
    assert largest[:2].abs().amax(dim=(1, 2)).tolist() == [1, 1]
    assert rms[2].abs().sum() == largest[2].abs().sum() == 0
