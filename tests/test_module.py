"""The training step and the recipe's rules: what is done, when, and how often."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from factories import make_mlp
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobians import jacobian
from jsae_lightning.module import JSAEModule
from jsae_lightning.schedules import coef_factor, lr_factor

D_MODEL, TOKENS = 8, 32


class _Data(lightning.LightningDataModule):
    """Random activations and a float32 MLP; the real data module adds a language model."""

    def __init__(self, batches: int, scale: float = 1.0) -> None:
        super().__init__()
        self.frozen_mlp = make_mlp("gelu", D_MODEL, 16).float()
        generator = torch.Generator().manual_seed(0)
        self.batches = [scale * torch.randn(TOKENS, D_MODEL, generator=generator) for _ in range(batches)]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


def _module(total_steps: int, sae: dict | None = None, jacobian: dict | None = None, optim: dict | None = None):
    return JSAEModule(
        d_model=D_MODEL,
        sae={
            "d_sae": 32,
            "d_sae_output": 24,
            "k": 4,
            "k_output": 3,
            "subtract_b_dec": False,
            "mse_output_coef": 1.0,
            "auxk_coef": 0.0,
            "auxk_k": None,
            "dead_after_tokens": 64,
        }
        | (sae or {}),
        jacobian={
            "penalty": "l1",
            "params": {},
            "coef": 0.5,
            "at": "input",
            "edges": "jacobian",
            "token_fraction": 1.0,
            "warmup_fraction": 0.5,
            "decay_fraction": 0.0,
        }
        | (jacobian or {}),
        optim={"lr": 1e-2, "betas": [0.9, 0.999], "warmup_fraction": 0.2, "decay_fraction": 0.2} | (optim or {}),
        total_steps=total_steps,
        seed=0,
    )


def _fit(module, data, steps, *callbacks, accumulate=1, clip=1.0, precision="32-true", tmp_path=None):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        precision=precision,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    return trainer


class _AtStep(lightning.Callback):
    """Records what Adam sees and what each step leaves behind."""

    def __init__(self) -> None:
        self.lrs, self.coefs, self.radial, self.norms, self.row_norms = [], [], [], [], []

    def on_fit_start(self, trainer, module):
        optimizer = trainer.optimizers[0]
        step = optimizer.step

        def recording_step(closure=None):
            closure()
            self.lrs.append(optimizer.param_groups[0]["lr"])
            self.coefs.append(module.current_coef())
            gradients = [p.grad for p in module.pair.parameters() if p.grad is not None]
            self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            for _, sae in module.pair.named_saes():
                self.radial.append((sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max().item())
            return step(None)

        optimizer.step = recording_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for _, sae in module.pair.named_saes():
            self.row_norms.append(sae.W_dec.norm(dim=1).sub(1).abs().max().item())


def test_loss_is_the_published_formula():
    data, module, seen = _Data(1), _module(1, jacobian={"warmup_fraction": 0.0}, sae={"mse_output_coef": 2.0}), []

    class Record(lightning.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(loss.item())

    x = data.batches[0]
    y = data.frozen_mlp(x)
    x_hat, y_hat = module.pair.input_sae(x)[0], module.pair.output_sae(y)[0]
    penalty = jacobian(module.pair, data.frozen_mlp, x).values.abs().sum() / (TOKENS * 4 * 3)
    expected = (x - x_hat).square().mean() + 2.0 * (y - y_hat).square().mean() + 0.5 * penalty
    _fit(module, data, 1, Record())
    assert seen == [pytest.approx(expected.item(), rel=1e-5)]


def test_output_sae_reads_the_true_output_and_the_mlp_is_frozen():
    """Without the penalty, the output SAE's loss sends no gradient into the input SAE."""
    data, module = _Data(1), _module(1)
    y = data.frozen_mlp(data.batches[0])
    with torch.no_grad():  # whatever the input SAE does, y stays
        module.pair.input_sae.W_enc.mul_(0)
    seen = {}

    class Record(lightning.Callback):
        def on_before_zero_grad(self, *_):
            seen["called"] = True

    _fit(module, data, 1, Record())
    assert seen and float(module.trainer.callback_metrics["train/mse_output"]) == pytest.approx(
        (y - _module(1).pair.output_sae(y)[0]).square().mean().item(), rel=1e-5
    )
    assert not any(tensor.requires_grad for tensor in data.frozen_mlp.buffers())
    assert not list(data.frozen_mlp.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_count_optimizer_steps(accumulate):
    record = _AtStep()
    _fit(_module(10), _Data(10 * accumulate), 10, record, accumulate=accumulate)
    assert record.lrs == pytest.approx([1e-2 * lr_factor(step, 10, 0.2, 0.2) for step in range(10)])
    assert record.coefs == pytest.approx([0.5 * coef_factor(step, 10, 0.5) for step in range(10)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_decoder_rows_have_norm_one_after_every_step(accumulate):
    record = _AtStep()
    _fit(_module(6), _Data(6 * accumulate), 6, record, accumulate=accumulate)
    assert max(record.row_norms) < 1e-6


def test_adam_sees_projected_gradients():
    record = _AtStep()
    _fit(_module(6), _Data(6), 6, record, clip=None)
    assert max(record.norms) > 1e-2
    assert max(record.radial) < 1e-6


def test_clipping_comes_after_the_projection():
    """The norm that Adam sees is the limit itself; clipping before would leave less."""
    record = _AtStep()
    _fit(_module(6), _Data(6), 6, record, clip=1e-3)
    assert record.norms == pytest.approx([1e-3] * 6, rel=1e-3)


def test_dead_latent_counters():
    """A latent's counter is the tokens since it last fired; the share counts those past the limit."""
    module = _module(3)
    with torch.no_grad():
        module.pair.input_sae.b_enc[5] = -1e6  # never fires
        module.pair.input_sae.b_enc[6] = 1e6  # always does
    _fit(module, _Data(3), 3)
    assert module.tokens_since_fired_input[5] == 3 * TOKENS
    assert module.tokens_since_fired_input[6] == 0
    assert module.tokens_seen == 3 * TOKENS
    assert module.dead_share("input") == (module.tokens_since_fired_input >= 64).float().mean()
    assert module.dead_share("input") >= 1 / 32


def test_auxk_revives_dead_latents():
    def silence_after_training(coef: float) -> float:
        module = _module(200, sae={"auxk_coef": coef, "auxk_k": 8, "dead_after_tokens": 320})
        with torch.no_grad():
            module.pair.input_sae.b_enc[:16] = -2.0
        _fit(module, _Data(200), 200)
        return float(module.tokens_since_fired_input.float().mean())

    assert silence_after_training(1.0) < 0.5 * silence_after_training(0.0)


@pytest.mark.parametrize("at", ["input", "reconstruction"])
@pytest.mark.parametrize("penalty", ["l1", "hoyer"])
def test_penalty_lowers_what_it_penalizes(at, penalty):
    def final_penalty(coef: float) -> float:
        module = _module(60, jacobian={"coef": coef, "at": at, "penalty": penalty, "warmup_fraction": 0.1})
        data = _Data(60)
        _fit(module, data, 60)
        return module.penalty(jacobian(module.pair, data.frozen_mlp, data.batches[0], at)).item()

    assert final_penalty(5.0) < final_penalty(1e-9)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "64-true"])
def test_precisions(precision):
    """Weights and Adam's moments stay in float32 under autocast; every loss is finite."""
    data = _Data(4)
    if precision == "64-true":
        data.frozen_mlp = data.frozen_mlp.double()
        data.batches = [batch.double() for batch in data.batches]
    module = _module(4, sae={"auxk_coef": 0.1})
    trainer = _fit(module, data, 4, precision=precision)
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in module.pair.parameters()} == {expected}
    moments = [state["exp_avg"].dtype for state in trainer.optimizers[0].state.values()]
    assert set(moments) == {expected}
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_bf16_autocast_stays_close_to_float32():
    losses = [
        _fit(_module(5), _Data(5), 5, precision=precision).callback_metrics["train/loss"].item()
        for precision in ("32-true", "bf16-mixed")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_the_mlp_is_computed_without_autocast(at, monkeypatch):
    seen, project = [], FrozenMLP._project

    def recorded(self, x, weight, bias):
        seen.append(torch.is_autocast_enabled("cpu"))
        return project(self, x, weight, bias)

    monkeypatch.setattr(FrozenMLP, "_project", recorded)
    _fit(_module(2, jacobian={"at": at}), _Data(2), 2, precision="bf16-mixed")
    assert seen and not any(seen)


class _Logged(lightning.Callback):
    """Every step's logged metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def _penalty_gradients(token_fraction, steps=4):
    """What the penalty adds to W_dec's gradient at each step; the weights stay where they are."""
    added = []
    for coef in (1.0, 0.0):
        module = _module(steps, jacobian={"coef": coef, "warmup_fraction": 0.0, "token_fraction": token_fraction})
        gradients = []

        class Record(lightning.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer, gradients=gradients):
                gradients.append(module.pair.input_sae.W_dec.grad.clone())
                module.zero_grad()

        _fit(module, _Data(steps), steps, Record(), clip=None)
        added.append(torch.stack(gradients))
    return added[0] - added[1]


def test_token_fraction_penalizes_some_steps_with_more_weight():
    """A quarter: the first of four steps has four times the gradient of that step, the others have none."""
    whole, quarter = _penalty_gradients(1.0), _penalty_gradients(0.25)
    assert whole[1].abs().max() > 0
    torch.testing.assert_close(quarter[0], 4 * whole[0], rtol=1e-4, atol=1e-7)
    assert not quarter[1:].any()


def test_every_logged_step_has_the_penalty_and_the_whole_loss():
    """Also where the step is not penalized; before the first penalized gradient acts, the values are those of all."""
    logged = []
    for token_fraction in (1.0, 0.25):
        record = _Logged()
        jacobian = {"coef": 1.0, "warmup_fraction": 0.0, "token_fraction": token_fraction}
        _fit(_module(6, jacobian=jacobian), _Data(6), 6, record)
        logged.append(record.metrics)
    assert logged[1][0]["train/loss"] == pytest.approx(logged[0][0]["train/loss"])
    for metrics in logged[1]:
        parts = metrics["train/mse_input"] + metrics["train/mse_output"] + metrics["train/jacobian_penalty"]
        assert metrics["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert logged[1][1]["train/jacobian_penalty"] != logged[0][1]["train/jacobian_penalty"]


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kernels_agree_in_every_logged_metric(monkeypatch, steps):
    """The same seeded steps with the plain and the fast kernels."""
    from jsae_lightning import kernels

    logged = {}
    for name in ("reference", "cpu"):
        monkeypatch.setattr(kernels, "_forced", [kernels.IMPLEMENTATIONS[name]])
        record = _Logged()
        _fit(_module(steps, sae={"auxk_coef": 0.03}), _Data(steps), steps, record)
        logged[name] = record.metrics
    for fast, slow in zip(logged["cpu"], logged["reference"], strict=True):
        assert fast == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert logged["cpu"][0]["train/loss"] > 1.1 * logged["cpu"][-1]["train/loss"]
