"""Which of a transformers model's modules give an MLP's input and output, by name.

SAELens, sparsify and dictionary_learning all find activations by names of modules, whose outputs they take.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from jsae_lightning.architecture import load_config


class Sites(NamedTuple):
    """Names in transformers' model: `gpt_neox.layers.3.post_attention_layernorm`, `gpt_neox.layers.3.mlp`."""

    mlp_in: str
    """The module whose output enters the MLP."""
    mlp_out: str
    """The MLP."""
    base: str
    """The prefix of the model without its head, `gpt_neox`."""

    def without_head(self, name: str) -> str:
        """Return the name inside the model without its head."""
        return name.removeprefix(f"{self.base}.")


@torch.no_grad()
def find_sites(folder: Path, name: str, layer: int) -> Sites | None:
    """Return the names for `layer` of the model in `folder`, None where no module's output is found to enter its MLP.

    The model is made from its configuration without weights, and run on two tokens that hold no numbers.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(folder, name), trust_remote_code=False).eval()
    mlps = [path for path, _ in model.named_modules() if path.endswith(f".{layer}.mlp")]
    if len(mlps) != 1:
        return None
    outputs: list[tuple[str, Any]] = []
    entered: list[Any] = []
    handles = [model.get_submodule(mlps[0]).register_forward_pre_hook(lambda _, given: entered.append(given[0]))]
    for path, module in model.named_modules():
        hook = lambda _, __, output, path=path: outputs.append((path, output))  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    try:
        tokens, mask = torch.zeros(1, 2, dtype=torch.int64, device="meta"), torch.zeros(1, 1, 2, 2, device="meta")
        model(tokens, attention_mask=mask, use_cache=False)  # a mask of four dimensions is used as it is, unread
    except Exception:  # of architectures that look into their tensors; the MLP may have been reached before
        pass
    finally:
        for handle in handles:
            handle.remove()
    before = [path for path, output in outputs if entered and output is entered[0]]
    return Sites(before[-1], mlps[0], model.base_model_prefix) if before else None
