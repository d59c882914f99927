"""Figures equal `evaluate_pair`'s, errors equal brute force, and what must not matter: batches, ranks, groups."""

import math
from dataclasses import replace

import pytest
import torch

from factories import make_pair
from fake_language_model import FakeLanguageModel, make_tokens
from jsae_lightning import fine_histogram, grouped_evaluation, jacobian_metrics
from jsae_lightning.evaluation import evaluate_pair
from jsae_lightning.fine_histogram import counts_above
from jsae_lightning.grouped_evaluation import evaluate_groups, group_sums, heat_maps, spaced
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jackknife import document_groups
from jsae_lightning.jacobians import edge_penalty, jacobian
from jsae_lightning.metrics import add_sums
from jsae_lightning.penalties import make_penalty
from jsae_lightning.splicing import splice_sums, splice_sums_of

MODEL = FakeLanguageModel()
TOKENS, INCLUDED = make_tokens()
# Documents that run over the ends of sequences and change within them.
DOCUMENT = (torch.arange(45) // 6).view(5, 9)
HELD_OUT = HeldOut(
    pair=make_pair(d_sae_output=24, k_output=4), mlp=MODEL.mlp, language_model=MODEL, tokens=TOKENS, included=INCLUDED,
    document=DOCUMENT, at="input", batch_sequences=2, seed=0,
)  # fmt: skip
GROUPS = document_groups(DOCUMENT, 5)
L1 = edge_penalty(make_penalty("l1"), "jacobian")


def evaluate(held_out=HELD_OUT, groups=GROUPS, jacobian_tokens=None, penalty=L1):
    return evaluate_groups(held_out, groups, jacobian_tokens=jacobian_tokens, penalty=penalty)


def pair_figures(included=INCLUDED, at="input"):
    return evaluate_pair(
        HELD_OUT.pair, MODEL.mlp, MODEL, TOKENS, included, at=at, batch_sequences=2, jacobian_tokens=None, penalty=L1
    )


@pytest.fixture(scope="module")
def result():
    return evaluate()


@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_figures_and_arrays_equal_those_of_training(at):
    found, expected = evaluate(replace(HELD_OUT, at=at)), pair_figures(at=at)
    assert {key: figure.mean for key, figure in found.figures.items()} == pytest.approx(expected.metrics, rel=1e-9)
    assert torch.equal(found.arrays[f"histogram_abs_{at}"], expected.abs_histogram)
    assert torch.equal(found.arrays[f"histogram_rms_{at}"], expected.rms_histogram)
    other = "reconstruction" if at == "input" else "input"
    assert not torch.equal(found.arrays[f"histogram_abs_{other}"], expected.abs_histogram)
    torch.testing.assert_close(found.arrays["firing_rate_output"], expected.firing_rate_output)
    assert (found.tokens, found.jacobian_tokens) == (int(INCLUDED.sum()), int(INCLUDED.sum()))


def test_standard_errors_against_deleting_each_group(result):
    """All but the cross-entropies are those of the tokens of the other groups, judged alone."""
    left = [pair_figures(INCLUDED & (group != GROUPS)).metrics for group in range(5)]
    for key, figure in result.figures.items():
        if "ce_" in key or "kl_" in key:
            continue  # a group that is not judged is spliced all the same: see the next test
        values = [entry[key] for entry in left]
        centre = sum(values) / 5
        expected = math.sqrt(4 / 5 * sum((value - centre) ** 2 for value in values))
        assert figure.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-12), key
    assert result.figures["jacobian/effective_edges"].standard_error > 0
    assert result.figures["val/ce_score_both"].standard_error > 0
    assert result.replicates["jacobian/hoyer"].tolist() == pytest.approx([entry["jacobian/hoyer"] for entry in left])


class Mixing(FakeLanguageModel):
    """Logits that depend on what was spliced at earlier positions, as in a real model."""

    def logits(self, tokens, **replace):
        return super().logits(tokens, **replace).cumsum(dim=1)


