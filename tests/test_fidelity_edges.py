"""Fidelity of the graph as a whole: rankings, curves and the figures of a run, on known graphs and by brute force."""

import dataclasses
import math

import pytest
import torch

from factories import make_mlp, make_pair, make_x
from fake_language_model import FakeLanguageModel, make_tokens
from jsae_lightning.errors import UserError
from jsae_lightning.fidelity import edge_curves, passes, run_fidelity
from jsae_lightning.fidelity.edge_ranking import (
    RANKINGS,
    edge_numbers,
    integrated_gradients,
    kept_counts,
    ranking_scores,
    row_prefixes,
)
from jsae_lightning.fidelity.points import points_at
from jsae_lightning.fidelity.run import make_plan, pair_figures
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jacobians import latent_map
from jsae_lightning.metrics import add_sums, without_prefix
from jsae_lightning.sae import TopKSAE
from known_graphs import SparseLanguageModel, graph_mlp, held_out, identity_pair

AT = ["input", "reconstruction"]


def pre_activations(sae: TopKSAE, y: torch.Tensor) -> torch.Tensor:
    return (y - sae.b_dec if sae.subtract_b_dec else y) @ sae.W_enc + sae.b_enc


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("kind", ["gelu", "gated_silu", "relu2"])
def test_integrated_gradients_are_complete_and_follow_the_path(kind, at):
    pair, mlp, x = make_pair(d_sae_output=24, k_output=4), make_mlp(kind), make_x(4)
    with torch.no_grad():
        points = points_at(pair, mlp, x, at)
        decoded = pair.input_sae.decode(points.latents_in) - pair.input_sae.b_dec
        change = pre_activations(pair.output_sae, mlp(points.x)) - pre_activations(
            pair.output_sae, mlp(points.x - decoded)
        )
        expected = change.gather(1, points.latents_out.indices)
        fine = integrated_gradients(pair, mlp, points, steps=400).sum(dim=2)
        coarse = integrated_gradients(pair, mlp, points).sum(dim=2)
        one = integrated_gradients(pair, mlp, points, steps=1)
    assert points.jacobian.active.all()
    torch.testing.assert_close(fine, expected, atol=2e-4, rtol=2e-4)
    assert (coarse - expected).norm() < 0.03 * expected.norm()
    # One step is J at the path's middle, by automatic differentiation of the pre-activations.
    for t in range(4):
        _, latents = latent_map(pair, mlp, x[t], at)
        offset = points.x[t] - latents @ pair.input_sae.W_dec

        def outputs(s, offset=offset):
            return pre_activations(pair.output_sae, mlp((s @ pair.input_sae.W_dec + offset)[None])[0])

        middle = torch.func.jacrev(outputs)(latents / 2) * latents
        own = middle[points.latents_out.indices[t]][:, points.latents_in.indices[t]]
        torch.testing.assert_close(one[t], own, atol=1e-6, rtol=1e-5)


def test_prefixes_and_counts_by_hand():
    contribution = torch.tensor([[[1.0, -2.0], [4.0, 8.0]]]).double()
    score = torch.tensor([[[0.1, 0.4], [0.3, 0.2]]]).double()
    assert row_prefixes(contribution, score)[0].tolist() == [[0, -2, -1], [0, 4, 12]]
    assert kept_counts(score, [0, 1, 2, 3, 4])[:, 0].tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 2]]


def test_a_tokens_strongest_edges_are_its_rows_strongest_edges():
    generator = torch.Generator().manual_seed(0)
    contribution = torch.randn(20, 4, 5, generator=generator).double()
    score = contribution.abs().round(decimals=1)  # with ties
    numbers = list(range(21))
    found = row_prefixes(contribution, score)[None].expand(21, -1, -1, -1)
    found = found.gather(3, kept_counts(score, numbers)[..., None])[..., 0]
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    for number in numbers:
        mask = torch.zeros(20, 20).scatter_(1, order[:, :number], 1.0).view(20, 4, 5)
        torch.testing.assert_close(found[number], (contribution * mask).sum(dim=2))


