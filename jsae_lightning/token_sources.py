"""Where the text or the tokens come from: the rows of each source, and which of them nobody trains on.

A row is one document (a text) or a list of token ids. Sources: `stdlib`, `synthetic` and `text` are held in memory;
`jsonl`, `parquet`, `arrow` and `hub` go through the `datasets` library, as a table (random access) or as a stream.
Importing this module loads neither torch nor `datasets`.
"""

import contextlib
import dataclasses
import glob
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsae_lightning.config_schema import DataConfig
from jsae_lightning.dataset_columns import find_column
from jsae_lightning.errors import RunError, UserError
from jsae_lightning.model_files import first_line, within
from jsae_lightning.persistence import Patience, persist
from jsae_lightning.stream_errors import DamagedShardError, is_passing_status
from jsae_lightning.stream_reader import StreamReader
from jsae_lightning.tiny_lm import corpus

NUM_HEAD_ROWS = 64
"""Rows that are looked at before anything else is decided about a table or a stream."""
BATCH_ROWS = 32
"""Rows of a stream that are read at once, and again if reading them fails."""
HUB_TIMEOUT_S = 20.0
_SUFFIXES = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
_BUILDERS = {"jsonl": "json", "parquet": "parquet", "arrow": "arrow"}


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    `data` is a list of texts, a `datasets.Dataset` or a `datasets.IterableDataset`; `column` names the column that
    holds the text or the token ids (unused for a list); `where` says in messages what was read; `head` holds the
    values of the first rows, at most NUM_HEAD_ROWS (none for a list); `patience` says how long a stream that breaks is
    tried.
    """

    data: Any
    where: str
    column: str = ""
    holds_tokens: bool = False
    head: tuple[Any, ...] = ()
    patience: Patience = Patience()

    def reader(self, state: dict[str, Any] | None = None) -> StreamReader:
        """Read the dataset's rows from a position on (None: the beginning)."""
        return StreamReader(self.data, self.patience, self.where, state)

    def values(self) -> Iterator[Any]:
        """Yield the text or the token ids of each row in order."""
        reader = self.reader()
        while batch := reader.read(BATCH_ROWS):
            yield from map(self.value, batch)

    def value(self, row: Any) -> Any:
        """The text or the token ids of a row; empty for null."""
        value = row[self.column] if self.column else row
        return value if value is not None else ([] if self.holds_tokens else "")


@dataclass(frozen=True)
class Source:
    """A token source: rows to train on and, where the source itself has them, rows to hold out.

    `val` is None where the held-out rows are to be taken out of `train`. `kind` is how rows are reached: `memory`
    (a list), `table` (random access on disk) or `stream` (in order).
    """

    kind: Literal["memory", "table", "stream"]
    train: Rows
    val: Rows | None


