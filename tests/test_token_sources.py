import json
import socket
import time

import pytest

from data_factories import data_settings, tagged_texts
from jsae_lightning import token_sources
from jsae_lightning.config_schema import DataConfig
from jsae_lightning.dataset_columns import find_column
from jsae_lightning.errors import RunError, UserError
from jsae_lightning.tiny_lm import corpus
from jsae_lightning.token_sources import document_digest, find_files, is_held_out, open_source


def config(**changes):
    return DataConfig(**data_settings(**changes))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_table(folder, kind, columns):
    """A dataset of one kind in `folder`; return the settings that read it."""
    import datasets

    table = datasets.Dataset.from_dict(columns)
    if kind == "jsonl":
        rows = [json.dumps(row) for row in table]
        (folder / "a.jsonl").write_text("\n".join(rows[:20]) + "\n")
        (folder / "b.jsonl").write_text("\n".join(rows[20:]) + "\n")
    elif kind == "parquet":
        table.to_parquet(folder / "rows.parquet")
    elif kind == "arrow":
        table.save_to_disk(folder / "saved")
        return {"source": "arrow", "path": str(folder / "saved")}
    elif kind == "hub folder":
        table.to_parquet(folder / "train-00000.parquet")
        return {"source": "hub", "name": str(folder)}
    else:
        datasets.DatasetDict({"train": table}).save_to_disk(folder / "saved")
        return {"source": "hub", "name": str(folder / "saved")}
    return {"source": kind, "path": str(folder)}


# Held-out documents


def test_a_document_is_held_out_by_its_content_alone():
    documents = [f"document {number}" for number in range(2000)]
    chosen = {document for document in documents if is_held_out(document_digest(document), 0.1)}
    assert 150 < len(chosen) < 250
    assert chosen == {d for d in reversed(documents) if is_held_out(document_digest(d), 0.1)}
    assert chosen < {d for d in documents if is_held_out(document_digest(d), 0.2)}
    assert not any(is_held_out(document_digest(d), 0.0) for d in documents)
    assert all(is_held_out(document_digest(d), 1.0) for d in documents)


def test_equal_token_rows_have_one_digest_whatever_their_type():
    import numpy as np

    assert document_digest([1, 2]) == document_digest(np.array([1, 2], np.int32)) == document_digest(np.array([1, 2]))
    assert document_digest([1, 2]) != document_digest([2, 1])


def test_stdlib_holds_out_files_by_the_hash_of_their_name(monkeypatch):
    names = [f"module_{number}.py" for number in range(200)]

    def documents(*, held_out):
        return ((name, f"source of {name}") for name in names if corpus.is_held_out(name) == held_out)

    monkeypatch.setattr(corpus, "stdlib_documents", documents)
    source = open_source(config(source="stdlib"))
    train, val = set(source.train.data), set(source.val.data)
    assert val == {f"source of {name}" for name in names if corpus.is_held_out(name)} and val
    assert train | val == {f"source of {name}" for name in names} and not train & val


# Text files


def test_text_files_are_documents(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n\nmore")
    (tmp_path / "notes.csv").write_text("not this one")
    source = open_source(config(source="text", path=str(tmp_path)))
    assert sorted(source.train.data + source.val.data) == sorted(f"text {number}\n\nmore" for number in range(30))
    assert source.val.data and all(is_held_out(document_digest(text), 0.2) for text in source.val.data)


@pytest.mark.parametrize("separator", ["\n\n", "\\n\\n"], ids=["newlines", "escaped"])
def test_text_is_split_at_the_separator_and_duplicates_stay_together(tmp_path, separator):
    (tmp_path / "a.txt").write_text("\n\n".join([f"text {number % 20}" for number in range(60)]) + "\n\n \n\n")
    source = open_source(config(source="text", path=str(tmp_path / "a.txt"), document_separator=separator))
    assert len(source.train.data + source.val.data) == 60
    assert source.val.data and not set(source.train.data) & set(source.val.data)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"data.path: '.*bad.txt' is not UTF-8"):
        open_source(config(source="text", path=str(tmp_path)))


def test_find_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.md", "c.jsonl"):
        (tmp_path / name).write_text("x")
    assert find_files(str(tmp_path), "text") == [tmp_path / "b.txt", tmp_path / "sub" / "a.md"]
    assert find_files(str(tmp_path / "**" / "*.md"), "text") == [tmp_path / "sub" / "a.md"]
    assert find_files(str(tmp_path / "c.jsonl"), "text") == [tmp_path / "c.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "there is no file, folder or match"),
        ("*.parquet", "there is no file, folder or match"),
        ("folder", "no file that ends in .jsonl"),
        ("empty.jsonl", "is empty"),
    ],
)
def test_files_that_are_not_there(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=f"data.path: .*{message}"):
        find_files(str(tmp_path / path), "jsonl")


def test_white_space_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(UserError, match="white space only"):
        open_source(config(source="text", path=str(tmp_path)))


# Tables and streams


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "hub folder", "saved folder"])
def test_rows_of_every_kind_of_file(tmp_path, no_network, capfd, kind, streaming):
    texts = tagged_texts(40)
    settings = write_table(tmp_path, kind, {"id": list(range(40)), "text": texts})
    capfd.readouterr()
    source = open_source(config(**settings, streaming=streaming))
    assert source.kind == ("stream" if streaming else "table") and source.val is None
    assert list(source.train.values()) == texts
    assert source.train.head == tuple(texts)
    assert not source.train.holds_tokens
    assert capfd.readouterr() == ("", "")  # no progress bars, no warnings