def test_rankings_order_as_they_say_and_put_inactive_entries_last():
    pair, mlp = make_pair(k=3), make_mlp()
    with torch.no_grad():
        pair.output_sae.b_enc -= 1.5
        points = points_at(pair, mlp, make_x(30), "input")
        random = torch.rand(30, 3, 3, generator=torch.Generator().manual_seed(0)).double()
        scores = ranking_scores(pair, mlp, points, random)
    active = points.jacobian.active
    assert set(scores) == set(RANKINGS) and 0 < active.double().mean() < 1
    for score in scores.values():
        assert (score[~active] == -1).all() and (score[active] >= 0).all()
    s_in = points.latents_in.values[:, None].expand_as(active)
    torch.testing.assert_close(scores["contribution"][active], (scores["jacobian"] * s_in)[active])
    torch.testing.assert_close(scores["random"][active], random[active])
    assert edge_numbers(4, 5) == [0, 1, 2, 4, 8, 16, 20] and edge_numbers(1, 1) == [0, 1]


def test_area_by_hand():
    numbers = [0, 1, 3]  # x = 0, 1, 2
    assert edge_curves.area(torch.tensor([5.0, 1.0, 1.0]).double(), 1.0, numbers) == pytest.approx(0.75)
    assert edge_curves.area(torch.tensor([5.0, 5.0, 1.0]).double(), 1.0, numbers) == pytest.approx(0.25)
    assert edge_curves.area(torch.tensor([5.0, 5.0, 5.0]).double(), 1.0, numbers) == 0
    assert edge_curves.area(torch.tensor([5.0, 9.0, 9.0]).double(), 1.0, numbers) == pytest.approx(-0.75)
    assert math.isnan(edge_curves.area(torch.tensor([1.0, 1.0, 1.0]).double(), 1.0, numbers))


MODEL = FakeLanguageModel()
TOKENS, INCLUDED = make_tokens(sequences=6)
DOCUMENT = torch.arange(6)[:, None].expand(6, 9).contiguous()
PAIR = make_pair(d_sae_output=24, k_output=4)
SETTINGS = {"tokens": 1000, "curve_sequences": 3}


def dense(at="input", **changes):
    base = HeldOut(PAIR, MODEL.mlp, MODEL, TOKENS, INCLUDED, DOCUMENT, at, batch_sequences=2, seed=0)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module", params=AT)
def result(request):
    return request.param, run_fidelity(dense(request.param), DOCUMENT, **SETTINGS)


