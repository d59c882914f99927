"""Saving and loading: the exported pair (safetensors, no pickle) and the training checkpoint."""

import copy
import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jsae_lightning.atomic_files import atomic_file, atomic_folder
from jsae_lightning.errors import UserError
from jsae_lightning.exported_pairs import DTYPES, FORMAT_VERSION, SAES, check_section, find_export, read_pair_config
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.model_card import model_card
from jsae_lightning.sae import SAEPair, TopKSAE
from jsae_lightning.torch_devices import usable_device

if TYPE_CHECKING:
    from jsae_lightning.language_model import LanguageModel

_SAE_KEYS = ("d_model", "d_sae", "k", "subtract_b_dec")
_EXPORT_FILES = ("README.md", "config.json", "model.safetensors")


def save_pair(pair: SAEPair, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> Path:
    """Write `model.safetensors`, `config.json` and `README.md` (a model card) to `folder`, all or nothing.

    `metadata` is JSON: the language model, the MLP's hash, the penalty, tokens seen; what it says of the sizes of the
    SAEs, which are the pair's own, does not count. Returns the folder. An export that is there already is replaced;
    what else lies in its folder stays (the new files are then renamed one after the other).

    Raises:
        UserError: `folder` is a file, or holds files and no exported pair.
    """
    from safetensors.torch import save_file

    folder = Path(folder).expanduser()
    config = {
        **(metadata or {}),
        "format_version": FORMAT_VERSION,
        **{
            f"{name}_sae": {
                "d_model": sae.d_model,
                "d_sae": sae.d_sae,
                "k": sae.k,
                "subtract_b_dec": sae.subtract_b_dec,
            }
            for name, sae in pair.named_saes()
        },
    }
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in pair.state_dict().items()}
    with _export_files(folder.resolve()) as files:
        save_file(tensors, files["model.safetensors"])
        files["config.json"].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files["model.safetensors"].chmod(files["config.json"].stat().st_mode & 0o777)  # else the owner's alone
        files["README.md"].write_text(model_card(config), encoding="utf-8")
    return folder


@contextmanager
def _export_files(folder: Path) -> Iterator[dict[str, Path]]:
    """Yield where to write an export's files, by name: they take their places at the end, together, or not at all."""
    if not _holds_other_files(folder):
        with atomic_folder(folder) as temporary:
            yield {name: temporary / name for name in _EXPORT_FILES}
        return
    with ExitStack() as stack:  # left in reverse order: the weights wait for the disk first, the small files follow
        yield {name: stack.enter_context(atomic_file(folder / name)) for name in _EXPORT_FILES}


def _holds_other_files(folder: Path) -> bool:
    """Return whether an exported pair's folder holds more than the pair; UserError for a folder of something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file: give a new folder for the pair, or that of an exported one")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = found - set(_EXPORT_FILES)
    if others and not found >= {"config.json", "model.safetensors"}:
        raise UserError(
            f"{folder}: holds other files, such as {min(others)}, and no exported pair: give a new folder for the pair"
        )
    return bool(others)


def load_pair(folder: str | Path, *, device: str | torch.device = "cpu") -> SAEPair:
    """Read a folder written by `save_pair`.

    Raises UserError naming the file and key for anything missing, truncated, misshapen, NaN or infinite, and for a
    device that is not there.
    """
    folder, device = Path(folder).expanduser(), usable_device(device)
    config = read_pair_config(folder)
    with torch.device("meta"):  # no memory before the file has shown to have these sizes
        pair = SAEPair.of(*(TopKSAE(**{key: config[name][key] for key in _SAE_KEYS}) for name in SAES))
    tensors = _read_safetensors(folder / "model.safetensors")
    _check_tensors(folder / "model.safetensors", tensors, pair.state_dict())
    dtype = tensors["input_sae.W_dec"].dtype
    pair.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return pair.to(device)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: there is no such file: the export is incomplete, export the pair again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}): export the pair again") from error


def _check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing: export the pair again")
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(found[name].shape)}, config.json says "
                f"{list(tensor.shape)}: export again"
            )
        if str(found[name].dtype).removeprefix("torch.") not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} is {found[name].dtype}, none of {', '.join(DTYPES)}: export the pair again"
            )
        if not torch.isfinite(found[name]).all():
            raise UserError(f"{path}: tensor {name} has NaN or infinite values: export an earlier checkpoint")
    if unknown := set(found) - set(expected):
        raise UserError(f"{path}: unknown tensor {min(unknown)}: this is no export of a pair")


@dataclass(frozen=True)
class Run:
    """A finished or stopped run, ready to be studied."""

    pair: SAEPair
    mlp: FrozenMLP
    config: dict[str, Any]
    """`config.json` of the export: model, layer, hashes, penalty, tokens seen."""
    folder: Path
    model: str
    """Where the language model is: its name or folder of training, or the one that `load_run` was given."""

    def language_model(self, *, device: str | torch.device = "cpu") -> "LanguageModel":
        """Load the language model that the pair was trained on, hooked at its layer."""
        from jsae_lightning.language_model import LanguageModel

        return LanguageModel.load(self.model, device=device, **_model_arguments(self.config["model"], self.model))

    def tokenizer(self) -> Any:
        """Load the language model's tokenizer; a synthetic model has none."""
        from jsae_lightning.language_model import load_tokenizer

        return load_tokenizer(self.model, revision=_model_arguments(self.config["model"], self.model)["revision"])


