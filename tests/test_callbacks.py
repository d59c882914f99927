"""Evaluation while training and its pictures, as callbacks of a real trainer with a toy language model."""

import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callback_runs import (
    K,
    StopAt,
    ToyData,
    checkpointing,
    evaluation,
    fit,
    make_module,
    make_trainer,
    read_board,
    scalar_steps,
)
from jsae_lightning.callbacks import (
    InTrainingEvaluation,
    JacobianHistograms,
    Throughput,
    TrainingProgress,
    jacobian_histograms,
)
from jsae_lightning.errors import UserError
from jsae_lightning.figures import jacobian_heat_map, printable, token_title
from jsae_lightning.module import JSAEModule
from jsae_lightning.summary import check_names, final_metrics

PNG = jacobian_heat_map(torch.ones(2, 2), title="", label="", limits=(0.1, 1.0))


@pytest.fixture
def quick_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture for all, where only its place in the files matters."""
    monkeypatch.setattr(jacobian_histograms, "jacobian_heat_map", lambda values, **kwargs: PNG)


class Recorder(Callback):
    """Notes what an evaluation must not touch, after every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        flags = [member.training for member in pl_module.modules()]
        gradients = [p.grad is None or p.grad.clone() for p in pl_module.parameters()]
        self.seen.append((flags, torch.get_rng_state(), torch.is_grad_enabled(), gradients))


