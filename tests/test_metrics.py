"""Reconstruction, firing and language-model figures: hand-computed values, and sums of parts equal to the whole."""

import inspect
import math

import pytest
import torch

from jsae_lightning import metrics
from jsae_lightning.metrics import add_sums


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reconstruction(x, x_hat):
    return metrics.reconstruction_metrics(metrics.reconstruction_sums(x, x_hat))


def test_reconstruction_by_hand():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    x_hat = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    figures = reconstruction(x, x_hat)
    # Errors: 16 and 1 + 4. Mean (2, 2): deviations (1, 2) and (-1, -2), so 10.
    assert figures["fvu"] == pytest.approx(2.1)
    assert figures["explained_variance"] == pytest.approx(-1.1)
    assert figures["mse"] == pytest.approx(21 / 4)
    assert figures["cosine"] == pytest.approx((9 / 15 + 0) / 2)
    assert figures["norm_ratio"] == pytest.approx((3 / 5 + 2) / 2)


def test_extremes_of_reconstruction():
    x = normal(50, 8)
    perfect, mean = reconstruction(x, x), reconstruction(x, x.mean(dim=0).expand_as(x))
    assert perfect == pytest.approx({"explained_variance": 1, "fvu": 0, "mse": 0, "cosine": 1, "norm_ratio": 1})
    assert mean["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert reconstruction(x, 0 * x)["cosine"] == 0
    half = reconstruction(x, x / 2)
    assert (half["cosine"], half["norm_ratio"]) == pytest.approx((1, 0.5))


def test_sums_of_parts_equal_the_whole_and_mean_of_ratios_would_not():
    x = normal(90, 6) * torch.linspace(0.1, 5, 90)[:, None] + torch.linspace(-3, 3, 90)[:, None]
    x_hat = x + normal(90, 6, seed=1)
    parts = [metrics.reconstruction_sums(x[a:b], x_hat[a:b]) for a, b in ((0, 7), (7, 30), (30, 90))]
    total = add_sums(add_sums(parts[0], parts[1]), parts[2])
    whole = reconstruction(x, x_hat)
    assert metrics.reconstruction_metrics(total) == pytest.approx(whole, rel=1e-12)
    mean_of_ratios = sum(metrics.reconstruction_metrics(part)["fvu"] for part in parts) / 3
    assert abs(mean_of_ratios - whole["fvu"]) > 0.05


def test_explained_variance_survives_a_mean_far_from_zero():
    x = normal(200, 4, dtype=torch.float64)
    x_hat = x + 0.1 * normal(200, 4, seed=1, dtype=torch.float64)
    shifted = reconstruction(x + 1e4, x_hat + 1e4)
    assert shifted["explained_variance"] == pytest.approx(reconstruction(x, x_hat)["explained_variance"], abs=1e-6)


def test_zero_activations_are_left_out_of_cosine_and_norm_ratio():
    x, x_hat = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    figures = reconstruction(x, x_hat)
    assert (figures["cosine"], figures["norm_ratio"]) == (1, 0.5)
    assert figures["mse"] == pytest.approx(26 / 4)


def test_figures_without_data_are_nan():
    assert all(math.isnan(value) for value in reconstruction(torch.zeros(0, 3), torch.zeros(0, 3)).values())
    one_token = reconstruction(torch.tensor([[0.1, 0.7, 0.3]]), torch.zeros(1, 3))
    assert math.isnan(one_token["explained_variance"])
    assert one_token["mse"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float64(dtype):
    x = normal(5, 3).to(dtype)
    assert {value.dtype for value in metrics.reconstruction_sums(x, x).values()} == {torch.float64}


def test_firing_by_hand():
    # Entry (0, 1) was chosen but its value is 0: it did not fire.
    values = torch.tensor([[0.5, 0.0], [0.2, 0.1], [3.0, 1.0]])
    indices = torch.tensor([[0, 4], [1, 0], [0, 3]])
    sums = metrics.latent_sums(values, indices, d_sae=6)
    assert metrics.firing_rates(sums).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 3, 0, 0])
    assert metrics.latent_metrics(sums) == pytest.approx({"l0": 5 / 3, "dead_share": 3 / 6})
    halves = add_sums(metrics.latent_sums(values[:1], indices[:1], 6), metrics.latent_sums(values[1:], indices[1:], 6))
    assert metrics.latent_metrics(halves) == metrics.latent_metrics(sums)


