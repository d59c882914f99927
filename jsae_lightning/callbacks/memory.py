"""Says before training starts how much memory it will take."""

import logging
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from jsae_lightning.kernels import selected_kernels
from jsae_lightning.memory import LanguageModelShape, StepShape, describe, run_parts
from jsae_lightning.module import JSAEModule

log = logging.getLogger(__name__)


class MemoryEstimate(Callback):
    """Logs one line with the estimate of `memory.run_parts`, for one rank; on rank 0."""

    def __init__(self, *, batch_tokens: int, lm_batch_sequences: int, evaluation_sequences: int) -> None:
        """Take what the data module and the LightningModule do not tell.

        Args:
            batch_tokens: tokens of an optimizer step over all ranks.
            lm_batch_sequences: sequences of a forward pass that makes activations.
            evaluation_sequences: sequences of a forward pass of an evaluation; 0: there is none.
        """
        self._batch_tokens = batch_tokens
        self._pass_sequences, self._evaluation_sequences = lm_batch_sequences, evaluation_sequences

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the line; the data module has loaded the language model."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module = cast(JSAEModule, pl_module)
        model, pair, mlp = data.language_model, module.pair, data.frozen_mlp
        on_cpu = model.device.type == "cpu"
        length = data.val_tokens.shape[1]
        shape = StepShape(
            tokens=self._batch_tokens // trainer.world_size // trainer.accumulate_grad_batches,
            d_model=pair.d_model,
            d_mlp=mlp.d_mlp,
            d_sae=pair.input_sae.d_sae,
            d_sae_output=pair.output_sae.d_sae,
            k=pair.input_sae.k,
            k_output=pair.output_sae.k,
            gated=mlp.is_gated,
            penalty=module.jacobian_coef > 0,
            kernels=selected_kernels(model.device),
            precision=str(trainer.precision),
        )
        passes = LanguageModelShape(
            num_bytes=model.num_bytes,
            itemsize=model.itemsize,
            d_model=pair.d_model,
            d_mlp=mlp.d_mlp,
            vocab_size=model.architecture.vocab_size,
            pass_tokens=self._pass_sequences * length,
            evaluation_tokens=min(self._evaluation_sequences, len(data.val_tokens)) * length,
        )
        parts = run_parts(shape, passes, block_bytes=data.block_bytes, prefetch=data.prefetch, on_cpu=on_cpu)
        log.info(describe(parts))
