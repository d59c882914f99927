"""The comparison with a known graph: closed-form cases, brute force, and pairs of which the answer is known."""

import dataclasses
import itertools
import math

import pytest
import torch

from factories import make_pair
from fake_language_model import FakeLanguageModel
from jsae_lightning import ground_truth
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.ground_truth import (
    ground_truth_sums,
    group_sums,
    judge_run,
    matchings_of,
    run_ground_truth,
    summarize_ground_truth,
    zero_sums,
)
from jsae_lightning.held_out import HeldOut
from jsae_lightning.metrics import add_sums
from jsae_lightning.sae import SAEPair
from jsae_lightning.synthetic.assignment import best_assignment
from jsae_lightning.synthetic.documents import SyntheticDocuments
from jsae_lightning.synthetic.language_model import SyntheticLanguageModel
from jsae_lightning.synthetic.matching import Matching, match
from jsae_lightning.synthetic.ranking import precision_recall
from synthetic_factories import spec_values, true_pair

# Assignment


def test_assignment_by_hand():
    # Greedy would take 10 first and end with 10 + 1
    assert best_assignment(torch.tensor([[10.0, 9.0], [8.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_assignment_against_brute_force(rows, seed):
    values = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    best = max(
        sum(float(values[row, column]) for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(5), rows)
    )
    found = best_assignment(values)
    assert len(set(found.tolist())) == rows
    assert float(values[torch.arange(rows), found].sum()) == pytest.approx(best, abs=1e-5)


def test_assignment_finds_a_hidden_permutation():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(60, 60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(best_assignment(torch.eye(60)[order] + 0.4 * noise), order)


def test_assignment_refuses_what_has_none():
    with pytest.raises(ValueError, match="3 rows"):
        best_assignment(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="finite"):
        best_assignment(torch.tensor([[math.nan]]))


# Matching


def test_matching_by_hand():
    directions = torch.eye(3)
    half_way = torch.tensor([1.0, 1.0, 0.0]) / 2**0.5
    near = torch.tensor([0.0, 0.9, 0.19**0.5])
    W_dec = torch.stack([half_way, -directions[0], 3 * directions[1], near])
    matching = match(directions, W_dec)
    assert matching.latent_of.tolist() == [-1, 2, -1]
    assert matching.feature_of.tolist() == [-1, -1, 1, -1]
    assert matching.nearest_feature.tolist() == [-1, -1, 1, 1]
    assert matching.best_cosine.tolist() == pytest.approx([0.5**0.5, 1.0, 0.19**0.5])
    assert matching.share == pytest.approx(1 / 3)
    assert matching.latents_per_feature == 2.0


def test_matching_follows_a_permutation_and_ignores_scale():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    order = torch.randperm(12, generator=generator)
    matching = match(directions, 5 * directions[order])
    assert torch.equal(matching.feature_of, order)
    assert torch.equal(matching.latent_of[order], torch.arange(12))


def test_fewer_latents_than_features():
    matching = match(torch.eye(4), torch.eye(4)[1:3])
    assert matching.latent_of.tolist() == [-1, 0, 1, -1]
    assert matching.share == 0.5


# Ranking


def test_ranking_by_hand():
    weights = torch.tensor([0.9, 0.8, 0.8, 0.1, 0.0, 0.0])
    is_true = torch.tensor([True, True, False, True, True, False])
    curve = precision_recall(weights, is_true, 5)
    assert curve.kept.tolist() == [1, 3, 4]
    assert curve.hits.tolist() == [1, 2, 3]
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 3 / 4])
    assert curve.recall.tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert curve.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 5)
    assert curve.best() == pytest.approx((3 / 4, 3 / 5, 2 * 3 / 9))
    assert curve.precision_at(1) == 1
    assert curve.precision_at(2) == pytest.approx(1.5 / 2)
    assert curve.precision_at(3) == pytest.approx(2 / 3)
    assert curve.precision_at(100) == pytest.approx(3 / 4)


def test_ranking_without_edges():
    none = precision_recall(torch.zeros(3), torch.ones(3, dtype=torch.bool), 3)
    assert none.average_precision == 0 and none.best() == (0, 0, 0) and none.precision_at(3) == 0
    nothing = precision_recall(torch.ones(3), torch.zeros(3, dtype=torch.bool), 0)
    assert (
        math.isnan(nothing.average_precision) and math.isnan(nothing.best()[0]) and math.isnan(nothing.precision_at(0))
    )


def test_ranking_ignores_scale_and_order():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, generator=generator).round(decimals=2)
    is_true = torch.rand(200, generator=generator) < 0.3
    order = torch.randperm(200, generator=generator)
    expected = precision_recall(weights, is_true, 70)
    for found in (precision_recall(7 * weights, is_true, 70), precision_recall(weights[order], is_true[order], 70)):
        assert torch.equal(found.kept, expected.kept) and torch.equal(found.hits, expected.hits)
    # Brute force: the area under the curve, cut by cut
    area, before = 0.0, 0.0
    for cut in sorted({float(weight) for weight in weights if weight > 0}, reverse=True):
        kept = weights >= cut
        hits = float((kept & is_true).sum())
        area += (hits / 70 - before) * hits / float(kept.sum())
        before = hits / 70
    assert expected.average_precision == pytest.approx(area)


def test_a_random_ranking_has_the_precision_of_the_base_rate():
    generator = torch.Generator().manual_seed(0)
    is_true = torch.arange(20_000) < 2000
    found = precision_recall(torch.rand(20_000, generator=generator) + 0.1, is_true, 2000)
    assert found.average_precision == pytest.approx(0.1, abs=0.01)


# Pairs of which the answer is known


def _held_out(pair: SAEPair, model: SyntheticLanguageModel, mlp: FrozenMLP | None = None, **changes) -> HeldOut:
    tokens = SyntheticDocuments(model.spec.to_dict(), "val").first(48)
    included = torch.ones_like(tokens, dtype=torch.bool)
    included[:, 0] = False
    fields = {
        "pair": pair,
        "mlp": (mlp or model.frozen_mlp).double(),
        "language_model": model,
        "tokens": tokens,
        "included": included,
        "document": torch.arange(len(tokens))[:, None].expand_as(tokens),
        "at": "input",
        "batch_sequences": 7,
    }
    return HeldOut(**(fields | changes))


def _model(**changes) -> SyntheticLanguageModel:
    return SyntheticLanguageModel(spec_values(document_length=64, vocab_size=128, **changes))


def _pair(model: SyntheticLanguageModel, **changes) -> SAEPair:
    # Activations are far above the threshold, rounding far below
    return true_pair(model.computation, k=model.spec.active_groups * model.spec.group_size, bias=1e-4, **changes)


def _figures(held_out: HeldOut) -> dict[str, float]:
    return {key.removeprefix("ground_truth/"): value for key, value in run_ground_truth(held_out).figures.items()}


PERFECT = (
    "average_precision", "average_precision_matched", "average_precision_pooled", "precision", "recall", "f1",
    "precision_at_true_count", "matched_share_input", "matched_share_output", "mean_cosine_input",
    "mean_cosine_output", "latents_per_feature_input", "latents_per_feature_output",
)  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_the_true_dictionaries_find_the_graph(activation, at):
    model = _model(activation=activation, negative_share=0.3, threshold_low=0.0, threshold_high=0.1)
    held_out = _held_out(_pair(model), model, at=at)
    figures = _figures(held_out)
    for key in PERFECT:
        assert figures[key] == pytest.approx(1.0), key
    # Two input groups of one slot are never active together, so a negative edge of one may never be seen at work.
    seen = (model.computation.jacobian(model.features(held_out.tokens).flatten(0, 1)) != 0).any(0)
    assert figures["true_edges"] == seen.sum()
    assert 12 <= seen.sum() <= (model.computation.weights != 0).sum() == 16
    assert figures["effective_edges_found"] == pytest.approx(figures["effective_edges_true"], rel=0.01)
    assert figures["weight_on_true_edges"] > 0.999
    assert figures["token_recall"] > 0.99


def _permuted(pair: SAEPair, seed: int = 0) -> SAEPair:
    generator = torch.Generator().manual_seed(seed)
    other = SAEPair(
        pair.d_model,
        pair.input_sae.d_sae,
        pair.input_sae.k,
        d_sae_output=pair.output_sae.d_sae,
        k_output=pair.output_sae.k,
    ).double()
    with torch.no_grad():
        for (_, new), (_, old) in zip(other.named_saes(), pair.named_saes(), strict=True):
            order = torch.randperm(old.d_sae, generator=generator)
            new.W_dec[:], new.W_enc[:], new.b_enc[:] = old.W_dec[order], old.W_enc[:, order], old.b_enc[order]
    return other


def test_the_order_of_latents_does_not_matter():
    model = _model()
    pair = _pair(model, extra=5)
    straight, permuted = _figures(_held_out(pair, model)), _figures(_held_out(_permuted(pair), model))
    assert straight == pytest.approx(permuted)
    assert straight["average_precision"] == 1


def test_the_scale_of_the_jacobian_does_not_matter():
    model = _model(d_model=8)
    pair, scaled = (make_pair(8, 24, 5, seed=3) for _ in range(2))
    with torch.no_grad():
        scaled.output_sae.W_enc *= 10
        scaled.output_sae.b_enc *= 10
    assert _figures(_held_out(pair, model)) == pytest.approx(_figures(_held_out(scaled, model)), nan_ok=True)


def test_a_random_pair_finds_nothing():
    model = _model()
    figures = _figures(_held_out(make_pair(20, 64, 5), model))
    assert figures["average_precision"] < 0.02
    assert figures["matched_share_input"] < 0.1
    assert figures["mean_cosine_input"] < 0.75


def test_random_encoders_rank_edges_by_chance():
    """True directions, but an output that reads them at random: about the base rate."""
    model = _model()
    pair = _pair(model)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        pair.output_sae.W_enc.copy_(torch.randn(pair.output_sae.W_enc.shape, generator=generator, dtype=torch.float64))
    figures = _figures(_held_out(pair, model))
    assert figures["matched_share_output"] == 1
    assert figures["base_rate"] == pytest.approx(16 / (16 * 8), rel=0.1)
    assert figures["average_precision"] == pytest.approx(figures["base_rate"], abs=0.12)


def test_half_of_the_edges_removed_halves_the_recall():
    """An MLP that has lost the second edge of each output: what is found is true, half of the truth is missed."""
    model = _model(threshold_low=-0.5, threshold_high=-0.5)
    computation = model.computation
    weights = computation.weights.clone()
    for row in weights:
        row[row.nonzero()[-1]] = 0
    half = dataclasses.replace(computation, weights=weights)
    figures = _figures(_held_out(_pair(model), model, half.mlp()))
    assert figures["precision"] == pytest.approx(1.0)
    assert figures["recall"] == pytest.approx(0.5)
    assert figures["f1"] == pytest.approx(2 / 3)
    assert figures["average_precision"] == pytest.approx(0.5, abs=0.02)
    assert figures["average_precision_matched"] == pytest.approx(0.5, abs=0.02)


def test_features_half_of_which_are_missing():
    """Half of the input latents point elsewhere: their edges are false, and the graph of the others is still right."""
    model = _model()
    pair = _pair(model)
    with torch.no_grad():
        odd = pair.input_sae.W_dec[1::2].clone()
        # The rotation by 45 degrees inside of each group, which reconstructs as well with another code
        pair.input_sae.W_dec[1::2] = (odd + pair.input_sae.W_dec[::2]) / 2**0.5
    found = run_ground_truth(_held_out(pair, model))
    figures = {key.removeprefix("ground_truth/"): value for key, value in found.figures.items()}
    assert figures["matched_share_input"] == 0.5
    assert found.curve.recall[-1] == pytest.approx(0.5)
    assert figures["average_precision_matched"] == pytest.approx(1.0)
    # Each of the 8 rotated latents has the edge of its own feature and that of its neighbour: 8 true, 16 false ones
    assert figures["base_rate"] == pytest.approx(8 / 24)
    assert 8 / 24 * 0.5 < figures["average_precision"] <= 0.5


def test_split_features_are_forgiven_when_pooled():
    """Two latents that take turns for each input feature, by a third direction: half of the edges are duplicates."""
    model = _model()
    pair = _pair(model, extra=16)
    with torch.no_grad():
        pair.input_sae.W_dec[16:] = pair.input_sae.W_dec[:16]
        pair.input_sae.W_enc[:, 16:] = pair.input_sae.W_enc[:, :16]
        pair.input_sae.b_enc[16:] = pair.input_sae.b_enc[:16]
        pair.input_sae.k = 8
    figures = _figures(_held_out(pair, model))
    assert figures["latents_per_feature_input"] == 2
    assert figures["average_precision_pooled"] == pytest.approx(1.0)
    assert figures["base_rate"] == pytest.approx(0.5)
    assert figures["average_precision"] < 0.9


def _matching(nearest: list[int], n: int) -> Matching:
    latent_of = torch.tensor([nearest.index(feature) for feature in range(n)])
    feature_of = torch.full((len(nearest),), -1).scatter(0, latent_of, torch.arange(n))
    return Matching(latent_of, feature_of, torch.tensor(nearest), torch.ones(n, dtype=torch.float64))


def test_latents_that_take_turns_weigh_as_much_as_one():
    """Two output features with one true edge each; three latents share the first one, whose false edge is half as
    strong as the second feature's true one. Means of the latents would add up to more than that."""  # fmt: skip
    one, split = [0, 1], [0, 0, 0, 1]
    sums = {
        "found": torch.tensor([[30.0, 12.0], [0.0, 24.0]]).double(),  # 30 tokens each
        "active_found": torch.tensor([30.0, 30.0]).double(),
        "active_pooled": torch.tensor([30.0, 30.0]).double(),
    }
    is_edge = torch.eye(2, dtype=torch.bool)
    inputs = _matching([0, 1], 2)
    whole = ground_truth._pooled(sums, is_edge, inputs, _matching(one, 2))
    parts = sums | {
        "found": torch.cat([sums["found"][:1].expand(3, 2) / 3, sums["found"][1:]]),
        "active_found": torch.tensor([10.0, 10.0, 10.0, 30.0]).double(),
    }
    shared = ground_truth._pooled(parts, is_edge, inputs, _matching(split, 2))
    assert whole.average_precision == shared.average_precision == 1
    torch.testing.assert_close(whole.kept, shared.kept)


def test_a_feature_is_active_where_any_of_its_latents_is():
    active = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    feature = torch.tensor([[0, 0, 1], [-1, 1, 0], [0, 1, 0]])
    expected = torch.tensor([[True, False], [True, True], [False, False]])
    assert torch.equal(ground_truth._active_features(active, feature, 2), expected)


# Sums


def test_sums_of_parts_add_up_and_match_a_brute_force():
    model = _model(d_model=12, negative_share=0.3, activation="gelu")
    pair, mlp = _pair(model, extra=3), model.computation.mlp().double()
    matching_in = match(model.computation.directions_in, pair.input_sae.W_dec)
    matching_out = match(model.computation.directions_out, pair.output_sae.W_dec)
    tokens = SyntheticDocuments(model.spec.to_dict(), "val").first(1)
    x, s = model.mlp_in(tokens)[0].double(), model.features(tokens)[0]

    def sums(part: slice):
        return ground_truth_sums(pair, mlp, model.computation, x[part], s[part], matching_in, matching_out, at="input")

    whole = sums(slice(None))
    zero = zero_sums(pair, model.computation)
    assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in zero.items()}
    for key, value in add_sums(add_sums(zero, sums(slice(0, 20))), sums(slice(20, None))).items():
        torch.testing.assert_close(value, whole[key])

    from jsae_lightning.jacobians import jacobian_reference

    found = torch.zeros_like(whole["found"])
    counts = {"token_kept": 0, "token_hits": 0, "token_true": 0}
    for x_token, s_token in zip(x, s, strict=True):
        J = jacobian_reference(pair, mlp, x_token).detach().abs()
        found += J
        truth = {(int(i), int(j)) for i, j in (model.computation.jacobian(s_token[None])[0] != 0).nonzero()}
        ranked = sorted(((float(J[i, j]), i, j) for i, j in J.nonzero().tolist()), reverse=True)[: len(truth)]
        edges = [(int(matching_out.feature_of[i]), int(matching_in.feature_of[j])) for _, i, j in ranked]
        counts["token_kept"] += len(edges)
        counts["token_hits"] += sum(edge in truth for edge in edges)
        counts["token_true"] += len(truth)
    torch.testing.assert_close(whole["found"], found)
    assert {key: int(whole[key]) for key in counts} == counts
    assert 0 < counts["token_hits"] < counts["token_true"]