def test_cross_entropy_and_kl_by_hand():
    logits, clean = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    assert metrics.cross_entropies(logits, torch.tensor([0])).item() == pytest.approx(math.log(4))
    # KL(clean || spliced): 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4).
    assert metrics.kl_divergences(logits, clean).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert metrics.kl_divergences(clean, logits).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    rows = metrics.kl_divergences(torch.cat([logits, clean]), torch.cat([clean, clean])).tolist()
    assert rows == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0])


def test_losses_are_computed_in_float32():
    logits, targets = normal(40, 100).bfloat16(), torch.zeros(40, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = metrics.cross_entropies(logits, targets), metrics.kl_divergences(logits, -logits)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    torch.testing.assert_close(losses[0].double(), metrics.cross_entropies(logits.double(), targets))


def splice_sums(positions=10.0, **means):
    return {"positions": torch.tensor(positions)} | {key: torch.tensor(m * positions) for key, m in means.items()}


MEANS = {
    "ce_clean": 2.0, "ce_input": 2.5, "ce_output": 2.25, "ce_both": 3.0, "ce_zero_input": 4.0, "ce_zero_output": 6.0,
    "kl_input": 0.5, "kl_output": 0.25, "kl_both": 1.0, "kl_zero_input": 2.0, "kl_zero_output": 4.0,
}  # fmt: skip


def test_scores_by_hand():
    figures = metrics.splice_metrics(splice_sums(**MEANS))
    scores = {key: value for key, value in figures.items() if "score" in key}
    assert scores == pytest.approx(
        {
            "ce_score_input": 0.75,
            "ce_score_output": 3.75 / 4,
            "ce_score_both": 0.75,
            "kl_score_input": 0.75,
            "kl_score_output": 0.9375,
            "kl_score_both": 0.75,
        }  # fmt: skip
    )
    assert {key: figures[key] for key in MEANS} == pytest.approx(MEANS)


def test_scores_are_ratios_of_means_not_means_of_ratios():
    other = {key: value + (3.0 if key.startswith("ce_zero") else 0.0) for key, value in MEANS.items()}
    total = metrics.splice_metrics(add_sums(splice_sums(10.0, **MEANS), splice_sums(30.0, **other)))
    # Means over 40 positions: zero-ablation 4 + 2.25, input 2.5, clean 2.
    assert total["ce_score_input"] == pytest.approx((6.25 - 2.5) / (6.25 - 2))
    mean_of_ratios = (0.75 * 10 + (7 - 2.5) / (7 - 2) * 30) / 40
    assert abs(total["ce_score_input"] - mean_of_ratios) > 0.01


def test_a_free_ablation_has_no_score():
    figures = metrics.splice_metrics(splice_sums(**MEANS | {"ce_zero_input": 2.0, "kl_zero_input": 0.0}))
    assert math.isnan(figures["ce_score_input"])
    assert math.isnan(figures["kl_score_input"])
    assert figures["ce_score_output"] == pytest.approx(3.75 / 4)


def test_prefixes_come_off_again():
    sums = metrics.with_prefix("a/", {"b": torch.ones(())}) | {"other/a/b": torch.zeros(())}
    assert metrics.without_prefix("a/", sums) == {"b": torch.ones(())}


class OnCuda:
    """What `cumulative_sum` asks of a tensor on a GPU."""

    is_cuda, device = True, "cpu"

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def cpu(self) -> torch.Tensor:
        return self.values

    def cumsum(self, dim: int) -> torch.Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return self.values.cumsum(dim)


@pytest.mark.parametrize("deterministic", [False, True])
def test_cumulative_sums_in_deterministic_mode(deterministic):
    values = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    function = inspect.unwrap(metrics.cumulative_sum)  # without the checks of types, which know a tensor
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        for given in (values, OnCuda(values)):
            assert torch.equal(function(given, 1), values.cumsum(1))
    finally:
        torch.use_deterministic_algorithms(was)
