"""The LightningModule: an input/output SAE pair trained around a frozen MLP."""

from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from jsae_lightning.auxk import auxk_loss
from jsae_lightning.checkpoint import recount_micro_batches
from jsae_lightning.distributed import all_reduce_max, all_reduce_sum
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobians import edge_penalty
from jsae_lightning.loggers import log_metrics
from jsae_lightning.losses import Reconstruction, pair_losses
from jsae_lightning.metrics import (
    Sums,
    add_sums,
    reconstruction_metrics,
    reconstruction_sums,
    with_prefix,
    without_prefix,
)
from jsae_lightning.penalties import make_penalty
from jsae_lightning.sae import SAEPair, TopKSAE
from jsae_lightning.schedules import coef_factor, lr_factor, penalizes


class JSAEModule(lightning.LightningModule):
    """Trains a pair on activations; the language model is never a part of it.

    loss = MSE(x, x_hat) + c MSE(y, y_hat) + lambda(t) penalty(J) + auxk_coef (AuxK of both)

    Source: Farnik et al., section 4; AuxK is ours to add. Logged every `log_every_n_steps` optimizer steps, numbered
    from 1: `train/loss`, `train/mse_{input,output}`, `train/explained_variance_{input,output}` (of the batch),
    `train/l0_*`, `train/dead_share_*`, `train/auxk_*`, `train/jacobian_penalty` (unweighted), `train/jacobian_coef`,
    `train/lr`, `train/tokens_seen`.
    """

    tokens_seen: Tensor
    tokens_since_fired_input: Tensor
    tokens_since_fired_output: Tensor
    step_tokens: Tensor
    first_bad_step: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        sae: dict[str, Any],
        jacobian: dict[str, Any],
        optim: dict[str, Any],
        total_steps: int,
        seed: int,
    ) -> None:
        """Build the pair from `seed`.

        `sae` has d_sae, d_sae_output, k, k_output, subtract_b_dec, mse_output_coef, auxk_coef, auxk_k,
        dead_after_tokens; `jacobian` penalty, params, coef (a number), at, edges, token_fraction, warmup_fraction,
        decay_fraction; `optim` lr, betas, warmup_fraction, decay_fraction. All are plain values, so that checkpoints
        load with `weights_only=True`.
        """
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(seed)
        shape = {key: sae[key] for key in ("d_sae", "d_sae_output", "k", "k_output", "subtract_b_dec")}
        self.pair = SAEPair(d_model, **shape, generator=generator)
        self.mse_output_coef, self.auxk_coef = sae["mse_output_coef"], sae["auxk_coef"]
        self.auxk_k = sae["auxk_k"] or max(1, d_model // 2)
        self.dead_after_tokens = sae["dead_after_tokens"]
        self.penalty = edge_penalty(make_penalty(jacobian["penalty"], **jacobian["params"]), jacobian["edges"])
        self.jacobian_coef, self.jacobian_at = jacobian["coef"], jacobian["at"]
        self.coef_warmup_fraction, self.coef_decay_fraction = jacobian["warmup_fraction"], jacobian["decay_fraction"]
        self.token_fraction = jacobian["token_fraction"]
        self.optim, self.total_steps = optim, total_steps
        self.mlp: FrozenMLP | None = None
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        for name, member in self.pair.named_saes():
            self.register_buffer(f"tokens_since_fired_{name}", torch.zeros(member.d_sae, dtype=torch.int64))
            self.register_buffer(f"fired_{name}", torch.zeros(member.d_sae, dtype=torch.bool), persistent=False)
        self.register_buffer("step_tokens", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("first_bad_step", torch.full((), -1, dtype=torch.int64), persistent=False)
        self._sums: Sums = {}

    def setup(self, stage: str) -> None:
        """Take the frozen MLP from the data module; it follows this module's device but is in no checkpoint."""
        if self.mlp is None:
            self.mlp = self.trainer.datamodule.frozen_mlp  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which MLP the pair belongs to."""
        assert self.mlp is not None
        checkpoint["mlp_hash"] = self.mlp.weights_hash()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another MLP (model, revision, layer, dtype, random weights); recount micro-batches."""
        if self.mlp is not None and (found := checkpoint.get("mlp_hash")) != (own := self.mlp.weights_hash()):
            raise UserError(
                f"ckpt_path: was made with another MLP (hash {str(found)[:12]}, here {own[:12]}): repeat the model.* "
                "settings of its run"
            )
        recount_micro_batches(checkpoint, self.trainer.accumulate_grad_batches)

    def forward(self, mlp_in: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """Return the input SAE's reconstruction (the whole loss is in `training_step`)."""
        return self.pair.input_sae(mlp_in)[0]

    def training_step(self, mlp_in: Float[Tensor, "tokens d_model"], batch_idx: int) -> Float[Tensor, ""]:
        """Return the loss of one micro-batch of MLP inputs."""
        assert self.mlp is not None
        # The penalty's weight counts a chosen step's tokens for those of the steps without one. A step that is logged
        # needs its value in any case.
        is_penalized = penalizes(self.trainer.global_step, self.token_fraction)
        needs_penalty = self.jacobian_coef > 0 and (is_penalized or self._logs_this_step())
        losses = pair_losses(
            self.pair,
            self.mlp,
            mlp_in,
            self.penalty if needs_penalty else None,
            at=self.jacobian_at,
            penalty_gradient=is_penalized,
        )
        coef = self.current_coef()
        loss = losses.total(coef / self.token_fraction if is_penalized else 0.0, self.mse_output_coef)
        parts = {"loss": losses.total(coef, self.mse_output_coef).detach()}
        if losses.jacobian_penalty is not None:
            parts["jacobian_penalty"] = losses.jacobian_penalty
        for name, sae in self.pair.named_saes():
            auxk = self._note(name, sae, getattr(losses, name), parts)
            if auxk is not None:
                loss = loss + self.auxk_coef * auxk
                parts["loss"] = parts["loss"] + self.auxk_coef * auxk.detach()
        self._accumulate(parts, len(mlp_in))
        return loss

    def _note(self, name: str, sae: TopKSAE, pass_: Reconstruction, parts: dict[str, Tensor]) -> Tensor | None:
        """Add one SAE's losses and sums to `parts`, note which latents fired, return its AuxK loss or None."""
        parts[f"mse_{name}"] = pass_.mse
        auxk = None
        if self.auxk_coef:
            dead = getattr(self, f"tokens_since_fired_{name}") >= self.dead_after_tokens
            parts[f"auxk_{name}"] = auxk = auxk_loss(sae, pass_.x, pass_.x_hat, dead, self.auxk_k)
        with torch.no_grad():
            latents = pass_.latents
            parts[f"l0_{name}"] = latents.active.sum() / len(pass_.x)
            getattr(self, f"fired_{name}").logical_or_(latents.fired(sae.d_sae))
            if self._logs_this_step():
                sums = with_prefix(f"{name}/", reconstruction_sums(pass_.x, pass_.x_hat))
                self._sums = add_sums(self._sums, sums)
        return auxk

    def _accumulate(self, parts: dict[str, Tensor], tokens: int) -> None:
        """Sum the micro-batches of one optimizer step, on the device, so that nothing waits for it."""
        share = 1 / (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        self._sums = add_sums(self._sums, {name: value.detach().double() * share for name, value in parts.items()})
        bad = ~torch.isfinite(parts["loss"].detach()) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, self.trainer.global_step + 1)
        self.step_tokens += tokens

    def _logs_this_step(self) -> bool:
        step = self.trainer.global_step + 1
        return step == 1 or step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def check_finite(self) -> None:
        """Raise UserError if the loss has been NaN or infinite: called before anything is logged or saved."""
        if (step := int(all_reduce_max(self.first_bad_step))) >= 0:
            raise UserError(
                f"train/loss: not a finite number at optimizer step {step}: lower optim.lr or jacobian.coef; the last "
                "checkpoint before that step is kept"
            )

    def current_coef(self) -> float:
        """Return lambda(t) for the optimizer step that is being computed."""
        return self.jacobian_coef * coef_factor(
            self.trainer.global_step, self.total_steps, self.coef_warmup_fraction, self.coef_decay_fraction
        )

    def configure_optimizers(self) -> Any:
        """Adam; the learning rate is a function of the optimizer step."""
        optimizer = torch.optim.Adam(self.pair.parameters(), lr=self.optim["lr"], betas=tuple(self.optim["betas"]))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_factor(step, self.total_steps, self.optim["warmup_fraction"], self.optim["decay_fraction"]),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Project the decoders' gradients; Lightning clips them after this."""
        self.pair.project_decoder_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, restore unit-norm decoder rows, count what fired, log: once per optimizer step."""
        lr, coef = self.trainer.optimizers[0].param_groups[0]["lr"], self.current_coef()
        super().optimizer_step(*args, **kwargs)
        self.pair.normalize_decoders()
        self._count_fired()
        if self._logs_this_step():
            self._log_step(self.trainer.global_step + 1, lr, coef)
        self._sums = {}

    def _count_fired(self) -> None:
        """Advance the dead-latent counters by the tokens of all ranks."""
        tokens = all_reduce_sum({"tokens": self.step_tokens})["tokens"].to(torch.int64)
        self.tokens_seen += tokens
        for name, _ in self.pair.named_saes():
            fired = getattr(self, f"fired_{name}")
            counter = getattr(self, f"tokens_since_fired_{name}")
            counter.add_(tokens).masked_fill_(all_reduce_max(fired), 0)
            fired.zero_()
        self.step_tokens.zero_()

    def dead_share(self, name: str) -> Tensor:
        """Return the share of latents of the SAE `input` or `output` without a firing in `dead_after_tokens` tokens."""
        counter = getattr(self, f"tokens_since_fired_{name}")
        return (counter >= self.dead_after_tokens).float().mean()

    def _log_step(self, step: int, lr: float, coef: float) -> None:
        self.check_finite()
        sums = all_reduce_sum(self._sums)
        metrics = {f"train/{name}": float(value) for name, value in sums.items() if "/" not in name}
        for name, _ in self.pair.named_saes():
            reconstruction = reconstruction_metrics(without_prefix(f"{name}/", sums))
            metrics[f"train/explained_variance_{name}"] = reconstruction["explained_variance"]
            metrics[f"train/dead_share_{name}"] = float(self.dead_share(name))
        metrics |= {"train/lr": lr, "train/jacobian_coef": coef, "train/tokens_seen": float(self.tokens_seen)}
        log_metrics(self.trainer, metrics, step)
        self.log_dict(metrics, logger=False)
