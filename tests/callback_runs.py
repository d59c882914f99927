"""A real trainer and module with a toy language model in the place of a real one, for the tests of callbacks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from factories import make_mlp
from jsae_lightning.callbacks import (
    Checkpointing,
    InTrainingEvaluation,
    TrainingProgress,
)
from jsae_lightning.loggers import ResumableCSVLogger, ResumableTensorBoardLogger
from jsae_lightning.module import JSAEModule

D_MODEL, D_SAE, K, VOCAB, SEQ = 10, 32, 5, 23, 9


class ToyLanguageModel:
    """An embedding, one MLP and an unembedding."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.device = torch.device("cpu")
        self.frozen_mlp = make_mlp("gelu", D_MODEL, 24).float()
        self.embedding = torch.randn(VOCAB, D_MODEL, generator=generator)

    def mlp_in(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]

    def logits(self, tokens: Tensor, *, replace_mlp_in: Any = None, replace_mlp_out: Any = None) -> Tensor:
        residual = self.mlp_in(tokens)
        mlp_in = replace_mlp_in(residual) if replace_mlp_in else residual
        mlp_out = self.frozen_mlp(mlp_in.flatten(0, 1)).unflatten(0, tokens.shape)
        return (residual + (replace_mlp_out(mlp_out) if replace_mlp_out else mlp_out)) @ self.embedding.T


class Batches:
    """A sized loader with a state, as the real one; batch i depends on i only."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches, self.next_batch = num_batches, 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        while self.next_batch < self.num_batches:
            self.next_batch += 1
            yield torch.randn(16, D_MODEL, generator=torch.Generator().manual_seed(self.next_batch))

    def state_dict(self) -> dict[str, int]:
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_batch = state["next_batch"]


class ToyData(lightning.LightningDataModule):
    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_batches = num_batches
        self.language_model = ToyLanguageModel()
        self.tokenizer: Any = None
        self.frozen_mlp = self.language_model.frozen_mlp
        self.val_tokens = torch.randint(VOCAB, (6, SEQ), generator=torch.Generator().manual_seed(4))

    def included(self, tokens: Tensor) -> Tensor:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        return mask

    def train_dataloader(self) -> Batches:
        return Batches(self.num_batches)


def make_module(total_steps: int, **jacobian: Any) -> JSAEModule:
    sae: dict[str, Any] = {"d_sae": D_SAE, "d_sae_output": None, "k": K, "k_output": None, "subtract_b_dec": False}
    sae |= {"mse_output_coef": 2.0, "auxk_coef": 0.0, "auxk_k": None, "dead_after_tokens": 100}
    penalty = {
        "penalty": "l1",
        "params": {},
        "coef": 0.5,
        "at": "input",
        "edges": "jacobian",
        "token_fraction": 1.0,
        "warmup_fraction": 0.5,
        "decay_fraction": 0.0,
    } | jacobian
    optim = {"lr": 1e-2, "betas": [0.9, 0.999], "warmup_fraction": 0.0, "decay_fraction": 0.0}
    return JSAEModule(d_model=D_MODEL, sae=sae, jacobian=penalty, optim=optim, total_steps=total_steps, seed=0)


def make_trainer(
    folder: Path, callbacks: list[Callback], steps: int = 5, accumulate: int = 1, **kwargs: Any
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=kwargs.pop("logger", [ResumableCSVLogger(folder / "csv"), ResumableTensorBoardLogger(folder / "tb")]),
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, Checkpointing) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, TrainingProgress) for callback in callbacks),
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **kwargs,
    )


def fit(folder: Path, callbacks: list[Callback], steps: int = 5, accumulate: int = 1, **kwargs: Any) -> Trainer:
    trainer = make_trainer(folder, callbacks, steps, accumulate, **kwargs)
    trainer.fit(make_module(steps), datamodule=ToyData(steps * accumulate))
    return trainer


def evaluation(every_n_steps: int | None = 2) -> InTrainingEvaluation:
    return InTrainingEvaluation(
        every_n_steps, batch_sequences=4, jacobian_tokens=20, num_sequences=None, exclude_first_position=False
    )


def checkpointing(
    folder: Path, every_n_steps: int | None = None, best_metric: str | None = None, best_mode: str = "min"
) -> Checkpointing:
    return Checkpointing(
        str(folder / "checkpoints"),
        every_minutes=None,
        every_n_steps=every_n_steps,
        best_metric=best_metric,
        best_mode=best_mode,
    )


def read_board(folder: Path) -> EventAccumulator:
    """All that is in the event files, duplicates included."""
    everything = {"scalars": 0, "images": 0, "histograms": 0}
    return EventAccumulator(str(folder / "tb"), size_guidance=everything, purge_orphaned_data=False).Reload()


def scalar_steps(folder: Path, tag: str) -> list[int]:
    """The steps of a tag in TensorBoard, which the CSV must agree with."""
    steps = [event.step for event in read_board(folder).Scalars(tag)]
    header, *lines = (line.split(",") for line in (folder / "csv" / "metrics.csv").read_text().splitlines())
    assert steps == [int(line[0]) for line in lines if line[header.index(tag)]]
    return steps


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step
