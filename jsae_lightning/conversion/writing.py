"""What is told of an SAE beside its weights, in every format, and how its tensors are made ready for a file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.conversion.sites import Sites
from jsae_lightning.sae import SAEPair, TopKSAE

SIDES = ("input", "output")


@dataclass(frozen=True)
class Origin:
    """Where a pair comes from."""

    config: dict[str, Any]
    """`config.json` of our export; its sections may be missing."""
    sites: Sites | None = None
    """The names of the MLP's input and output, None where they are not known."""
    context_length: int | None = None
    """Of sequences, where the data's settings leave it to the model."""
    prepends_bos: bool | None = None
    """Whether they begin with BOS."""

    @property
    def model(self) -> dict[str, Any]:
        """The language model: name, revision, layer."""
        return self.config.get("model") or {}

    @property
    def data(self) -> dict[str, Any]:
        """The settings of the data that it was trained on."""
        return self.config.get("data") or {}

    def hook_name(self, side: str) -> str | None:
        """Return the name of the module whose output the SAE of a side reconstructs."""
        if self.sites is None:
            return None
        return self.sites.mlp_in if side == "input" else self.sites.mlp_out


def notes(side: str | None, origin: Origin) -> dict[str, Any]:
    """Return what a format has no place for, to be written under `reading.NOTES` and read back."""
    model, jacobian = origin.model, origin.config.get("jacobian")
    return {
        "mlp_side": side,
        "model_name": model.get("name"),
        "revision": model.get("revision"),
        "dtype": model.get("dtype"),
        "layer": model.get("layer"),
        "random_weights": model.get("random_weights", False),
        "jacobian": jacobian,
    }


def write_files(folder: Path, config: tuple[str, dict[str, Any]], save: Callable[[Path], None], weights: str) -> None:
    """Write an SAE's configuration (name and content) and, by `save`, its weights, with the permissions of any file."""
    folder.mkdir(parents=True, exist_ok=True)
    name, content = config
    (folder / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    save(folder / weights)
    (folder / weights).chmod((folder / name).stat().st_mode & 0o777)  # safetensors' own are the owner's alone


def by_side(pair: SAEPair) -> dict[str, TopKSAE]:
    """Return the pair's SAEs by `SIDES`."""
    return dict(pair.named_saes())


def file_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as files take them: on the CPU, contiguous, each with memory of its own."""
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
