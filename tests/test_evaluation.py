"""Evaluation: against a computation by position, on perfect and empty SAEs, over shards, without side effects."""

import math

import pytest
import torch

from factories import make_pair
from fake_language_model import FakeLanguageModel, make_tokens
from jsae_lightning import evaluation, jacobian_metrics, splicing
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation import evaluate_pair, evaluation_sums, summarize
from jsae_lightning.jacobians import edge_penalty, jacobian
from jsae_lightning.metrics import add_sums
from jsae_lightning.penalties import make_penalty
from jsae_lightning.sae import SAEPair
from jsae_lightning.splicing import splice_sums, splices
from tiny_models import make_model_dir

MODEL = FakeLanguageModel()
TOKENS, INCLUDED = make_tokens()
PAIR = make_pair(d_sae_output=24, k_output=4)
SETTINGS = {
    "at": "input",
    "batch_sequences": 2,
    "jacobian_tokens": None,
    "penalty": edge_penalty(make_penalty("l1"), "jacobian"),
}


def evaluate(pair=PAIR, model=MODEL, tokens=TOKENS, included=INCLUDED, **settings):
    return evaluate_pair(pair, model.mlp, model, tokens, included, **SETTINGS | settings)


@pytest.fixture(scope="module")
def result():
    return evaluate()


def reconstruct(sae, x):
    with torch.no_grad():
        return sae(x)[0]


def perfect_pair(d_model=10):
    """SAEs that reproduce their input: latents for both signs of every coordinate, k = d_model."""
    pair = SAEPair(d_model, 2 * d_model, d_model).double()
    with torch.no_grad():
        for _, sae in pair.named_saes():
            sae.W_dec.copy_(torch.cat([torch.eye(d_model), -torch.eye(d_model)]))
            sae.W_enc.copy_(sae.W_dec.T)
    return pair


def empty_pair(d_model=10):
    pair = SAEPair(d_model, 20, 5).double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.zero_()
    return pair


def losses_one_position_at_a_time(pair, model=MODEL):
    """Mean cross-entropy and KL of every splice, with loops in place of masks."""
    input_sae, output_sae = (lambda x: reconstruct(pair.input_sae, x)), (lambda y: reconstruct(pair.output_sae, y))
    zero, keep = torch.zeros_like, (lambda x: x)
    functions = {
        "clean": (keep, keep), "input": (input_sae, keep), "output": (keep, output_sae),
        "both": (input_sae, output_sae), "zero_input": (zero, keep), "zero_output": (keep, zero),
    }  # fmt: skip
    losses = {key: [] for name in functions for key in (f"ce_{name}", f"kl_{name}")}
    for tokens, included in zip(TOKENS, INCLUDED, strict=True):
        mlp_in, residual = model.mlp_in(tokens[None])[0], model.residual(tokens[None])[0]
        for t in range(len(tokens) - 1):
            if not included[t]:
                continue
            clean = ((residual[t] + model.mlp(mlp_in[t][None])[0]) @ model.unembed).softmax(0)
            for name, (on_input, on_output) in functions.items():
                mlp_out = on_output(model.mlp(on_input(mlp_in[t][None])))[0]
                p = ((residual[t] + mlp_out) @ model.unembed).softmax(0)
                losses[f"ce_{name}"].append(-math.log(p[tokens[t + 1]]))
                losses[f"kl_{name}"].append((clean * (clean / p).log()).sum().item())
    del losses["kl_clean"]
    return {key: sum(values) / len(values) for key, values in losses.items()}


def test_losses_against_one_position_at_a_time(result):
    expected = losses_one_position_at_a_time(PAIR)
    assert {key: result.metrics[f"val/{key}"] for key in expected} == pytest.approx(expected)
    for site, zero in (("input", "zero_input"), ("output", "zero_output"), ("both", "zero_output")):
        span = expected[f"ce_{zero}"] - expected["ce_clean"]
        score = (expected[f"ce_{zero}"] - expected[f"ce_{site}"]) / span
        assert result.metrics[f"val/ce_score_{site}"] == pytest.approx(score)
        kl_score = 1 - expected[f"kl_{site}"] / expected[f"kl_{zero}"]
        assert result.metrics[f"val/kl_score_{site}"] == pytest.approx(kl_score)
    assert len(set(expected.values())) == 11  # no splice is another one in disguise


