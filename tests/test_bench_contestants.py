"""What is measured computes the same: the published formulation, dense SAEs and our own losses, on toy sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from factories import make_mlp, make_pair, make_x
from jsae_lightning import kernels
from jsae_lightning.benchmarking import names
from jsae_lightning.benchmarking.contestants import losses, make_steps, run_floor
from jsae_lightning.benchmarking.language_models import batches, load_model, mismatch
from jsae_lightning.benchmarking.problem import Problem, make_problem
from jsae_lightning.benchmarking.shapes import PRESETS, ModelSpec, Shape
from jsae_lightning.kernels import cpu_products

CPU = torch.device("cpu")
TOY = Shape(tokens=24, d_model=16, d_mlp=40, d_sae=96, k=4, gated=False, activation="gelu")


@pytest.fixture(params=["cpu", "reference"])
def selected(request, monkeypatch):
    monkeypatch.setattr(kernels, "_forced", [kernels.IMPLEMENTATIONS[request.param]])


def toy_problem(kind: str = "gelu", k: int = 5) -> Problem:
    pair, mlp, x = make_pair(k=k), make_mlp(kind), make_x()
    y = mlp(x)
    assert (
        pair.input_sae.encode(x).active.all() and pair.output_sae.encode(y).active.all()
    )  # the published one has no mask
    return Problem(pair, mlp, x, coef=0.7, is_mixed=False)


def loss_and_gradients(problem: Problem, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the contestant's steps, of the loss and of the gradients."""
    problem.clear_gradients()
    found = [step() for step in make_steps(name, problem)]
    gradients = {
        key: p.grad / len(found) for key, p in problem.pair.named_parameters() if p.grad is not None and p.grad.any()
    }
    return torch.stack(found).mean(), gradients


def assert_same(problem: Problem, first: str, second: str) -> None:
    torch.testing.assert_close(
        loss_and_gradients(problem, first), loss_and_gradients(problem, second), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("kind", ["gelu", "relu2", "gated_gelu_tanh"])
def test_the_published_formulation_has_our_loss_and_gradients(selected, kind):
    problem = toy_problem(kind)
    assert_same(problem, names.PUBLISHED, names.OURS)
    assert set(loss_and_gradients(problem, names.OURS)[1]) == {key for key, _ in problem.pair.named_parameters()}


def test_the_dense_pair_is_ours_without_the_penalty(selected):
    assert_same(toy_problem(), names.PAIR_DENSE, names.OURS_WITHOUT)


def test_the_penalty_is_in_the_loss(selected):
    problem = toy_problem()
    assert loss_and_gradients(problem, names.OURS)[0] > loss_and_gradients(problem, names.OURS_WITHOUT)[0] + 1e-3


def test_a_single_dense_sae_is_the_input_half_of_ours(selected):
    problem = toy_problem()
    problem.mlp.W_out.zero_()  # y is then the output bias alone: a constant of the other SAE
    loss, gradients = loss_and_gradients(problem, names.SINGLE_DENSE)
    pair_loss, pair_gradients = loss_and_gradients(problem, names.OURS_WITHOUT)
    y = problem.mlp(problem.x)
    torch.testing.assert_close(loss + (y - problem.pair.output_sae(y)[0]).square().mean(), pair_loss)
    assert sorted(gradients) == [key for key in sorted(pair_gradients) if key.startswith("input_sae")]
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, pair_gradients[key], rtol=1e-10, atol=1e-13)


def test_every_fourth_step_with_four_times_the_weight_is_the_same_in_the_mean(selected):
    problem = toy_problem()
    assert len(make_steps(names.OURS_QUARTER, problem)) == 4
    assert_same(problem, names.OURS_QUARTER, names.OURS)
    problem.clear_gradients()
    each = [float(step()) for step in make_steps(names.OURS_QUARTER, problem)]
    assert each[0] > each[1] == each[2] == each[3]