@pytest.mark.usefixtures("quick_maps")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluating_and_drawing_leave_training_as_it_is(tmp_path: Path, accumulate: int) -> None:
    plain, watched = Recorder(), Recorder()
    without = fit(tmp_path / "a", [plain], accumulate=accumulate)
    callbacks = [evaluation(1), JacobianHistograms(1, 1, 0), Throughput(), watched]
    with_all = fit(tmp_path / "b", callbacks, accumulate=accumulate)
    first, second = (trainer.lightning_module.state_dict() for trainer in (without, with_all))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(plain.seen) == len(watched.seen) == 5 * accumulate
    for one, other in zip(plain.seen, watched.seen, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert one[2] is other[2] is True
        assert all(x is y or torch.equal(x, y) for x, y in zip(one[3], other[3], strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluation_comes_at_its_interval_and_at_the_end_once(tmp_path: Path, accumulate: int) -> None:
    trainer = fit(tmp_path, [callback := evaluation(2)], accumulate=accumulate)
    assert scalar_steps(tmp_path, "val/loss") == [2, 4, 5]
    assert scalar_steps(tmp_path, "train/loss") == [1, 2, 3, 4, 5]
    assert callback.last_step == 5
    assert callback.last is not None
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(callback.last.metrics["val/loss"])


class Note(Callback):
    """Notes up to which step there has been an evaluation, at the moment when a checkpoint would be saved."""

    def __init__(self, evaluation: InTrainingEvaluation) -> None:
        self.evaluation, self.evaluated = evaluation, list[int]()

    def on_train_batch_end(self, *args: Any) -> None:
        self.evaluated.append(self.evaluation.last_step)


def test_without_an_interval_only_the_end_is_evaluated_before_it_is_saved(tmp_path: Path) -> None:
    callback = evaluation(None)
    fit(tmp_path, [callback, note := Note(callback)], steps=3)
    assert scalar_steps(tmp_path, "val/ce_score_both") == [3]
    assert note.evaluated == [-1, -1, 3]


def test_val_loss_has_the_final_weights(tmp_path: Path) -> None:
    fit(tmp_path, [callback := evaluation(1)], steps=2)
    assert callback.last is not None
    metrics = callback.last.metrics
    expected = metrics["val/mse_input"] + 2.0 * metrics["val/mse_output"] + 0.5 * metrics["jacobian/mean_abs"]
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_names_of_what_will_be_evaluated_are_known_before(tmp_path: Path) -> None:
    callback = evaluation(None)
    trainer = fit(tmp_path, [callback, Throughput()], steps=1)
    module = cast(JSAEModule, trainer.lightning_module)
    assert callback.last is not None and set(callback.metric_names(module)) == set(callback.last.metrics)
    for name, value in final_metrics(trainer).items():
        if name != "run/status":
            assert isinstance(value, float | int)
            check_names(trainer, name, None)
    for key, names in {
        "objective": ("val/los", None),
        "checkpoint.best_metric": ("time/seconds", "val/los"),
    }.items():
        with pytest.raises(
            UserError, match=f"^{key}: no figure is named 'val/los': did you mean val/loss.* choose one"
        ):
            check_names(trainer, *names)
    with pytest.raises(UserError, match=r"^objective: .*'run/status'"):  # no number
        check_names(trainer, "run/status", None)
    with pytest.raises(UserError, match=r"^checkpoint.best_metric: .*'time/seconds'"):  # no figure of an evaluation
        check_names(trainer, "val/loss", "time/seconds")


def test_names_are_not_checked_where_they_cannot_be_known(tmp_path: Path) -> None:
    check_names(fit(tmp_path / "none", [Throughput()], steps=1), "val/los", "val/los")  # nothing is evaluated
    check_names(fit(tmp_path / "own", [evaluation(None), StopAt(9)], steps=1), "val/loss", "own/figure")


def test_num_sequences_takes_the_first_ones(tmp_path: Path) -> None:
    data = ToyData(2)
    few = InTrainingEvaluation(None, 4, jacobian_tokens=None, num_sequences=2, exclude_first_position=False)
    make_trainer(tmp_path / "a", [few], 2).fit(make_module(2), datamodule=data)
    data = ToyData(2)
    data.val_tokens = data.val_tokens[:2]
    every = InTrainingEvaluation(None, 4, jacobian_tokens=None, num_sequences=None, exclude_first_position=False)
    make_trainer(tmp_path / "b", [every], 2).fit(make_module(2), datamodule=data)
    assert few.last is not None
    assert every.last is not None
    assert few.last.metrics == every.last.metrics


def test_exclude_first_position_judges_the_others_only(tmp_path: Path) -> None:
    found = {}
    for name, exclude, mask_in_data in [("asked", True, False), ("by data", False, True), ("all", False, False)]:
        data = ToyData(2)
        if not mask_in_data:  # the toy data leave position 0 out by themselves
            data.included = lambda tokens: torch.ones_like(tokens, dtype=torch.bool)  # type: ignore[method-assign]
        callback = InTrainingEvaluation(None, 4, None, None, exclude_first_position=exclude)
        make_trainer(tmp_path / name, [callback], 2).fit(make_module(2), datamodule=data)
        assert callback.last is not None
        found[name] = callback.last.metrics
    assert found["asked"] == found["by data"]
    assert found["asked"]["val/mse_input"] != found["all"]["val/mse_input"]


def test_a_run_that_stops_early_is_evaluated_at_its_end(tmp_path: Path) -> None:
    fit(tmp_path, [evaluation(2), JacobianHistograms(1, 1, 0), StopAt(3)])
    assert scalar_steps(tmp_path, "val/loss") == [2, 3]
    images = read_board(tmp_path).Images("jacobian_heat_map/0_abs")
    assert [image.step for image in images] == [2, 3]


@pytest.mark.usefixtures("quick_maps")
def test_resumed_and_finished_runs_log_and_draw_nothing_twice(tmp_path: Path) -> None:
    def others() -> list[Callback]:
        return [Throughput(), JacobianHistograms(1, 1, 0), checkpointing(tmp_path)]

    fit(tmp_path, [evaluation(2), *others(), StopAt(4)], steps=6)
    for _ in range(2):  # goes on from step 4, then has nothing left to do
        trainer = make_trainer(tmp_path, [again := evaluation(2), *others()], steps=6)
        checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
        trainer.fit(make_module(6), datamodule=ToyData(6), ckpt_path=checkpoint)
        assert again.last is not None
        assert again.last_step == 6
    assert scalar_steps(tmp_path, "val/loss") == [2, 4, 6]
    assert scalar_steps(tmp_path, "train/loss") == [1, 2, 3, 4, 5, 6]
    board = read_board(tmp_path)
    assert [event.step for event in board.Images("jacobian_heat_map/0_abs")] == [2, 4, 6]
    assert [event.step for event in board.Histograms("jacobian/log10_abs")] == [2, 4, 6]


@pytest.mark.usefixtures("quick_maps")
def test_pictures_in_tensorboard(tmp_path: Path) -> None:
    fit(tmp_path, [callback := evaluation(1), JacobianHistograms(2, num_heatmap_tokens=2, seed=0)], steps=4)
    board = read_board(tmp_path)
    maps = {f"jacobian_heat_map/{i}_{kind}" for i in range(2) for kind in ("abs", "rms_normalized")}
    assert set(board.Tags()["images"]) == maps
    assert callback.last is not None
    for tag in maps:
        assert [image.step for image in board.Images(tag)] == [1, 3, 4], "every second one and the last"
    for tag, counts in (
        ("jacobian/log10_abs", callback.last.abs_histogram),
        ("jacobian/log10_abs_rms_normalized", callback.last.rms_histogram),
    ):
        histogram = board.Histograms(tag)[-1].histogram_value
        assert sum(histogram.bucket) == counts[1:].sum() > 0, "all but the exact zeros"
        assert -8 < histogram.min < histogram.max < 3
    for name, rates in (("input", callback.last.firing_rate_input), ("output", callback.last.firing_rate_output)):
        histogram = board.Histograms(f"val/log10_firing_rate_{name}")[-1].histogram_value
        assert sum(histogram.bucket) == (rates > 0).sum() > 0
        assert histogram.min <= rates[rates > 0].log10().min() <= histogram.min + 0.11


def test_heat_maps_shuffle_latents_but_keep_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A J that falls along TopK's order must not look like a gradient, and a step must look like the next."""
    drawn: list[Tensor] = []
    ramp = torch.linspace(1.0, 2.0, K)
    fake = SimpleNamespace(values=(ramp[:, None] * ramp[None, :]).expand(1, K, K))

    def fake_jacobian(pair: Any, mlp: Any, mlp_in: Tensor, at: str) -> Any:
        drawn.append(mlp_in)
        return fake

    def fake_map(values: Tensor, **kwargs: Any) -> bytes:
        drawn.append(values)
        return PNG

    monkeypatch.setattr(jacobian_histograms, "jacobian", fake_jacobian)
    monkeypatch.setattr(jacobian_histograms, "jacobian_heat_map", fake_map)
    fit(tmp_path, [evaluation(1), JacobianHistograms(1, 1, seed=1)], steps=2)
    first, raw, _, second, raw_again, _ = drawn
    assert torch.equal(first, second)
    assert torch.equal(raw, raw_again)
    assert torch.equal(raw.flatten().sort().values, fake.values.flatten().sort().values)
    assert not torch.equal(raw[:, 0], raw[:, 0].sort().values)
    assert not torch.equal(raw[0], raw[0].sort().values)


def test_heat_map_tokens_are_included_ones_with_their_context() -> None:
    data = ToyData(1)
    mlp_in, titles = jacobian_histograms.heat_map_tokens(data, 2)
    assert torch.equal(mlp_in, data.language_model.embedding[data.val_tokens[:2, 5]])  # positions 1 to 8 count
    assert titles[1] == f"held-out sequence 1, position 5: token {data.val_tokens[1, 5]}"
    data.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    _, titles = jacobian_histograms.heat_map_tokens(data, 1)
    before = " ".join(map(str, data.val_tokens[0, :5].tolist()))
    assert titles == [f"{before}[{data.val_tokens[0, 5]}]"]


def test_drawing_needs_an_evaluation_before_it_but_no_tensorboard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="InTrainingEvaluation"):
        fit(tmp_path, [JacobianHistograms(1, 1, 0), evaluation(1)])
    fit(tmp_path, [evaluation(1), JacobianHistograms(1, 1, 0)], steps=1, logger=[])


def test_titles_of_any_text_fit_one_line_and_any_font() -> None:
    title = token_title("x" * 100 + "\n\t$a_{", " \u4e2d\u6587\n")
    assert title.startswith("...x")
    assert title.endswith("x\\n\\t$a_{[ \u4e2d\u6587\\n]")
    assert len(title) <= 70
    assert printable("caf\u00e9 \u4e2d\n") == "caf\u00e9 \\u4e2d\\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jacobian_heat_map(torch.zeros(3, 2), title=title, label="|J|", limits=(0.1, 1.0))[:4] == b"\x89PNG"


def test_heat_map_colours_depend_on_fixed_limits_only() -> None:
    """Scaling J must change the picture; a value beyond the limits must look like the limit."""
    values = torch.tensor([[0.5, 0.05], [0.0, 2.0]])

    def draw(values: Tensor) -> bytes:
        return jacobian_heat_map(values, title="t", label="|J|", limits=(1e-3, 1.0))

    assert draw(values) == draw(-values)
    assert draw(values) != draw(values / 2)
    assert draw(values) == draw(values.clamp(max=1.0))
    assert draw(values) != draw(values.clamp(min=1e-3)), "an inactive entry looks like a small one"


def test_steps_are_those_of_the_optimizer(tmp_path: Path) -> None:
    """Three micro-batches a step: once a step, after its last one."""
    calls = itertools.count()

    class Count(TrainingProgress):
        def on_step_end(self, trainer: Any, pl_module: Any, step: int) -> None:
            assert step == next(calls) + 1

    fit(tmp_path, [Count(None, None, "lines")], steps=3, accumulate=3)
    assert next(calls) == 3