def test_reconstruction_and_firing_on_the_true_activations(result):
    x = MODEL.mlp_in(TOKENS)[INCLUDED]
    for name, sae, target in (("input", PAIR.input_sae, x), ("output", PAIR.output_sae, MODEL.mlp(x))):
        x_hat, latents = sae(target)
        error = (target - x_hat).square()
        fvu = error.sum() / (target - target.mean(dim=0)).square().sum()
        fired = torch.zeros(len(target), sae.d_sae, dtype=torch.float64)
        fired.scatter_(1, latents.indices, latents.active.double())
        expected = {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "mse": error.mean(),
            "cosine": torch.cosine_similarity(target, x_hat).mean(),
            "norm_ratio": (x_hat.norm(dim=1) / target.norm(dim=1)).mean(),
            "l0": fired.sum(dim=1).mean(),
            "dead_share": (fired.sum(dim=0) == 0).double().mean(),
        }
        for key, value in expected.items():
            assert result.metrics[f"val/{key}_{name}"] == pytest.approx(value.item()), key
        torch.testing.assert_close(getattr(result, f"firing_rate_{name}"), fired.mean(dim=0))


@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_jacobian_measures_of_the_first_tokens_at_both_settings(at):
    result = evaluate(at=at, jacobian_tokens=11)
    x = MODEL.mlp_in(TOKENS)[INCLUDED][:11]
    both = {setting: jacobian(PAIR, MODEL.mlp, x, at=setting) for setting in ("input", "reconstruction")}
    other = "reconstruction" if at == "input" else "input"
    for prefix, found in (("jacobian/", both[at]), (f"jacobian_at_{other}/", both[other])):
        measures = jacobian_metrics.jacobian_measures(found.values, found.active_out, found.active_in)
        for name, value in measures.items():
            assert result.metrics[prefix + name] == pytest.approx(value.mean().item()), prefix + name
    assert result.metrics["jacobian/hoyer"] != result.metrics[f"jacobian_at_{other}/hoyer"]
    values, edges = both[at].values, jacobian_metrics.histogram_edges()
    assert result.metrics["val/penalty"] == pytest.approx(values.abs().mean().item())
    assert torch.equal(result.abs_histogram, jacobian_metrics.abs_histogram(values, edges))
    normalized = jacobian_metrics.rms_normalized(values)
    assert torch.equal(result.rms_histogram, jacobian_metrics.abs_histogram(normalized, edges))
    assert result.abs_histogram.sum() == 11 * 5 * 4


def test_reported_keys(result):
    names = {key.split("/")[0] for key in result.metrics}
    assert names == {"val", "jacobian", "jacobian_at_reconstruction"}
    sites = ("input", "output")
    expected = {f"val/{key}_{site}" for site in sites for key in (
        "explained_variance", "fvu", "mse", "cosine", "norm_ratio", "l0", "dead_share",
    )}  # fmt: skip
    variants = ("input", "output", "both", "zero_input", "zero_output")
    expected |= {f"val/{loss}_{variant}" for loss in ("ce", "kl") for variant in variants}
    expected |= {f"val/{loss}_score_{site}" for loss in ("ce", "kl") for site in (*sites, "both")}
    expected |= {"val/ce_clean", "val/penalty"}
    assert {key for key in result.metrics if key.startswith("val/")} == expected
    measures = {key.removeprefix("jacobian/") for key in result.metrics if key.startswith("jacobian/")}
    assert measures == {
        "mean_abs", "active_entries", "zero_token_share", "zero_row_share",
        "share_above_0.005", "share_above_0.01", "share_above_0.015", "share_above_0.02",
        "rms_share_above_0.5", "rms_share_above_1", "rms_share_above_2", "rms_share_above_4",
        "max_share_above_0.01", "max_share_above_0.05", "max_share_above_0.1", "max_share_above_0.5",
        "effective_edges", "effective_edges_per_output", "hoyer", "gini", "kurtosis",
        "top_share_1", "top_share_2", "top_share_4", "top_share_8", "top_share_16", "top_share_20",
        "edges_for_50", "edges_for_90", "edges_for_99",
    }  # fmt: skip
    assert measures == {key.split("/")[1] for key in result.metrics if key.startswith("jacobian_at_")}
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.metrics.values())