@pytest.mark.parametrize("gated", [False, True])
def test_the_floor_is_made_of_the_products_that_it_names(gated):
    shape = Shape(24, 16, 40, 96, 4, gated, "gelu")
    with FlopCounterMode(display=False) as counter:
        run_floor(make_problem(shape, dtype="float32", device=CPU, seed=0))
    mlp = 2 * 24 * 16 * 40 * (3 if gated else 2)
    assert counter.get_total_flops() == 2 * (2 * 24 * 16 * 96) + mlp + 2 * 96 * 16 * 40 * (3 if gated else 2)


def test_the_floors_products_are_made_as_ours_are(monkeypatch):
    """Else ours could be faster than its floor."""
    made = []
    monkeypatch.setattr(cpu_products, "product", lambda a, b: made.append((len(a), b.shape[1])))
    run_floor(make_problem(Shape(24, 16, 40, 96, 4, False, "gelu"), dtype="float32", device=CPU, seed=0))
    assert made == [(24, 96), (24, 96), (96, 40), (96, 40)]


@pytest.mark.parametrize("gated", [False, True])
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_gradients(gated):
    shape = Shape(24, 16, 40, 96, 4, gated, "gelu")
    full, mixed = (make_problem(shape, dtype=dtype, device=CPU, seed=0) for dtype in ("float32", "bf16-mixed"))
    for name in losses(full):
        loss, mixed_loss = loss_and_gradients(full, name)[0], loss_and_gradients(mixed, name)[0]
        assert loss != mixed_loss
        torch.testing.assert_close(mixed_loss, loss, rtol=0.05, atol=0)
    assert {p.grad.dtype for p in mixed.pair.parameters()} == {torch.float32}


def test_a_problem_depends_on_its_seed_alone():
    first, again, other = (make_problem(TOY, dtype="float32", device=CPU, seed=seed) for seed in (3, 3, 4))
    assert first.mlp.weights_hash() == again.mlp.weights_hash() != other.mlp.weights_hash()
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    assert torch.equal(first.pair.input_sae.W_dec, again.pair.input_sae.W_dec)
    assert first.coef == 0.5 * 4**2 / 16


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
SMALL_GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}


@pytest.mark.parametrize("preset", ["70m", "410m", "gemma-2-2b"])
def test_a_presets_model_has_the_mlp_of_its_shape(preset):
    """With fewer weights; layers beyond the one that is wanted are not made."""
    chosen = PRESETS[preset]
    config = chosen.model.config | (SMALL_GROUPED if chosen.shape.gated else SMALL)
    model = load_model(ModelSpec(1, 2048, config=config), dtype="float32", device=CPU)
    assert model.frozen_mlp.is_gated == chosen.shape.gated
    assert model.frozen_mlp.activation == chosen.shape.activation
    assert (model.architecture.num_layers, model.architecture.d_model) == (2, 32)
    assert (chosen.model.config["hidden_size"], chosen.model.config["intermediate_size"]) == (
        chosen.shape.d_model,
        chosen.shape.d_mlp,
    )
    assert model.mlp_in(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 32)


def test_the_tiny_presets_model_is_the_embedded_one():
    chosen = PRESETS["tiny"]
    mlp = load_model(chosen.model, dtype="float32", device=CPU).frozen_mlp
    assert (mlp.d_model, mlp.d_mlp) == (chosen.shape.d_model, chosen.shape.d_mlp)
    assert (mlp.is_gated, mlp.activation) == (chosen.shape.gated, chosen.shape.activation)


def test_tokens_are_cut_into_whole_sequences_and_a_rest():
    parts = batches(torch.arange(1000 * 20 + 7), 1000)
    assert [tuple(part.shape) for part in parts] == [(16, 1000), (4, 1000), (1, 7)]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), torch.arange(20007))
    assert [tuple(part.shape) for part in batches(torch.arange(5), 8)] == [(1, 5)]


def test_another_shapes_model_is_not_the_presets():
    preset = PRESETS["70m"]
    assert mismatch(preset, preset.shape.scaled("tokens", 2)) is None
    assert mismatch(preset, preset.shape.scaled("d_mlp", 2)) == "--d-mlp is not that of the preset's model"
