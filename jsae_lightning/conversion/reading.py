"""What all formats are checked for: JSON, tensors by name and shape, and the TopK SAE that they make."""

import functools
import json
import math
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jsae_lightning.errors import UserError
from jsae_lightning.exported_pairs import DTYPES
from jsae_lightning.model_files import first_line
from jsae_lightning.sae import TopKSAE

NOTES = "jsae_lightning"
"""The key of a configuration under which there is what its format has no place for."""

_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Foreign:
    """What a folder of another project holds."""

    saes: tuple[TopKSAE, ...]
    """One, or those of an MLP's input and output."""
    about: dict[str, Any]
    """What its configuration tells: `format`, and perhaps `model_name`, `layer`, `hook_name`, ..."""
    mlp: dict[str, Tensor] = field(default_factory=dict)
    """A copy of the language model's MLP, by the names of `FrozenMLP`, if there is one."""
    remarks: tuple[str, ...] = ()
    """What a user should know of."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; UserError where the file is missing or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file: give the folder of an SAE, whole") from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise UserError(f"{path}: is no valid JSON ({first_line(error)}): copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no JSON object: copy it again")
    return found


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors of a safetensors file, without reading them; UserError as `read_safetensors`."""
    return _from_safetensors(path, lambda file: set(file.keys()))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; UserError where it is missing, truncated or none."""
    return _from_safetensors(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _from_safetensors(path: Path, get: Callable[[Any], Any]) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: there is no such file: give the folder of an SAE, whole")
    try:
        with safe_open(path, framework="pt") as file:
            return get(file)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({first_line(error)}): copy it again") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict, which is not executed; UserError where it is anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file: give the folder of an SAE, whole") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: is no plain state dict and is not executed: save the state dict alone") from error
    except Exception as error:  # of damaged bytes, almost any
        raise UserError(f"{path}: truncated or no file of torch's ({first_line(error)}): copy it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        keys = f", keys {', '.join(sorted(map(str, found)))[:60]}" if isinstance(found, dict) else ""
        raise UserError(f"{path}: is no state dict ({type(found).__name__}{keys}): give a finished SAE's, no backup")
    return found


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()
) -> None:
    """Raise UserError unless `tensors` are those of `shapes`, finite and floating-point; `ignored` may be there too."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing: this is no SAE of that kind, or a damaged one")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, its configuration says {list(shape)}: the "
                "files do not belong together"
            )
        is_known = str(tensor.dtype).removeprefix("torch.") in DTYPES
        if not is_known or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(
                f"{path}: tensor {name} is {tensor.dtype} ({tensor.layout}, {tensor.device}), no dense one of float16, "
                "bfloat16, float32 or float64: convert it first"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} has NaN or infinite values: the SAE is damaged")
    if unknown := set(map(str, tensors)) - set(shapes) - set(ignored):
        raise UserError(f"{path}: unknown tensor {min(unknown)}: this is another kind of SAE, only TopK is supported")


def whole_number(path: Path, config: Mapping[str, Any], key: str, where: str = "") -> int:
    """Return `config[key]`, at least 1; `where` is what stands before the key in messages."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {where}{key}: {value!r} is no whole number above 0: the configuration is damaged")
    return value


def optional(path: Path, config: Mapping[str, Any], key: str, *types: type, where: str = "") -> Any:
    """Return `config[key]`, None if it is null or not there; UserError where it is of no other of `types`."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or _is_endless(value):
        names = " or ".join(kind.__name__ for kind in types)
        raise UserError(f"{path}: {where}{key}: {value!r} is no {names}: the configuration is damaged")
    return value


def _is_endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return true or false; `default` if it is null or not there."""
    value = optional(path, config, key, bool)
    return default if value is None else value


def own_notes(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `writing.notes` left in a configuration that was written here, checked; empty for others."""
    notes = optional(path, config, NOTES, dict) or {}
    types = {
        "mlp_side": (str,), "model_name": (str,), "revision": (str,), "dtype": (str,), "layer": (int,),
        "random_weights": (bool, str), "jacobian": (dict,),
    }  # fmt: skip
    found = {key: optional(path, notes, key, *kinds, where=f"{NOTES}.") for key, kinds in types.items()}
    for key, kinds in {"coef": (int, float), "penalty": (str,), "at": (str,), "params": (dict,)}.items():
        optional(path, found["jacobian"] or {}, key, *kinds, where=f"{NOTES}.jacobian.")
    for key, allowed in {"mlp_side": ("input", "output"), "dtype": DTYPES}.items():
        if found[key] is not None and found[key] not in allowed:
            raise UserError(f"{path}: {NOTES}.{key}: {found[key]!r} is none of {', '.join(allowed)}: correct it")
    return {key: value for key, value in found.items() if value is not None}


def layer_of(name: Any) -> int | None:
    """Return the layer that the name of a module or hook tells, `blocks.3.hook_mlp_out` or `layers.3.mlp`."""
    found = re.search(r"\.(\d+)(?:\.|$)", str(name))
    return int(found[1]) if found else None


def told(**facts: Any) -> dict[str, Any]:
    """Return the facts that are known."""
    return {key: value for key, value in facts.items() if value is not None}


def demand(
    path: Path, config: Mapping[str, Any], key: str, default: Any, allowed: Collection[Any], remedy: str
) -> None:
    """Raise UserError unless `config[key]`, or else `default`, is among `allowed`."""
    if (value := config.get(key, default)) not in allowed:
        raise UserError(f"{path}: {key} is {value!r}: {remedy}")


def make_sae(
    path: Path, *, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, subtract_b_dec: bool
) -> TopKSAE:
    """Return the TopK SAE of these tensors, in the widest of their dtypes, without a copy where they are contiguous."""
    d_model, d_sae = W_enc.shape
    if k > d_sae:
        raise UserError(f"{path}: k is {k}, more than its {d_sae} latents: the configuration is damaged")
    with torch.device("meta"):
        sae = TopKSAE(d_model, d_sae, k, subtract_b_dec=subtract_b_dec)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values()])
    sae.load_state_dict({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, assign=True)
    return sae


def norm_remarks(sae: TopKSAE, where: str) -> tuple[str, ...]:
    """Say so where the decoder's rows have not norm 1, which the scale of the Jacobian rests on."""
    with torch.no_grad():
        norms = sae.W_dec.float().norm(dim=1)
    low, high = float(norms.min()), float(norms.max())
    if max(abs(low - 1), abs(high - 1)) <= max(_NORM_TOLERANCE, 2 * torch.finfo(sae.W_dec.dtype).eps):
        return ()
    return (
        f"{where}: the decoder's rows have norms from {low:.3g} to {high:.3g}, not 1: they are kept, as TopK would "
        "choose others, but the Jacobian's scale depends on them",
    )