def test_perfect_and_empty_saes():
    perfect = evaluate(perfect_pair()).metrics
    for site in ("input", "output"):
        assert perfect[f"val/explained_variance_{site}"] == pytest.approx(1)
        assert perfect[f"val/norm_ratio_{site}"] == pytest.approx(1)
        assert perfect[f"val/l0_{site}"] == 10
    for site in ("input", "output", "both"):
        assert perfect[f"val/ce_score_{site}"] == pytest.approx(1)
        assert perfect[f"val/kl_score_{site}"] == pytest.approx(1)
    assert perfect["jacobian/hoyer"] == pytest.approx(perfect["jacobian_at_reconstruction/hoyer"])
    empty = evaluate(empty_pair()).metrics
    for site in ("input", "output", "both"):  # `both` ends in an output of zeros too
        assert empty[f"val/ce_score_{site}"] == pytest.approx(0, abs=1e-12)
        assert empty[f"val/kl_score_{site}"] == pytest.approx(0, abs=1e-12)
    assert (empty["val/l0_input"], empty["val/dead_share_output"]) == (0, 1)
    assert (empty["jacobian/zero_token_share"], empty["jacobian/mean_abs"]) == (1, 0)
    assert math.isnan(empty["jacobian/effective_edges"])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_shards_add_up_to_the_whole(world_size, result):
    settings = SETTINGS | {"jacobian_tokens": 11}
    shards = [
        evaluation_sums(PAIR, MODEL.mlp, MODEL, TOKENS, INCLUDED, shard=(rank, world_size), **settings)
        for rank in range(world_size)  # with 7 ranks, two have no sequence
    ]
    assert all({k: v.shape for k, v in shard.items()} == {k: v.shape for k, v in shards[0].items()} for shard in shards)
    total = shards[0]
    for shard in shards[1:]:
        total = add_sums(total, shard)
    found, whole = summarize(total, "input"), evaluate(jacobian_tokens=11)
    assert found.metrics == pytest.approx(whole.metrics, rel=1e-9)
    assert torch.equal(found.abs_histogram, whole.abs_histogram)
    torch.testing.assert_close(found.firing_rate_input, whole.firing_rate_input)
    assert result.metrics["jacobian/mean_abs"] != whole.metrics["jacobian/mean_abs"]  # 11 tokens are not all


@pytest.mark.parametrize("penalty", ["l1", "l1_over_l2_batch"])
def test_batches_do_not_matter(penalty):
    settings = {"penalty": edge_penalty(make_penalty(penalty), "jacobian")}
    one, all_at_once = evaluate(batch_sequences=1, **settings), evaluate(batch_sequences=100, **settings)
    assert one.metrics == pytest.approx(all_at_once.metrics, rel=1e-9)


def test_chunks_do_not_matter(result, monkeypatch):
    """With room for one token or position at a time, everything comes out the same."""
    sizes = []
    monkeypatch.setattr(splicing, "MAX_ELEMENTS", 1)
    monkeypatch.setattr(evaluation, "jacobian", lambda p, m, x, at: sizes.append(len(x)) or jacobian(p, m, x, at=at))
    assert evaluate().metrics == pytest.approx(result.metrics, rel=1e-9)
    assert set(sizes) == {1}


def test_excluded_positions_are_untouched_and_do_not_count():
    activations = MODEL.mlp_in(TOKENS)
    spliced = splices(PAIR, INCLUDED)["input"]["replace_mlp_in"](activations)
    assert torch.equal(spliced[~INCLUDED], activations[~INCLUDED])
    torch.testing.assert_close(spliced[INCLUDED], reconstruct(PAIR.input_sae, activations[INCLUDED]))
    assert torch.equal(activations, MODEL.mlp_in(TOKENS))  # not in place
    zeroed = splices(PAIR, INCLUDED)["zero_output"]["replace_mlp_out"](activations)
    assert zeroed[INCLUDED].abs().max() == 0
    assert torch.equal(zeroed[~INCLUDED], activations[~INCLUDED])
    sums = splice_sums(PAIR, MODEL, TOKENS, INCLUDED)
    assert sums["positions"] == INCLUDED[:, :-1].sum()


