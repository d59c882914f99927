"""What is told of an SAE beside its weights, in every format, and how its tensors are made ready for a file."""

from collections.abc import Mapping
from dataclasses import dataclass
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
    sites: Sites | None
    """The names of the MLP's input and output, None where they are not known."""

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


def by_side(pair: SAEPair) -> dict[str, TopKSAE]:
    """Return the pair's SAEs by `SIDES`."""
    return dict(pair.named_saes())


def file_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as files take them: on the CPU, contiguous, each with memory of its own."""
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