def test_a_group_is_judged_with_everything_spliced():
    model = Mixing()
    judged = [INCLUDED & (group == GROUPS) for group in range(5)]
    parts = splice_sums_of(HELD_OUT.pair, model, TOKENS, INCLUDED, judged)
    whole = splice_sums(HELD_OUT.pair, model, TOKENS, INCLUDED)
    total = parts[0]
    for part in parts[1:]:
        total = add_sums(total, part)
    assert {key: value.item() for key, value in total.items()} == pytest.approx(
        {key: value.item() for key, value in whole.items()}
    )
    alone = splice_sums(HELD_OUT.pair, model, TOKENS, judged[1])
    assert alone["ce_input"].item() != pytest.approx(parts[1]["ce_input"].item())


def test_forward_passes_are_made_once_whatever_the_groups():
    calls = []

    class Counting(FakeLanguageModel):
        def logits(self, tokens, **replace):
            calls.append(len(tokens))
            return super().logits(tokens, **replace)

    evaluate(replace(HELD_OUT, language_model=Counting()))
    assert sum(calls) == 6 * len(TOKENS)


@pytest.mark.parametrize("world_size", [2, 7])
def test_shards_add_up_to_the_whole(world_size, result):
    settings = {"jacobian_tokens": None, "penalty": L1}
    shards = [group_sums(HELD_OUT, GROUPS, shard=(rank, world_size), **settings) for rank in range(world_size)]
    total = shards[0]
    for shard in shards[1:]:
        assert {key: value.shape for key, value in shard.items()} == {k: v.shape for k, v in total.items()}
        total = add_sums(total, shard)
    found = grouped_evaluation._summarize_groups(total, "input")
    for key, figure in result.figures.items():
        assert found.figures[key].mean == pytest.approx(figure.mean, rel=1e-9), key
        assert found.figures[key].standard_error == pytest.approx(figure.standard_error, rel=1e-6, abs=1e-12), key


def test_batches_do_not_matter(result):
    found = evaluate(replace(HELD_OUT, batch_sequences=100))
    assert {k: f.mean for k, f in found.figures.items()} == pytest.approx(
        {k: f.mean for k, f in result.figures.items()}, rel=1e-9
    )


def test_one_group_has_figures_and_no_errors(result):
    found = evaluate(groups=torch.zeros_like(GROUPS))
    assert found.figures["val/mse_input"].mean == pytest.approx(result.figures["val/mse_input"].mean)
    assert math.isnan(found.figures["val/mse_input"].standard_error)


def test_nothing_that_is_kept_grows_with_the_tokens():
    """Twice the tokens: the same shapes, and no tensor that is kept holds more than groups x the widest row."""
    long = replace(HELD_OUT, tokens=TOKENS.repeat(2, 1), included=INCLUDED.repeat(2, 1), document=DOCUMENT.repeat(2, 1))
    settings = {"shard": (0, 1), "jacobian_tokens": None, "penalty": L1}
    short = group_sums(HELD_OUT, GROUPS, **settings)
    found = group_sums(long, GROUPS.repeat(2, 1), **settings)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in short.items()}
    assert found["input/reconstruction/tokens"].sum() == 2 * short["input/reconstruction/tokens"].sum()