def document_digest(document: Any) -> bytes:
    """sha256 of a document: of the UTF-8 text, or of the token ids as little-endian int64."""
    if isinstance(document, str):
        return hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    import numpy as np

    return hashlib.sha256(np.asarray(document, dtype="<i8").tobytes()).digest()


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Say whether the document with this digest is held out: the digest, read as a number in [0, 1), is < fraction.

    Equal documents always fall on the same side, whatever their order and however many others there are.
    """
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def open_source(config: DataConfig, synthetic: dict[str, Any] | None = None) -> Source:
    """Open the source that `config` describes, reading no more than its first rows (text files: all of them).

    `synthetic` (the keys of `model.synthetic`) describes the model that the source `synthetic` samples from.

    Raises:
        UserError: no such file, folder, dataset or split; nothing in it; no text or token column; keys that do not
            apply to the source; the hub cannot be reached.
        RunError: the first rows of a stream cannot be read.
    """
    _check_keys(config)
    if config.source == "stdlib":
        return _open_stdlib()
    if config.source == "synthetic":
        return _open_synthetic(synthetic)
    if config.source == "text":
        return _open_text(config)
    train = _open_rows(config, config.train_split)
    val = _open_rows(config, config.val_split) if config.val_split is not None else None
    if val is not None and val.holds_tokens != train.holds_tokens:
        raise UserError(
            f"data.val_split: '{config.val_split}' offers column '{val.column}' and '{config.train_split}' column "
            f"'{train.column}', text in one and tokens in the other: set data.text_column or data.token_column"
        )
    return Source("stream" if config.streaming else "table", train, val)


def _check_keys(config: DataConfig) -> None:
    in_memory = config.source in ("stdlib", "synthetic", "text")
    for key, value in (("streaming", config.streaming or None), ("val_split", config.val_split)):
        if in_memory and value is not None:
            raise UserError(f"data.{key}: {value} does not apply to data.source={config.source}: leave it unset")
    if config.document_separator is not None and config.source != "text":
        raise UserError("data.document_separator: applies to data.source=text only: leave it null")
    if config.document_separator == "":
        raise UserError("data.document_separator: '' separates nothing: give a string such as '\\n\\n', or null")
    if config.text_column is not None and config.token_column is not None:
        raise UserError(
            f"data.token_column: '{config.token_column}' and data.text_column '{config.text_column}' are both set: "
            "set one and leave the other null"
        )


def _open_stdlib() -> Source:
    where = f"the standard library in {corpus.stdlib_root()}"
    splits = []
    for held_out in (False, True):
        documents = sorted(corpus.stdlib_documents(held_out=held_out), key=lambda d: document_digest(d[0]))
        splits.append(Rows([text for _, text in documents], where))
    return Source("memory", *splits)


def _open_synthetic(values: dict[str, Any] | None) -> Source:
    if values is None:
        raise UserError("data.source: synthetic samples from the synthetic model only: choose model=synthetic")
    from jsae_lightning.synthetic.documents import SyntheticDocuments

    where = "documents sampled from the synthetic model"
    train, val = (Rows(SyntheticDocuments(values, split), where, holds_tokens=True) for split in ("train", "val"))
    return Source("memory", train, val)


def find_files(path: str, source: str) -> list[Path]:
    """Return the files that `data.path` stands for, sorted: a file, a glob, or a folder searched with its subfolders.

    Raises:
        UserError: nothing there, or only empty files.
    """
    suffixes = _SUFFIXES[source]
    if Path(path).is_file():
        files = [Path(path)]
    elif Path(path).is_dir():
        files = [file for file in sorted(Path(path).rglob("*")) if file.is_file() and file.name.endswith(suffixes)]
        if not files:
            raise UserError(
                f"data.path: no file that ends in {' or '.join(suffixes)} in folder '{path}': "
                f"give a folder with such files, a glob such as '{path}/*.ext', or another data.source"
            )
    else:
        files = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if Path(match).is_file()]  # noqa: PTH207
        if not files:
            raise UserError(f"data.path: there is no file, folder or match of a glob '{path}': give one that exists")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"data.path: '{path}' is empty ({len(files)} file(s) of 0 bytes): give files with data")
    return files


def _open_text(config: DataConfig) -> Source:
    documents = []
    # A shell hands `\n` over as two characters.
    separator = (config.document_separator or "").replace("\\n", "\n").replace("\\t", "\t")
    for file in find_files(config.path or "", "text"):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.path: '{file}' is not UTF-8 ({error.reason} at byte {error.start}): convert it"
            ) from error
        documents += text.split(separator) if separator else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"data.path: '{config.path}' holds white space only: give files with text")
    splits: dict[bool, list[tuple[bytes, str]]] = {False: [], True: []}
    for document in documents:
        digest = document_digest(document)
        splits[is_held_out(digest, config.val_fraction)].append((digest, document))
    # In the order of the digests, so that a part of the documents is a fair sample of them.
    train, val = ([document for _, document in sorted(split)] for split in splits.values())
    where = f"'{config.path}' ({len(documents):,} documents)"
    return Source("memory", Rows(train, where), Rows(val, where))


def _open_rows(config: DataConfig, split: str) -> Rows:
    where = f"dataset '{config.name}'" if config.source == "hub" else f"'{config.path}'"
    where += f", split '{split}'"
    files = [] if config.source == "hub" else find_files(config.path or "", config.source)
    patience = Patience(config.stream_retries, config.stream_timeout_s) if config.streaming else Patience()
    with quiet_datasets():
        try:
            load = partial(_load_split, config, split, files)
            data = persist(lambda _: load, patience, where, lambda: _url(config)) if config.streaming else load()
            head = StreamReader(data, patience, where).read(NUM_HEAD_ROWS)
        except DamagedShardError as error:
            raise UserError(f"{error}, or correct data.source={config.source}, if that is not what it holds") from error
        except (UserError, RunError):
            raise
        except Exception as error:  # `datasets` and its readers raise dozens of unrelated types
            key = "name" if config.source == "hub" else "path"
            raise UserError(
                f"data.{key}: {where} cannot be read ({first_line(error.__cause__ or error)}): "
                "correct data.source, data.path, data.name, data.config_name or the split"
            ) from error
    if not head:
        raise UserError(f"data.train_split: {where} has no rows: give a dataset or split with data")
    column, holds_tokens = find_column(head, where, text_column=config.text_column, token_column=config.token_column)
    rows = Rows(data, where, column, holds_tokens, patience=patience)
    return dataclasses.replace(rows, head=tuple(map(rows.value, head)))


def _url(config: DataConfig) -> str:
    """What messages call data of which no file is known yet: a local path, or the data set's address on the hub."""
    name = config.name if config.source == "hub" else config.path
    return name or "" if config.source != "hub" or Path(name or "").is_dir() else f"hf://datasets/{name}"


