"""What an evaluation works on: pair, language model and held-out tokens, loaded by the path of training."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from jsae_lightning import kernels
from jsae_lightning.architecture import read_architecture
from jsae_lightning.building import quiet_libraries
from jsae_lightning.checkpoint import check_mlp_hash, in_one_precision, load_pair
from jsae_lightning.config import model_arguments
from jsae_lightning.data import ActivationDataModule
from jsae_lightning.distributed import rank_and_world_size
from jsae_lightning.errors import UserError
from jsae_lightning.evaluate_config import data_settings, held_out_as_in_training, held_out_sequences
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jacobians import EdgePenalty, edge_penalty
from jsae_lightning.penalties import make_penalty
from jsae_lightning.sequence_maker import MAX_CONTEXT_LENGTH

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What an evaluation works on, loaded by the path of training."""

    held_out: HeldOut
    penalty: EdgePenalty
    device: torch.device
    remark: str | None


def prepare_held_out(cfg: DictConfig, export: Path, pair_config: dict[str, Any]) -> Prepared:
    """Load tokens, language model and pair on this rank's device, by the path of training."""
    quiet_libraries()
    rank, world_size = rank_and_world_size()
    device = choose_device(cfg.device)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    kernels.select_kernels(cfg.kernels)
    model = model_arguments(cfg)
    architecture = read_architecture(model["name_or_path"], revision=model["revision"], synthetic=model["synthetic"])
    model_length = min(architecture.context_length, MAX_CONTEXT_LENGTH)
    sequences, remark = held_out_sequences(cfg, pair_config, model_length)
    data = ActivationDataModule(
        model=model_arguments(cfg),
        data=data_settings(cfg) | {"val_sequences": sequences},
        seed=cfg.seed,
        num_batches=1,
        micro_batches=1,
        device=device,
        trained_with=held_out_as_in_training(cfg, pair_config),
    )
    if rank == 0:
        data.prepare_data()
    if world_size > 1:
        dist.barrier()
    data.setup()
    check_mlp_hash(data.frozen_mlp, pair_config["model"])
    pair, mlp = in_one_precision(load_pair(export, device=device), data.frozen_mlp)
    if len(data.val_tokens) < sequences and remark is not None:
        remark = f"{remark}, or rather {len(data.val_tokens)}, as it held out whole rows"
    elif len(data.val_tokens) < sequences and cfg.eval.tokens is not None:
        remark = (
            f"eval.tokens: {int(cfg.eval.tokens):,} asked for, but only {data.val_tokens.numel():,} are held out: "
            "all of them are used"
        )
    if remark is not None and rank == 0:
        log.warning(remark)
    log.info(
        "%s: judging %s tokens of %d held-out sequences",
        data.where,
        f"{data.val_tokens.numel():,}",
        len(data.val_tokens),
    )
    included = data.included(data.val_tokens).clone()
    if cfg.eval.exclude_first_position:
        included[:, 0] = False
    trained = pair_config["jacobian"]
    held_out = HeldOut(
        pair=pair,
        mlp=mlp,
        language_model=data.language_model,
        tokens=data.val_tokens,
        included=included,
        document=data.val_documents(),
        at=trained["at"],
        batch_sequences=cfg.eval.batch_sequences,
        seed=cfg.seed,
        tokenizer=data.tokenizer,
    )
    penalty = make_penalty(trained["penalty"], **trained["params"])
    # Exports of versions that knew no other edges do not say which they penalised.
    return Prepared(held_out, edge_penalty(penalty, trained.get("edges", "jacobian")), device, remark)


def choose_device(name: str) -> torch.device:
    """Return this rank's device for `auto`, `cpu` or `cuda`.

    Raises UserError if there is no such device, or if there are more ranks than GPUs on this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no CUDA device: use device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    has_its_own = gpus == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if has_its_own:  # given to this process alone
        return torch.device("cuda", 0)
    if ranks > gpus:  # which nccl would refuse in words of its own
        raise UserError(f"device: {ranks} processes, but torch sees {gpus} GPU(s): start at most {gpus} of them")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
