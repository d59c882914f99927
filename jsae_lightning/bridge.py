"""A transformers model inside a TransformerBridge: hooks around norms and MLPs, attention left alone.

The standard bridge re-implements attention in Python, at about half of transformers' speed on long sequences. Leaving
`attn` out of the mapping keeps transformers' own (scaled-dot-product where the architecture allows it) and its exact
logits. That leans on the bridge's internals, so both are checked against the bare model, and the standard
bridge is the fallback.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.model_files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where transformers' configurations keep the name of the MLP's activation function, the most specific first.
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function", "activation", "afn")


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative difference that rounding alone may make between two ways to compute one tensor.

    1e-4 from float32 on, where about 1e-6 is usual. In bfloat16 and float16 the model rounds its hidden activations to
    8 and 11 bits while `FrozenMLP` keeps float32: 8 units in the last place, where 1 to 2 are usual. A formula that
    differs by less (erf against tanh GELU) then differs by less than the model's own rounding.
    """
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest norm of a difference over the norm of the expected vector; NaN if anything is NaN."""
    found, expected = found.float().flatten(0, -2), expected.float().flatten(0, -2)
    scale = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((found - expected).norm(dim=-1) / scale).max())


def wrap(make_model: Callable[[], "PreTrainedModel"], tokens: Tensor) -> Any:
    """Return a TransformerBridge around `make_model()`, frozen and in evaluation mode, that gives the model's logits.

    `make_model` is called again for the fallback, as wrapping changes a model in place; `tokens` (batch, seq) are what
    the logits are compared on. Raises UserError if the model's logits are not finite, or if neither bridge can be built
    and gives them.
    """
    failure: Exception | None = None
    for keep_attention in (True, False):
        model = make_model()
        try:
            return _wrap_and_compare(model, tokens, keep_attention=keep_attention)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            failure = error
            del model
    raise UserError(f"model: TransformerLens cannot hook it ({first_line(failure)}): choose another model") from failure


@torch.no_grad()
def _wrap_and_compare(model: "PreTrainedModel", tokens: Tensor, *, keep_attention: bool) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    expected = model(tokens, use_cache=False).logits
    if not expected.isfinite().all():
        raise UserError(
            f"model: its logits are not finite in {str(model.dtype).removeprefix('torch.')}: the weights are damaged, "
            "or model.dtype is too narrow for them (try float32)"
        )
    bridge = build_bridge_from_module(
        model,
        type(model).__name__,
        hf_config=model.config,
        model_name=str(model.config.model_type),
        post_adapter_hook=_leave_attention if keep_attention else None,
    )
    bridge.requires_grad_(False)
    bridge.eval()
    error = relative_error(bridge(tokens, return_type="logits", use_cache=False), expected)
    if not error <= tolerance(model.dtype):
        raise RuntimeError(f"the hooked model's logits differ from the model's own by a relative error of {error:.1e}")
    return bridge


def _leave_attention(adapter: Any) -> None:
    """Take attention out of an adapter's mapping, with the aliases that point into it."""
    block = adapter.component_mapping["blocks"]
    block.submodules.pop("attn", None)
    block.hook_aliases = {name: site for name, site in block.hook_aliases.items() if not str(site).startswith("attn.")}


def extract_mlp(bridge: Any, layer: int) -> FrozenMLP:
    """Copy the MLP of `layer` out of a bridge. Raises UserError for a mixture of experts or an unknown activation."""
    mlp = getattr(bridge.blocks[layer], "mlp", None)
    W_in, W_out = getattr(mlp, "W_in", None), getattr(mlp, "W_out", None)
    if W_in is None or W_out is None:
        raise UserError(
            f"model.layer: layer {layer} of this {bridge.original_model.config.model_type} has no single dense MLP "
            f"({type(mlp).__name__}): mixtures of experts and other blocks are not supported, choose another model"
        )
    return FrozenMLP(
        W_in,
        W_out,
        activation=_activation_name(bridge),
        b_in=getattr(mlp, "b_in", None),
        b_out=getattr(mlp, "b_out", None),
        W_gate=getattr(mlp, "W_gate", None),
        b_gate=getattr(mlp, "b_gate", None),
    )


def _activation_name(bridge: Any) -> str:
    """Return the configured name, which the check of the MLP against the model confirms or refutes."""
    config = bridge.original_model.config.get_text_config()
    names = (getattr(config, key, None) for key in _ACTIVATION_KEYS)
    return next((name for name in names if isinstance(name, str)), str(bridge.cfg.act_fn))


@torch.no_grad()
def check_mlp(bridge: Any, layer: int, mlp: FrozenMLP, tokens: Tensor) -> float:
    """Return the relative error of `mlp` against the model's own MLP on `tokens`.

    Raises UserError if it is above `tolerance` of the model's dtype.
    """
    captured: dict[str, Tensor] = {}

    def capture(tensor: Tensor, hook: Any) -> None:
        captured[hook.name.rsplit(".", 1)[-1]] = tensor.detach().clone().flatten(0, -2)

    sites = [f"blocks.{layer}.mlp.{end}" for end in ("hook_in", "hook_out")]
    bridge.run_with_hooks(tokens, fwd_hooks=[(site, capture) for site in sites], return_type=None, use_cache=False)
    error = relative_error(mlp(captured["hook_in"].float()), captured["hook_out"])
    dtype = captured["hook_out"].dtype
    if not error <= tolerance(dtype):
        raise UserError(
            f"model.layer: the {mlp.kind} MLP formula with {mlp.activation} does not reproduce layer {layer} of this "
            f"{bridge.original_model.config.model_type}: relative error {error:.1e}, allowed {tolerance(dtype):.1e} "
            "in its dtype: this architecture is not supported, choose another model"
        )
    return error