def test_pretokenised_rows(tmp_path):
    settings = write_table(tmp_path, "parquet", {"tokens": [[1, 2], [3]], "label": [0, 1]})
    rows = open_source(config(**settings)).train
    assert rows.holds_tokens and rows.column == "tokens" and list(rows.values()) == [[1, 2], [3]]


def test_null_rows_are_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert list(open_source(config(source="jsonl", path=str(tmp_path))).train.values()) == ["", "a"]


def test_splits_of_a_local_dataset(tmp_path):
    settings = write_table(tmp_path, "hub folder", {"text": ["a", "b", "c", "d"]})
    source = open_source(config(**settings, train_split="train[:75%]", val_split="train[75%:]"))
    assert list(source.train.values()) == ["a", "b", "c"] and list(source.val.values()) == ["d"]


@pytest.mark.parametrize("kind", ["hub folder", "saved folder"])
def test_unknown_split(tmp_path, kind):
    settings = write_table(tmp_path, kind, {"text": ["a"]})
    with pytest.raises(UserError, match=r"nowhere.*train"):
        open_source(config(**settings, train_split="nowhere"))


def test_dataset_without_text_or_tokens(tmp_path):
    settings = write_table(tmp_path, "jsonl", {"label": [1] * 30, "title": ["x"] * 30})
    with pytest.raises(UserError, match=r"neither a text column .* columns found: label, title: name one"):
        open_source(config(**settings))


def test_dataset_without_rows(tmp_path):
    settings = write_table(tmp_path, "parquet", {"text": []})
    with pytest.raises(UserError, match="has no rows|no data"):
        open_source(config(**settings))


def test_broken_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("this is no JSON\n")
    with pytest.raises(UserError, match="data.path: .* cannot be read") as raised:
        open_source(config(source="jsonl", path=str(tmp_path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"id": 1, "text": "a"}, {}, ("text", False)),
        ({"content": "a", "url": "b"}, {}, ("content", False)),
        ({"input_ids": [1]}, {}, ("input_ids", True)),
        ({"text": "a", "input_ids": [1]}, {}, ("text", False)),
        ({"text": "a", "input_ids": [1]}, {"token_column": "input_ids"}, ("input_ids", True)),
        ({"text": [1, 2], "tokens": [1]}, {}, ("tokens", True)),
        ({"tokens": ["a", "b"], "content": "a b"}, {}, ("content", False)),
        ({"body": "a"}, {"text_column": "body"}, ("body", False)),
    ],
)
def test_find_column(row, keys, expected):
    assert find_column([row], "here", **{"text_column": None, "token_column": None} | keys) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"text_column": "body"}, "data.text_column: no column 'body' in here: .* tokens, text"),
        ({"text_column": "tokens"}, "data.text_column: column 'tokens' of here does not hold text"),
        ({"token_column": "text"}, "data.token_column: column 'text' of here does not hold lists of token ids"),
    ],
)
def test_find_column_refuses(keys, message):
    with pytest.raises(UserError, match=message):
        find_column([{"tokens": [1], "text": "a"}], "here", **{"text_column": None, "token_column": None} | keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "stdlib", "streaming": True}, "data.streaming: True does not apply to data.source=stdlib"),
        ({"source": "text", "path": ".", "val_split": "val"}, "data.val_split"),
        ({"source": "jsonl", "path": ".", "document_separator": "x"}, "data.document_separator"),
        ({"source": "text", "path": ".", "document_separator": ""}, "separates nothing"),
        ({"source": "hub", "name": "x", "text_column": "a", "token_column": "b"}, "both set"),
    ],
)
def test_keys_that_do_not_apply(changes, message):
    with pytest.raises(UserError, match=message):
        open_source(config(**changes))


# The hub


def test_unknown_name_offline_is_one_line(no_network):
    with pytest.raises(UserError, match="data.name: dataset 'nobody/nothing'") as raised:
        open_source(config(source="hub", name="nobody/nothing"))
    assert "\n" not in str(raised.value)


def hub_that_answers(monkeypatch, answer):
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", answer)


def test_unreachable_hub(monkeypatch, no_network):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    hub_that_answers(monkeypatch, refuse)
    with pytest.raises(UserError, match=r"hub cannot be reached \(ConnectionError\).*HF_HUB_OFFLINE=1"):
        open_source(config(source="hub", name="nobody/nothing", streaming=True))


class BusyError(OSError):
    """The hub's answer 503, as its library raises it."""

    response = type("Response", (), {"status_code": 503})


def test_a_hub_that_is_out_of_order_is_asked_again_for_a_stream(monkeypatch, no_network):
    asked = []

    def busy(*_, **__):
        asked.append(1)
        raise BusyError("out of order")

    hub_that_answers(monkeypatch, busy)
    with pytest.raises(RunError, match="hf://datasets/nobody/nothing cannot be read: HTTP 503, after 2 tries"):
        open_source(config(source="hub", name="nobody/nothing", streaming=True, stream_retries=1))
    assert len(asked) == 2


def test_hub_that_never_answers(monkeypatch, no_network):
    hub_that_answers(monkeypatch, lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(token_sources, "HUB_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"hub cannot be reached \(TimeoutError\)"):
        open_source(config(source="hub", name="nobody/nothing"))
    assert time.monotonic() - began < 5


def test_the_hub_is_given_up_within_30_seconds():
    assert token_sources.HUB_TIMEOUT_S < 30


def test_name_that_the_hub_does_not_know(monkeypatch, no_network):
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    hub_that_answers(monkeypatch, unknown)
    with pytest.raises(UserError, match="nor a dataset of the hub is called 'nobody/nothing'"):
        open_source(config(source="hub", name="nobody/nothing"))