def _load_split(config: DataConfig, split: str, files: list[Path]) -> Any:
    import datasets

    if files:
        names = [str(file) for file in files]
        return datasets.load_dataset(
            _BUILDERS[config.source], data_files=names, split=split, streaming=config.streaming
        )
    name = config.name or ""
    folder = Path(name)
    if not folder.is_dir():
        _check_hub(name, config.revision, is_streaming=config.streaming)
    if any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.Dataset):
            saved = datasets.DatasetDict({"train": saved})
        if split not in saved:
            raise UserError(f"data.train_split: no split '{split}' in '{name}': choose one of {', '.join(saved)}")
        return saved[split].to_iterable_dataset() if config.streaming else saved[split]
    # A revision is a matter of the hub: given for a folder it would only be refused.
    revision = None if folder.is_dir() else config.revision
    return datasets.load_dataset(name, config.config_name, split=split, revision=revision, streaming=config.streaming)


def _check_hub(name: str, revision: str | None, *, is_streaming: bool) -> None:
    """Ask the hub once whether the dataset is there; `datasets` alone would retry for much longer.

    Raises UserError; for a stream, the hub's own error if it answers that it is out of order for now.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:  # then only the local cache is asked, at once
        return
    try:
        within(HUB_TIMEOUT_S, lambda: HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S / 2))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"data.name: neither a folder nor a dataset of the hub is called '{name}' (or it is private or gated): "
            "correct the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"data.revision: dataset '{name}' has no revision '{revision}': correct it") from error
    except Exception as error:
        if is_streaming and is_passing_status(error):
            raise
        raise UserError(
            f"data.name: no folder '{name}' here, and the hub cannot be reached ({type(error).__name__}): check the "
            "network, or set HF_HUB_OFFLINE=1 if the dataset was downloaded before, or use data.source=stdlib"
        ) from error


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence for a while the progress bars and lines of `datasets` and its libraries' about each request.

    What goes wrong is raised as well, and told in one line by whoever calls.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils import logging as datasets_logging

    verbosity, had_bars = datasets_logging.get_verbosity(), not are_progress_bars_disabled()
    datasets_logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
