"""Pictures of the Jacobian and of the latents' firing rates, in TensorBoard."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from jsae_lightning.callbacks.evaluation import InTrainingEvaluation
from jsae_lightning.callbacks.steps import StepCallback
from jsae_lightning.callbacks.throughput import paused
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation import Evaluation
from jsae_lightning.figures import jacobian_heat_map, token_title
from jsae_lightning.jacobian_metrics import histogram_edges, rms_normalized
from jsae_lightning.jacobians import jacobian
from jsae_lightning.module import JSAEModule
from jsae_lightning.tensorboard_logger import ResumableTensorBoardLogger

ABS_LIMITS = (1e-4, 1.0)
"""Ends of the heat maps' colour scale for |J|."""
RMS_LIMITS = (1e-2, 10.0)
"""The same for |J| divided by the token's root mean square, which is 1 if all entries are equal."""
RATE_EDGES = torch.linspace(-7, 0, 71, dtype=torch.float64)
"""Bins of log10 firing rates: ten to a decade."""


class JacobianHistograms(StepCallback):
    """Draws what `InTrainingEvaluation` has measured; measures nothing that is logged as a number.

    After every `every_n_evaluations`-th evaluation, the first and the last one included:

    * `jacobian/log10_abs`, `jacobian/log10_abs_rms_normalized`: histograms of log10 |J| over the evaluation's tokens,
      raw and divided by each token's root mean square; exact zeros are left out;
    * `val/log10_firing_rate_input`, `..._output`: histograms over latents; those that never fired are left out;
    * `jacobian_heat_map/<i>_abs`, `<i>_rms_normalized`: the |J| of a few held-out tokens, the same ones always, on a
      fixed log colour scale. TopK sorts latents by strength, which would look like structure, so rows and columns
      are shuffled, always in the same way.

    Without a TensorBoard logger it does nothing.
    """

    def __init__(self, every_n_evaluations: int, num_heatmap_tokens: int, seed: int) -> None:
        """Set how often to draw, for how many tokens (0: no heat maps), and the seed of the shuffle.

        Raises UserError for an interval below 1 and for fewer tokens than none.
        """
        super().__init__()
        if every_n_evaluations < 1:
            raise UserError(
                f"callbacks.jacobian_histograms.every_n_evaluations: {every_n_evaluations} is not above zero: give a "
                "number from 1, or leave them out with ~callbacks.jacobian_histograms"
            )
        if num_heatmap_tokens < 0:
            raise UserError(
                f"callbacks.jacobian_histograms.num_heatmap_tokens: {num_heatmap_tokens} is negative: give 0 or more"
            )
        self.every_n_evaluations, self.num_heatmap_tokens, self.seed = every_n_evaluations, num_heatmap_tokens, seed
        self._seen_step = -1
        self._num_evaluations = 0
        self._tokens: tuple[Tensor, list[str]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last evaluation seen, and how many there were."""
        return {"seen_step": self._seen_step, "num_evaluations": self._num_evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, so that no step is drawn twice."""
        self._seen_step, self._num_evaluations = state_dict["seen_step"], state_dict["num_evaluations"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise UserError if no evaluation comes before this callback."""
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if not any(isinstance(callback, InTrainingEvaluation) for callback in before):
            raise UserError(
                "callbacks: JacobianHistograms draws what InTrainingEvaluation measures, and none comes before it: "
                "add one or remove JacobianHistograms"
            )

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Draw if there has been an evaluation after this step and it is due."""
        self._draw_new(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the evaluation at the end of training."""
        self._draw_new(trainer, pl_module)

    def _draw_new(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluation = next(c for c in trainer.callbacks if isinstance(c, InTrainingEvaluation))  # type: ignore[attr-defined]
        if evaluation.last is None or evaluation.last_step <= self._seen_step:
            return
        is_due = self._num_evaluations % self.every_n_evaluations == 0 or evaluation.last_step == trainer.max_steps
        self._seen_step, self._num_evaluations = evaluation.last_step, self._num_evaluations + 1
        board = next((x for x in trainer.loggers if isinstance(x, ResumableTensorBoardLogger)), None)
        if not is_due or board is None or not trainer.is_global_zero:
            return
        with paused(trainer):
            draw_histograms(board, evaluation.last, evaluation.last_step)
            for tag, png in self._heat_maps(trainer, cast(JSAEModule, pl_module)):
                board.log_image(f"jacobian_heat_map/{tag}", png, evaluation.last_step)

    @torch.no_grad()
    def _heat_maps(self, trainer: Trainer, module: JSAEModule) -> Iterator[tuple[str, bytes]]:
        if not self.num_heatmap_tokens:
            return
        assert module.mlp is not None
        if self._tokens is None:
            self._tokens = heat_map_tokens(trainer.datamodule, self.num_heatmap_tokens)  # type: ignore[attr-defined]
        mlp_in, titles = self._tokens
        mlp_in = mlp_in.to(module.pair.input_sae.W_dec.dtype)
        values = jacobian(module.pair, module.mlp, mlp_in, at=module.jacobian_at).values
        values = values[:, _shuffle(values.shape[1], self.seed)][:, :, _shuffle(values.shape[2], self.seed + 1)]
        for number, (raw, normalized, title) in enumerate(zip(values, rms_normalized(values), titles, strict=True)):
            yield f"{number}_abs", jacobian_heat_map(raw, title=title, label="|J|", limits=ABS_LIMITS)
            label = "|J| / root mean square of the token"
            yield f"{number}_rms_normalized", jacobian_heat_map(normalized, title=title, label=label, limits=RMS_LIMITS)


def draw_histograms(board: ResumableTensorBoardLogger, evaluation: Evaluation, step: int) -> None:
    """Log the histograms of an evaluation."""
    edges = histogram_edges().log10()
    # Beyond the outer edges, too, something may lie: one more bin on either side, a decade wide.
    edges = torch.cat([edges[:1] - 1, edges, edges[-1:] + 1])
    for tag, counts in (("abs", evaluation.abs_histogram), ("abs_rms_normalized", evaluation.rms_histogram)):
        board.log_histogram_counts(f"jacobian/log10_{tag}", counts[1:], edges, step)
    for name, rate in (("input", evaluation.firing_rate_input), ("output", evaluation.firing_rate_output)):
        counts = torch.histogram(rate[rate > 0].cpu().log10().clamp(min=-7), RATE_EDGES).hist
        board.log_histogram_counts(f"val/log10_firing_rate_{name}", counts, RATE_EDGES, step)


def heat_map_tokens(data: Any, num_tokens: int) -> tuple[Float[Tensor, "tokens d_model"], list[str]]:
    """Return the MLP's input at one token of each of the first held-out sequences, and titles with the tokens' text.

    The token is the middle one of those that count (`data.included`), so that it has a context; a sequence without
    such is passed over. `data` is an ActivationDataModule after its setup.
    """
    tokens = data.val_tokens
    included = data.included(tokens)
    rows, titles = [], []
    for sequence in included.any(dim=1).nonzero()[:num_tokens, 0].tolist():
        positions = included[sequence].nonzero()[:, 0]
        position = int(positions[len(positions) // 2])
        rows.append(data.language_model.mlp_in(tokens[sequence : sequence + 1, : position + 1])[0, -1])
        titles.append(_title(data.tokenizer, tokens[sequence, : position + 1].tolist(), sequence))
    return torch.stack(rows), titles


def _title(tokenizer: Any, ids: list[int], sequence: int) -> str:
    if tokenizer is None:
        return f"held-out sequence {sequence}, position {len(ids) - 1}: token {ids[-1]}"
    return token_title(tokenizer.decode(ids[-32:-1]), tokenizer.decode(ids[-1:]))


def _shuffle(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