def test_curves_against_one_token_at_a_time(result):
    at, found = result
    plan = make_plan(dense(at), DOCUMENT, **SETTINGS)
    assert not set(plan.pair_sequences) & set(plan.curve_sequences)

    def edges(x):  # [(|J s|, i, j slot, J s)] strongest first, s_y by latent
        with torch.no_grad():
            points = points_at(PAIR, MODEL.mlp, x[None], at)
        J, s, outputs = points.jacobian.values[0], points.latents_in.values[0], points.latents_out
        active = {i.item(): v.item() for i, v in zip(outputs.indices[0], outputs.values[0], strict=True) if v > 0}
        listed = [
            (abs(J[a, b] * s[b]).item(), outputs.indices[0, a].item(), (J[a, b] * s[b]).item())
            for a in range(4) for b in range(5) if outputs.values[0, a] > 0 and s[b] > 0
        ]  # fmt: skip
        return sorted(listed, reverse=True), active

    rest: dict[tuple[int, int], list[float]] = {}
    for sequence in plan.pair_sequences:
        for x in MODEL.mlp_in(TOKENS[sequence][None])[0][INCLUDED[sequence]]:
            listed, active = edges(x)
            for i, value in active.items():
                own = [c for _, latent, c in listed if latent == i]
                for count in range(6):
                    rest.setdefault((i, count), []).append(value - sum(own[:count]))
    for number in (0, 2, 8, 20):
        ce, kl, error, targets = [], [], 0.0, []
        for sequence in plan.curve_sequences:
            tokens = TOKENS[sequence]
            residual, mlp_in = MODEL.residual(tokens[None])[0], MODEL.mlp_in(tokens[None])[0]
            for t in INCLUDED[sequence].nonzero()[:, 0].tolist():
                listed, active = edges(mlp_in[t])
                y, true = PAIR.output_sae.b_dec.detach().clone(), PAIR.output_sae.b_dec.detach().clone()
                for i, value in active.items():
                    own = [c for _, latent, c in listed[:number] if latent == i]
                    pool = rest.get((i, len(own)))
                    if pool is None:
                        pool = [v for (_, count), values in rest.items() if count == len(own) for v in values]
                    y += (sum(pool) / len(pool) + sum(own)) * PAIR.output_sae.W_dec[i].detach()
                    true += value * PAIR.output_sae.W_dec[i].detach()
                error += (y - true).square().sum().item()
                targets.append(true)
                if t + 1 < len(tokens):
                    clean = ((residual[t] + MODEL.mlp(mlp_in[t][None])[0]) @ MODEL.unembed).softmax(0)
                    p = ((residual[t] + y) @ MODEL.unembed).softmax(0)
                    ce.append(-math.log(p[tokens[t + 1]]))
                    kl.append((clean * (clean / p).log()).sum().item())
        spread = torch.stack(targets)
        error /= (spread - spread.mean(dim=0)).square().sum().item()
        for kind, expected in (("ce", sum(ce) / len(ce)), ("kl", sum(kl) / len(kl)), ("error", error)):
            curve = found.curves[f"edge_{kind}/contribution"]
            assert dict(zip(curve["x"], curve["y"], strict=True))[number] == pytest.approx(expected, rel=1e-6), kind


def test_figures_and_arrays_of_a_run(result):
    _, found = result
    names = ["ablation_slope", "ablation_r2", "unit_slope", "unit_r2", "drop_out_share", "linear_share", "flat_share"]
    names += ["jump_relu_share", "other_share", "curvature_median"]
    names += [f"edge_{loss}_area_{ranking}" for loss in ("ce", "kl") for ranking in RANKINGS]
    assert {f"fidelity/{name}" for name in names} <= set(found.figures)
    assert set(found.replicates) == set(found.figures)
    for name in ("fidelity/unit_slope", "fidelity/edge_kl_area_contribution"):
        values = found.replicates[name]  # three sequences, each a document, in either pass
        assert len(values) == 3 and found.figures[name].standard_error == pytest.approx(
            math.sqrt(2 / 3 * (values - values.mean()).square().sum().item())
        )
    assert set(found.curves) == {f"edge_{kind}/{name}" for kind in ("ce", "kl", "error") for name in RANKINGS}
    for kind in ("ce", "kl", "error"):
        curves = [found.curves[f"edge_{kind}/{name}"] for name in RANKINGS]
        for curve in curves:
            assert curve["x"] == [0, 1, 2, 4, 8, 16, 20] and len(curve["y"]) == len(curve["standard_error"]) == 7
            assert curve["y"][0] == pytest.approx(curves[0]["y"][0])
            assert curve["y"][-1] == pytest.approx(curves[0]["y"][-1])
            assert all(error > 0 for error in curve["standard_error"])
    arrays, pairs = found.arrays, int(INCLUDED[[1, 3, 5]].sum())
    assert len(arrays["ablation_predicted"]) == len(arrays["ablation_measured"]) <= pairs
    assert arrays["linearity_x"].shape == arrays["linearity_y"].shape == (len(arrays["linearity_class"]), 33)
    assert arrays["linearity_latents"].shape == (len(arrays["linearity_class"]), 2)
    assert (arrays["second_derivatives"] >= 0).all() and (arrays["second_derivatives"] <= 1).all()
    assert (arrays["linearity_x"][:, 0] == 0).all() and (arrays["linearity_y"][:, 16] > 0).all()