def test_jacobian_tokens_are_spaced_out():
    chosen = spaced(INCLUDED, 7)
    assert int(chosen.sum()) == 7
    assert not (chosen & ~INCLUDED).any()
    ordinals = INCLUDED.flatten().nonzero().flatten().tolist()
    gaps = torch.tensor([ordinals.index(i) for i in chosen.flatten().nonzero().flatten().tolist()]).diff()
    assert set(gaps.tolist()) <= {int(INCLUDED.sum()) // 7, int(INCLUDED.sum()) // 7 + 1}
    assert torch.equal(spaced(INCLUDED, None), INCLUDED)
    assert torch.equal(spaced(INCLUDED, 999), INCLUDED)
    found = evaluate(jacobian_tokens=7)
    assert found.jacobian_tokens == 7
    x = MODEL.mlp_in(TOKENS)[chosen]
    values = jacobian(HELD_OUT.pair, MODEL.mlp, x).values
    assert found.figures["jacobian/mean_abs"].mean == pytest.approx(values.abs().mean().item())


def test_groups_without_a_figure_s_tokens_do_not_count():
    """Two tokens for the Jacobian, in two of five groups: sqrt(1/2 sum (theta_g - mean)^2) = |a - b| / 2."""
    chosen = spaced(INCLUDED, 2)
    assert len(GROUPS[chosen].unique()) == 2
    found = evaluate(jacobian_tokens=2)
    a, b = jacobian(HELD_OUT.pair, MODEL.mlp, MODEL.mlp_in(TOKENS)[chosen]).values.abs().mean(dim=(1, 2)).tolist()
    figure = found.figures["jacobian/mean_abs"]
    assert (figure.mean, figure.standard_error) == pytest.approx(((a + b) / 2, abs(a - b) / 2))
    assert found.replicates["jacobian/mean_abs"].tolist() == pytest.approx([b, a])
    assert len(found.fine_histograms) == len(found.entries) == 2
    assert len(found.replicates["val/mse_input"]) == len(found.replicates["val/ce_clean"]) == 5
    assert found.figures["val/mse_input"].standard_error == evaluate().figures["val/mse_input"].standard_error
    one = evaluate(jacobian_tokens=1)
    assert math.isnan(one.figures["jacobian/mean_abs"].standard_error)


def test_heat_maps_are_jacobians_of_their_positions():
    maps, positions = heat_maps(HELD_OUT)
    assert maps.shape == (8, 4, 5)
    assert len({tuple(position) for position in positions.tolist()}) == 8
    for values, (sequence, position) in zip(maps, positions.tolist(), strict=True):
        assert INCLUDED[sequence, position]
        x = MODEL.mlp_in(TOKENS[sequence][None])[0, position][None]
        torch.testing.assert_close(values, jacobian(HELD_OUT.pair, MODEL.mlp, x).values[0].float())
    assert torch.equal(heat_maps(HELD_OUT)[1], positions)
    assert not torch.equal(heat_maps(replace(HELD_OUT, seed=1))[1], positions)


# Fine histograms


def test_shares_read_off_the_fine_histogram(result):
    """At every raw threshold, and at any other, within what is said of it."""
    x = MODEL.mlp_in(TOKENS)[INCLUDED]
    magnitudes = jacobian(HELD_OUT.pair, MODEL.mlp, x).values.abs()
    histogram = result.fine_histograms.sum(dim=0)
    assert result.entries.sum() == magnitudes.numel()
    for threshold in (*jacobian_metrics.RAW_THRESHOLDS, 1e-4, 0.123, 1.7, 2.0**-8):
        found, wrong = counts_above(histogram, threshold)
        assert abs(found - float((magnitudes > threshold).sum())) <= wrong
        assert wrong <= 0.01 * magnitudes.numel()
    assert histogram.sum() == (magnitudes > 0).sum()


def test_fine_histogram_by_hand():
    counted = fine_histogram.fine_histogram(torch.tensor([0.0, 1.0, -1.0, 1.5, 2.0, 1e-30, 1e30, math.nan]))
    assert counted.sum() == 7
    assert (counted[0], counted[-1]) == (1, 2)
    assert counts_above(counted, 1.0) == (6.0, 2.0) or counts_above(counted, 1.0) == (6.0, 0.0)
    assert counts_above(counted, 1.25) == (4.0, 0.0)
    assert counts_above(counted, 3.0)[0] == 2
    assert counts_above(counted, 1e9) == (0.0, 0.0)


def test_shares_of_many_entries_are_accurate():
    """Half a million entries, a scale that is no power of two: off by less than 1e-4."""
    values = torch.randn(500_000, generator=torch.Generator().manual_seed(0)) * 0.03
    found, _ = counts_above(fine_histogram.fine_histogram(values), 0.01 / 0.437)
    assert found / 500_000 == pytest.approx((values.abs() * 0.437 > 0.01).double().mean().item(), abs=1e-4)