def test_a_wholly_excluded_sequence_adds_nothing():
    included = INCLUDED.clone()
    included[2] = False
    others = [0, 1, 3, 4]
    expected = evaluate(tokens=TOKENS[others], included=INCLUDED[others]).metrics
    assert evaluate(included=included, batch_sequences=1).metrics == pytest.approx(expected, rel=1e-9)


def test_splices_keep_the_activations_dtype():
    activations = MODEL.mlp_in(TOKENS).float()
    spliced = splices(PAIR, INCLUDED)["both"]["replace_mlp_out"](activations)
    assert spliced.dtype == torch.float32


def test_a_spliced_output_is_that_of_the_replaced_input():
    """`both` composes: the output SAE reads f(x_hat), not f(x)."""
    seen = []

    class Spy(FakeLanguageModel):
        def logits(self, tokens, *, replace_mlp_in=None, replace_mlp_out=None):
            def spy(mlp_out):
                seen.append((replace_mlp_in is not None, mlp_out))
                return replace_mlp_out(mlp_out) if replace_mlp_out else mlp_out

            return super().logits(tokens, replace_mlp_in=replace_mlp_in, replace_mlp_out=spy)

    everywhere = torch.ones_like(INCLUDED)
    splice_sums(PAIR, Spy(), TOKENS, everywhere)
    x = MODEL.mlp_in(TOKENS).flatten(0, 1)
    composed, true = MODEL.mlp(reconstruct(PAIR.input_sae, x)), MODEL.mlp(x)
    torch.testing.assert_close(seen[3][1].flatten(0, 1), composed)  # clean, input, output, both
    torch.testing.assert_close(seen[2][1].flatten(0, 1), true)


def test_nothing_that_training_depends_on_changes():
    pair = make_pair().float()
    model = FakeLanguageModel()
    model.mlp = model.mlp.float()
    pair.train()
    pair.output_sae.eval()
    model.mlp.train()
    plain = evaluate(pair, model).metrics
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = evaluate(pair, model).metrics
        assert torch.is_autocast_enabled("cpu")
    assert under_autocast == plain  # float32 whatever the trainer's precision
    assert torch.equal(random_state, torch.get_rng_state())
    assert (pair.training, pair.input_sae.training, pair.output_sae.training, model.mlp.training) == (
        True, True, False, True,
    )  # fmt: skip
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert torch.is_grad_enabled()


def test_flags_come_back_after_an_error():
    class Broken(FakeLanguageModel):
        def logits(self, tokens, **replace):
            raise RuntimeError("out of memory")

    pair = make_pair().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(pair, Broken())
    assert pair.training
    assert pair.input_sae.training


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="jacobian.at"):
        evaluate(at="output")
    with pytest.raises(UserError, match="none of the 45"):
        evaluate(included=torch.zeros_like(INCLUDED))


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_on_a_real_architecture(family, tmp_path):
    """A perfect pair spliced into a transformer changes nothing; a random one costs something, zero-ablation too."""
    from jsae_lightning.language_model import LanguageModel

    model = LanguageModel.load(str(make_model_dir(family, tmp_path / family, d_model=16, d_mlp=24)), layer=1)
    tokens = torch.randint(model.architecture.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    included = torch.ones_like(tokens, dtype=torch.bool)
    included[:, 0] = False

    def figures(pair):
        return evaluate_pair(pair, model.frozen_mlp, model, tokens, included, **SETTINGS).metrics

    perfect = figures(perfect_pair(16).float())
    for site in ("input", "output", "both"):
        assert perfect[f"val/ce_{site}"] == pytest.approx(perfect["val/ce_clean"], abs=1e-4)
        assert perfect[f"val/kl_{site}"] == pytest.approx(0, abs=1e-5)
    logits = model.logits(tokens)[:, :-1][included[:, :-1]]
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][included[:, :-1]])
    assert perfect["val/ce_clean"] == pytest.approx(loss.item(), rel=1e-5)
    assert perfect["val/kl_zero_input"] > 0.01
    assert perfect["val/kl_zero_output"] > 0.01
    random = figures(make_pair(16).float())
    assert all(random[f"val/kl_{site}"] > 1e-3 for site in ("input", "output", "both"))