def test_shards_add_up_and_batches_do_not_matter():
    plan = make_plan(dense(), DOCUMENT, **SETTINGS)
    whole = passes.pair_sums(plan, (0, 1))
    other = make_plan(dense(batch_sequences=5), DOCUMENT, **SETTINGS)
    means = edge_curves.remainder_means(without_prefix("graph/", whole))
    for function in (passes.pair_sums, lambda plan, shard: passes.curve_sums(plan, means, shard)):
        expected = function(plan, (0, 1))
        parts = [function(other, (rank, 4)) for rank in range(4)]  # the last rank has no sequence
        total = parts[0]
        for part in parts[1:]:
            assert {key: value.shape for key, value in part.items()} == {k: v.shape for k, v in expected.items()}
            total = add_sums(total, part)
        for key, value in expected.items():
            torch.testing.assert_close(total[key], value, msg=key)


def test_both_passes_say_how_far_they_are(caplog):
    with caplog.at_level("INFO"):
        run_fidelity(dense(), DOCUMENT, **SETTINGS)
    last = [message for message in caplog.messages if message.startswith("fidelity") and message.endswith("0:00:00")]
    # E = 0, 1, 2, 4, 8, 16, 20 for three sequences in two batches: 3 + 4 rankings x 5 passes a batch
    assert last == [
        "fidelity: pairs of latents: 3/3 sequences  left 0:00:00",
        "fidelity: edge curves: 46/46 forward passes  left 0:00:00",
    ]


def test_means_come_from_other_documents():
    """Of the three sequences that are not the curves', one ends in a document of theirs; then all do."""
    chosen = make_plan(dense(), DOCUMENT, **SETTINGS).curve_sequences
    others = [s for s in range(6) if s not in chosen]
    document = DOCUMENT.clone()
    document[others[0], -1] = chosen[0]
    plan = make_plan(dense(document=document), document, **SETTINGS)
    assert plan.curve_sequences == chosen
    assert plan.pair_sequences == others[1:]
    single = torch.zeros_like(DOCUMENT)
    assert make_plan(dense(document=single), single, **SETTINGS).pair_sequences == others


def test_tokens_bound_the_random_pairs_and_the_seed_decides_them():
    plan = make_plan(dense(), DOCUMENT, tokens=5, curve_sequences=2)
    assert int(plan.pair_mask.sum()) == 5
    sums = [passes.pair_sums(make_plan(dense(seed=seed), DOCUMENT, 1000, 2), (0, 1)) for seed in (0, 0, 1)]
    latents = [some["sample/latents"] for some in sums]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])
    assert sums[0]["group/unit/pairs"].sum() == INCLUDED[make_plan(dense(), DOCUMENT, 1000, 2).pair_sequences].sum()


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"fidelity\.tokens: 0"):
        run_fidelity(dense(), DOCUMENT, tokens=0)
    with pytest.raises(UserError, match=r"fidelity\.curve_sequences: 0"):
        run_fidelity(dense(), DOCUMENT, curve_sequences=0)
    with pytest.raises(UserError, match=r"jacobian\.at"):
        run_fidelity(dense("middle"), DOCUMENT)
    single = INCLUDED & (torch.arange(6) == 2)[:, None]
    with pytest.raises(UserError, match="1 held-out sequences"):
        run_fidelity(dense(included=single), DOCUMENT)


def known_run(**changes):
    """Each output reads one input, with weights from 1 to 2 in the order of latents, so k of the k^2 edges are true."""
    weights = torch.linspace(1, 2, 8, dtype=torch.float64)
    pair, model = identity_pair(k=4), SparseLanguageModel(graph_mlp(weights.diag()), k=4)
    given = held_out(pair, model, sequences=24, **changes)
    return run_fidelity(given, given.document, tokens=300, curve_sequences=8)