def load_run(folder: str | Path, *, model: str | Path | None = None, device: str | torch.device = "cpu") -> Run:
    """Load the pair of a run or export folder together with the MLP that it was trained on.

    The MLP is loaded by the same path as in training, from the language model's name or folder of then; `model` is
    where that language model is now, if it is elsewhere.

    Raises:
        UserError: there is no whole export in `folder`, the language model is not found, or the hash of its MLP's
            weights is not that of training.
    """
    folder, device = Path(folder).expanduser(), usable_device(device)
    export = find_export(folder)
    config = read_pair_config(export)
    trained_on = check_section(export, config, "model")
    if model is not None and trained_on.get("synthetic"):
        raise UserError(f"model: {model}, but the model of this pair is made and not loaded: leave it out")
    name = trained_on["name"] if model is None else _place(model)
    if model is None and Path(name).is_absolute() and not Path(name).exists():
        raise UserError(
            f"{export / 'config.json'}: model.name: there is no {name} here: say where that language model is now, "
            "load_run(..., model=DIR)"
        )
    mlp = FrozenMLP.from_pretrained(name, **_model_arguments(trained_on, name))
    check_mlp_hash(mlp, trained_on | {"name": name})
    return Run(*in_one_precision(load_pair(export, device=device), mlp.to(device)), config, folder, name)


def _place(model: str | Path) -> str:
    """Return a folder's absolute path, a hub name as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(model)


def _model_arguments(trained_on: dict[str, Any], name: str) -> dict[str, Any]:
    """Return how the language model of `config.json` is loaded from `name`; a local folder has no revisions."""
    return {
        "layer": trained_on["layer"],
        "revision": None if Path(name).expanduser().is_dir() else trained_on["revision"],
        "dtype": trained_on["dtype"],
        "random_weights": trained_on["random_weights"],
        "seed": trained_on["random_seed"],
        "synthetic": trained_on.get("synthetic"),  # absent from exports of versions that had none
    }


def in_one_precision(pair: SAEPair, mlp: FrozenMLP) -> tuple[SAEPair, FrozenMLP]:
    """Return pair and MLP in the pair's precision, as in training, but at least in float32.

    Pairs are float64 after `trainer.precision=64-true`, and less than float32 where somebody has rounded them. The MLP
    is copied if it has to change: the language model may share its weights.
    """
    pair = pair.to(torch.promote_types(pair.input_sae.W_dec.dtype, torch.float32))
    dtype = pair.input_sae.W_dec.dtype
    return pair, mlp if mlp.W_in.dtype == dtype else copy.deepcopy(mlp).to(dtype)


def check_mlp_hash(mlp: FrozenMLP, model: dict[str, Any]) -> None:
    """Raise UserError if these are not the weights that the pair was trained on; `model` is that of `config.json`."""
    if (found := mlp.weights_hash()) != model["mlp_hash"]:
        raise UserError(
            f"{model['name']}: the MLP's weights (hash {found[:12]}) are not those that the pair was trained on "
            f"({model['mlp_hash'][:12]}): use the same model and revision"
        )


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a training checkpoint so that `path` holds the old one or the new one, whole, at any moment."""
    with atomic_file(path) as temporary:
        torch.save(checkpoint, temporary)


def read_checkpoint(path: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a training checkpoint with `weights_only=True`; raise UserError if it is damaged or needs more than that."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"ckpt_path: there is no file '{path}': give a checkpoint, auto or null") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: is no plain checkpoint of tensors and is not executed: give one written by jsae-train"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, KeyError) as error:
        raise UserError(
            f"{path}: truncated or not a checkpoint ({str(error).splitlines()[0]}): give another, "
            "or remove it to start afresh"
        ) from error


def recount_micro_batches(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Let Lightning's count of a checkpoint's micro-batches be `global_step * micro_batches`, in place.

    Lightning ends a step when its count divides by `accumulate_grad_batches`, and training when the count reaches the
    loader's length: a run that goes on with another number of micro-batches a step needs the count that it would have.
    """
    for progress in ("total", "current"):
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][progress]
        shift = checkpoint["global_step"] * micro_batches - counts["ready"]
        counts.update({name: count + shift for name, count in counts.items()})
