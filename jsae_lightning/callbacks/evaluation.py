"""Evaluation on held-out tokens in the course of training."""

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from jsae_lightning.callbacks.steps import StepCallback
from jsae_lightning.callbacks.throughput import paused
from jsae_lightning.evaluation import Evaluation, evaluate_pair, metric_names
from jsae_lightning.loggers import log_metrics
from jsae_lightning.module import JSAEModule


class InTrainingEvaluation(StepCallback):
    """Judges the pair on the data module's held-out tokens every few optimizer steps, and at the end of training.

    Logs everything in `evaluate_pair(...).metrics` and

        val/loss = val/mse_input + mse_output_coef val/mse_output + jacobian_coef val/penalty

    with the final weight of the penalty at any step, so that values compare over time; AuxK, which is no goal in
    itself, is not a part of it. All of it is also in `trainer.callback_metrics`. Training goes on as if nothing had
    happened: no random numbers, gradients or training flags are touched. On every rank.

    Attributes: `last`, the latest Evaluation of this process (None before the first), and `last_step`, the optimizer
    step after which it was made (-1 before the first).
    """

    def __init__(
        self,
        every_n_steps: int | None,
        batch_sequences: int,
        jacobian_tokens: int | None,
        num_sequences: int | None,
        exclude_first_position: bool,
    ) -> None:
        """Set the extent.

        Args:
            every_n_steps: optimizer steps between evaluations; None: only at the end.
            batch_sequences: sequences in one forward pass of the language model.
            jacobian_tokens: tokens of the Jacobian's measures; None: all evaluated tokens.
            num_sequences: how many of the held-out sequences to use, the first ones; None: all.
            exclude_first_position: leave position 0 of every sequence out, as the paper does.
        """
        super().__init__()
        self.every_n_steps, self.num_sequences = every_n_steps, num_sequences
        self.batch_sequences, self.jacobian_tokens = batch_sequences, jacobian_tokens
        self.exclude_first_position = exclude_first_position
        self.last: Evaluation | None = None
        self.last_step = -1
        self._logged_step = -1

    @staticmethod
    def metric_names(module: JSAEModule) -> list[str]:
        """Return the names of all that will be logged, once the module has its MLP."""
        assert module.mlp is not None
        return [*metric_names(module.pair, module.mlp, at=module.jacobian_at, penalty=module.penalty), "val/loss"]

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last evaluation that is in the logs."""
        return {"logged_step": self._logged_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, so that a step is not logged twice."""
        self._logged_step = state_dict["logged_step"]

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Evaluate if it is time, and after the last step: before that step's checkpoint, which then knows of it."""
        if step == trainer.max_steps or (self.every_n_steps is not None and step % self.every_n_steps == 0):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate if training stopped before its last step."""
        if self.last_step != trainer.global_step:
            self._evaluate(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a run that was resumed when it was complete: Lightning skips every training hook then."""
        if self.last_step == trainer.global_step:
            return
        device = pl_module.device
        pl_module.to(trainer.datamodule.language_model.device)  # type: ignore[attr-defined]
        self._evaluate(trainer, pl_module)
        pl_module.to(device)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with paused(trainer):
            module, data = cast(JSAEModule, pl_module), trainer.datamodule  # type: ignore[attr-defined]
            tokens = data.val_tokens[: self.num_sequences]
            included = data.included(tokens).clone()
            if self.exclude_first_position:
                included[:, 0] = False
            assert module.mlp is not None
            module.check_finite()
            self.last = evaluate_pair(
                module.pair,
                module.mlp,
                data.language_model,
                tokens,
                included,
                at=module.jacobian_at,
                batch_sequences=self.batch_sequences,
                jacobian_tokens=self.jacobian_tokens,
                penalty=module.penalty,
            )
            metrics = self.last.metrics
            metrics["val/loss"] = _loss(module, metrics)
            self.last_step = trainer.global_step
            trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in metrics.items()})
            if self._logged_step != self.last_step:
                log_metrics(trainer, metrics, self.last_step)
                self._logged_step = self.last_step


def _loss(module: JSAEModule, metrics: dict[str, float]) -> float:
    loss = metrics["val/mse_input"] + module.mse_output_coef * metrics["val/mse_output"]
    if module.jacobian_coef:
        loss += module.jacobian_coef * metrics["val/penalty"]
    return loss