@pytest.mark.parametrize("at", AT)
def test_a_graph_of_k_edges_needs_k_edges(at):
    found = known_run(at=at)
    figures = {key.removeprefix("fidelity/"): figure.mean for key, figure in found.figures.items()}
    for name in ("contribution", "jacobian", "integrated_gradients"):
        ce, kl, error = (found.curves[f"edge_{kind}/{name}"]["y"] for kind in ("ce", "kl", "error"))
        assert found.curves[f"edge_error/{name}"]["x"] == [0, 1, 2, 4, 8, 16]
        assert error[0] > 0.01 and error[3] == pytest.approx(0, abs=1e-12) and error[5] == pytest.approx(0, abs=1e-12)
        assert ce[3] == pytest.approx(figures["edge_ce_true"]) and kl[3] == pytest.approx(figures["edge_kl_true"])
        # From E = 4 on the gain is 1: x = log2(E + 1) from log2 5 to log2 17 at least.
        assert figures[f"edge_kl_area_{name}"] > 1 - math.log(5) / math.log(17)
        assert figures[f"edge_kl_area_{name}"] > figures["edge_kl_area_random"] + 0.2
    assert figures["edge_kl_true"] == pytest.approx(0, abs=1e-9)  # the pair reconstructs perfectly
    assert figures["edge_ce_true"] == pytest.approx(figures["edge_ce_clean"])
    assert figures["linear_share"] == 1 and figures["curvature_mean"] == 0
    assert figures["unit_slope"] == pytest.approx(1) and figures["unit_identity_r2"] == pytest.approx(1)
    assert figures["drop_out_share"] == pytest.approx(0.25, abs=0.08)  # the one pair in four that has an edge


def test_a_shuffled_graph_scores_badly_everywhere(monkeypatch):
    good = known_run()
    original = points_at

    def broken(*arguments):
        points = original(*arguments)
        values = points.jacobian.values.roll(1, dims=2)  # each output's edge goes to another of the active inputs
        return dataclasses.replace(points, jacobian=dataclasses.replace(points.jacobian, values=values))

    monkeypatch.setattr(passes, "points_at", broken)
    bad = known_run()
    # Not by cross-entropy: the tokens are random, so that no graph has a better one than another.
    for name in ("contribution", "jacobian"):
        key = f"fidelity/edge_kl_area_{name}"
        assert bad.figures[key].mean < 0.1 and good.figures[key].mean > 0.5
    assert bad.figures["fidelity/unit_r2"].mean < 0.3 and bad.figures["fidelity/unit_identity_r2"].mean < 0
    assert bad.curves["edge_error/contribution"]["y"][-1] > 0.5 * bad.curves["edge_error/contribution"]["y"][0]


def test_the_means_do_not_tell_about_single_tokens():
    """A latent never seen in the other sequences gets the mean over all, not its own value."""
    sums = {
        "remainder": torch.tensor([[[6.0, 0.0, 3.0]]]).double(), "active": torch.tensor([2.0, 0.0, 1.0]).double(),
    }  # fmt: skip
    assert edge_curves.remainder_means(sums).tolist() == [[[3.0, 3.0, 3.0]]]
    sums["remainder"][0, 0, 2] = 9.0
    assert edge_curves.remainder_means(sums).tolist() == [[[3.0, 5.0, 9.0]]]


def test_figures_without_data_are_nan():
    plan = make_plan(dense(), DOCUMENT, **SETTINGS)
    sums = {k: torch.zeros_like(v[0]) for k, v in without_prefix("group/", passes._zero_pair_sums(plan, 1)).items()}
    assert all(math.isnan(value) for value in pair_figures(sums).values())
