"""Where a language model's files are: a local folder, the local cache of the Hugging Face hub, or the hub itself.

A local folder never needs the network, and nor does a hub name whose files are in the cache. Only missing files are
asked for, after one short probe: without it, a hub out of reach costs 20 to 30 seconds of retries for each file.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from jsae_lightning import tiny_lm
from jsae_lightning.errors import UserError

Part = Literal["config", "weights", "tokenizer"]
"""What is asked of a model's folder; every part includes `config.json`."""

PROBE_TIMEOUT = 8.0
"""Seconds that one answer of the hub may take."""
PROBE_LIMIT = 20.0
"""Seconds that the probe may take in all, name resolution included (which no HTTP timeout covers)."""

_WAITING = "waiting for an answer"
_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_TOKENIZER_MAIN = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def model_folder(name_or_path: str, *, revision: str | None = None, part: Part = "config") -> Path:
    """Return a local folder that holds `part` of a model, downloading it if it is neither local nor in the cache.

    `name_or_path` is a folder or a hub name such as "EleutherAI/pythia-70m". A complete copy in the cache is used
    as it is: a branch that moved on the hub since is not noticed (give a commit as `revision` to choose one).
    Raises UserError for a missing folder, missing files, and every failure of the hub.
    """
    folder = _local_folder(name_or_path, revision)
    if folder is None:
        folder = _cached_folder(name_or_path, revision)
        if folder is None or _missing(folder, part):
            folder = _download(name_or_path, revision, part)
    missing = _missing(folder, part)
    if missing:
        raise UserError(f"model: {name_or_path} has no {missing}: give a complete Hugging Face model")
    return folder


def _local_folder(name_or_path: str, revision: str | None) -> Path | None:
    """Return the folder that the name stands for, None if it reads as a hub name."""
    path = tiny_lm.WEIGHTS if name_or_path == tiny_lm.NAME else Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision: {revision!r}, but {name_or_path} is a local folder, which has no revisions: remove it"
            )
        return path
    if name_or_path and path.exists():
        raise UserError(f"model.path: {name_or_path} is a file: give the folder with config.json and the weights")
    if not name_or_path or name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"model.path: the folder {name_or_path!r} does not exist: give a Hugging Face model's folder")
    return None


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the weight files among a model's file names: safetensors if there are any, else pickled ones."""
    names = list(names)
    for main in (_SAFETENSORS, _PICKLED):
        stem, suffix = main.split(".")
        found = [
            name
            for name in names
            if name in (main, f"{main}.index.json") or (name.startswith(f"{stem}-") and name.endswith(f".{suffix}"))
        ]
        if main in found or f"{main}.index.json" in found:
            return sorted(found)
    return []


def _tokenizer_files(names: Iterable[str]) -> list[str]:
    """Return the files that may belong to the tokenizer, the main ones last, so that those stand for the rest."""
    found = [name for name in names if "/" not in name and name.endswith(_TOKENIZER_SUFFIXES)]
    found = [name for name in found if not name.endswith(".index.json")]
    return sorted(found, key=lambda name: (name in _TOKENIZER_MAIN, name))


def _missing(folder: Path, part: Part) -> str | None:
    """Return what `folder` lacks of `part`, in words, or None."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if "config.json" not in names:
        return "config.json"
    if part == "tokenizer":
        found = [name for name in names if name in _TOKENIZER_MAIN or name.endswith(".tiktoken")]
        return None if found else f"tokenizer ({', '.join(_TOKENIZER_MAIN)})"
    if part == "weights":
        weights = weight_files(names)
        if not weights:
            return f"weights ({_SAFETENSORS}, or shards with {_SAFETENSORS}.index.json)"
        absent = [shard for index in weights if index.endswith(".index.json") for shard in _shards(folder / index)]
        absent = sorted({shard for shard in absent if shard not in names})
        return f"{absent[0]}, which the index of its weights names" if absent else None
    return None


def _shards(index: Path) -> list[str]:
    """Return the file names in an index of sharded weights."""
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model: {index} is not an index of weights ({error}): copy it again") from error


def check_safetensors(folder: Path) -> None:
    """Raise UserError, with the file's name, if a safetensors file in `folder` is corrupt or truncated.

    Reads only the headers, which say how long each file has to be.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model: {file} is corrupt or truncated ({first_line(error)}): copy it again") from error


def first_line(error: BaseException | None) -> str:
    """Return an exception's type and the first line of its message, for messages of one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the snapshot of `name` in the local cache, None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise UserError(
            f"model.name: {name!r} is neither a local folder nor a possible name on the Hugging Face hub: "
            "give a folder, or a name such as EleutherAI/pythia-70m"
        ) from error
    return Path(config).parent if isinstance(config, str) else None


def _download(name: str, revision: str | None, part: Part) -> Path:
    """Download `part` into the cache and return the snapshot's folder."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def probe() -> tuple[Path, list[str]]:
        # The first call tries once only: it finds out within PROBE_TIMEOUT whether there is a hub to talk to.
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=PROBE_TIMEOUT)
        config = Path(hf_hub_download(name, "config.json", revision=revision, etag_timeout=PROBE_TIMEOUT))
        commit = config.parent.name
        return config.parent, [] if part == "config" else HfApi().list_repo_files(name, revision=commit)

    try:
        folder, names = within(PROBE_LIMIT, probe)
        # All files of one commit, whatever happens to the branch meanwhile.
        for file in (weight_files if part == "weights" else _tokenizer_files)(names):
            hf_hub_download(name, file, revision=folder.name)
    except Exception as error:
        raise _hub_error(name, revision, error) from error
    return folder


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return `function()`, or raise TimeoutError after `seconds`; the abandoned thread ends with the process."""
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True, name=_WAITING).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer


def is_waiting() -> bool:
    """Say whether a function that `within` gave up is running still."""
    return any(thread.name == _WAITING for thread in threading.enumerate())


def _hub_error(name: str, revision: str | None, error: Exception) -> UserError:
    """Return the message that tells a failure of the hub, and what to do about it."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(
            f"model.name: {name!r} is neither a local folder nor complete in the local cache, and HF_HUB_OFFLINE "
            "forbids to fetch it: unset it, or give a local folder"
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return UserError(
            f"model.name: {name} is gated, and the hub refuses it (HTTP {status}): accept its licence at "
            f"{constants.ENDPOINT}/{name} and {log_in}"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return UserError(
            f"model.name: {name!r} is neither a local folder nor a model that {constants.ENDPOINT} shows "
            f"(HTTP {status}): check the spelling; if it is private, {log_in}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"model.revision: {name} has no revision {revision!r}: give one of {constants.ENDPOINT}/{name}/tree/main"
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return UserError(f"model.name: {name} has no config.json: give a model in the format of transformers")
    reason = f"HTTP {status}" if status else first_line(error)
    return UserError(
        f"model.name: {name!r} is neither a local folder nor complete in the local cache, and {constants.ENDPOINT} "
        f"could not give it ({reason}): check the network and try again, or give a local folder"
    )