def test_sums_of_groups_add_up_to_the_whole():
    model = _model()
    pair = _pair(model, extra=2)
    held_out = _held_out(pair, model)
    matchings = matchings_of(held_out)
    (whole,) = group_sums(held_out, matchings, torch.zeros_like(held_out.tokens), 1)
    parts = group_sums(held_out, matchings, held_out.document // 10, 6)
    assert parts[5]["tokens"] == 0 and parts[0]["tokens"] == 10 * 63
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        total = add_sums(total, part)
    for key, value in whole.items():
        torch.testing.assert_close(total[key], value)
    figures = summarize_ground_truth(total, *matchings).figures
    assert figures == pytest.approx(run_ground_truth(held_out).figures)


def test_ranks_share_the_sequences_out(monkeypatch, caplog):
    model = _model()
    held_out = _held_out(_pair(model), model)
    matchings, group = matchings_of(held_out), torch.zeros_like(held_out.tokens)
    (whole,) = group_sums(held_out, matchings, group, 1)
    total: dict[str, torch.Tensor] = {}
    num_sequences = len(held_out.tokens)
    caplog.set_level("INFO")
    for rank in range(3):
        monkeypatch.setattr(ground_truth, "rank_and_world_size", lambda rank=rank: (rank, 3))
        (part,) = group_sums(held_out, matchings, group, 1)
        assert part["tokens"] == 16 * 63
        share = len(range(rank, num_sequences, 3))
        assert caplog.messages[-1] == f"ground truth: {share}/{share} sequences  left 0:00:00"
        total = add_sums(total, part)
    for key, value in whole.items():
        torch.testing.assert_close(total[key], value)


def test_no_token_gives_no_figures():
    model = _model()
    pair = _pair(model)
    matching_in = match(model.computation.directions_in, pair.input_sae.W_dec)
    matching_out = match(model.computation.directions_out, pair.output_sae.W_dec)
    found = summarize_ground_truth(zero_sums(pair, model.computation), matching_in, matching_out)
    assert math.isnan(found.figures["ground_truth/average_precision"])
    assert math.isnan(found.figures["ground_truth/token_precision"])


def test_other_models_and_empty_masks_are_refused(tmp_path):
    model = _model()
    held_out = _held_out(_pair(model), model)
    with pytest.raises(UserError, match="it needs model=synthetic"):
        run_ground_truth(dataclasses.replace(held_out, language_model=FakeLanguageModel()))
    with pytest.raises(UserError, match="none of the 3072 positions is included"):
        run_ground_truth(dataclasses.replace(held_out, included=torch.zeros_like(held_out.included)))


def test_a_run_is_judged_from_its_folder(tmp_path):
    model = _model()
    pair = _pair(model).float()
    metadata = {
        "model": {
            "name": "synthetic",
            "revision": None,
            "layer": 0,
            "dtype": "float32",
            "random_weights": False,
            "random_seed": 0,
            "synthetic": model.spec.to_dict(),
            "mlp_hash": model.frozen_mlp.weights_hash(),
        },
        "jacobian": {"at": "input"},
    }
    pair.save(tmp_path / "known", metadata=metadata)
    found = judge_run(tmp_path / "known", sequences=20)
    assert found.figures["ground_truth/average_precision"] == pytest.approx(1.0)
    torch.testing.assert_close(found.found, found.true, rtol=0, atol=5e-3)
    metadata["model"] |= {"name": "jsae-lightning/tiny-lm", "synthetic": None}
    from jsae_lightning.frozen_mlp import FrozenMLP as MLP

    metadata["model"]["mlp_hash"] = MLP.from_pretrained("jsae-lightning/tiny-lm", layer=0).weights_hash()
    pair.save(tmp_path / "other", metadata=metadata)
    with pytest.raises(UserError, match="it needs a run of model=synthetic"):
        judge_run(tmp_path / "other")
