"""Models by hub name, against a hub on this machine: download, revisions, cache, and every way to fail."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jsae_lightning import model_files
from jsae_lightning.errors import UserError
from jsae_lightning.language_model import LanguageModel, load_tokenizer, read_architecture
from jsae_lightning.model_files import model_folder, weight_files
from tiny_hub import TinyHub, tiny_hub
from tiny_models import make_model_dir

ROOT = Path(__file__).resolve().parents[1]
TOKENS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def revisions(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("hub")
    return {
        "main": make_model_dir("gpt_neox", base / "main", seed=0),
        "step1000": make_model_dir("gpt_neox", base / "step1000", seed=1),
    }


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


def use_endpoint(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(revisions, cache, monkeypatch):
    with tiny_hub(revisions) as server:
        use_endpoint(monkeypatch, server.endpoint)
        yield server


def refused(name: str, *, revision: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_architecture(name, revision=revision)
    message = str(caught.value)
    assert "\n" not in message and name in message
    return message


def test_a_model_is_loaded_by_name_and_revision(hub: TinyHub, revisions):
    for revision in (None, "step1000", hub.commits["step1000"]):
        folder = revisions["main" if revision is None else "step1000"]
        assert read_architecture("team/tiny", revision=revision) == read_architecture(str(folder))
        model = LanguageModel.load("team/tiny", layer=1, revision=revision)
        assert (model.name, model.revision) == ("team/tiny", revision)
        assert torch.equal(model.mlp_in(TOKENS), LanguageModel.load(str(folder), layer=1).mlp_in(TOKENS))
        ids = load_tokenizer("team/tiny", revision=revision).encode("the cat")
        assert ids == load_tokenizer(str(folder)).encode("the cat")


def test_only_what_is_asked_for_is_downloaded(hub: TinyHub, cache):
    def names() -> set[str]:
        return {path.name for path in cache.glob("models--team--tiny/snapshots/*/*")}

    read_architecture("team/tiny")
    assert names() == {"config.json"}
    load_tokenizer("team/tiny")
    assert "tokenizer.json" in names() and "model.safetensors" not in names()
    LanguageModel.load("team/tiny", layer=0)
    assert "model.safetensors" in names()


def test_a_complete_copy_in_the_cache_needs_no_hub(hub: TinyHub, monkeypatch):
    LanguageModel.load("team/tiny", layer=1)
    hub.requests.clear()
    expected = LanguageModel.load("team/tiny", layer=1).mlp_in(TOKENS)
    assert hub.requests == []
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert torch.equal(LanguageModel.load("team/tiny", layer=1).mlp_in(TOKENS), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(LanguageModel.load("team/tiny", layer=1).mlp_in(TOKENS), expected)
    with pytest.raises(UserError, match="neither a local folder nor complete in the local cache, and HF_HUB_OFFLINE"):
        load_tokenizer("team/tiny")  # the one part that was never fetched


def test_an_incomplete_copy_in_the_cache_is_completed(hub: TinyHub, cache):
    folder = model_folder("team/tiny", part="weights")
    (folder / "model.safetensors").unlink()
    assert model_folder("team/tiny", part="weights") == folder
    assert (folder / "model.safetensors").is_file()


def test_sharded_weights_come_whole_and_other_formats_stay_behind():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "consolidated.safetensors", "config.json"]
    assert weight_files([*others, *shards]) == shards
    assert weight_files(others) == ["pytorch_model.bin"]
    assert weight_files(["model-00001-of-00002.safetensors"]) == []  # shards without their index
    assert model_files._tokenizer_files(["tokenizer.json", "vocab.json", "merges.txt", "x/vocab.json", shards[2]]) == [
        "merges.txt",
        "tokenizer.json",
        "vocab.json",
    ]


def test_each_answer_of_the_hub_has_its_own_line(hub: TinyHub):
    assert "is gated" in refused("team/gated") and "accept its licence" in refused("team/gated")
    assert f"{hub.endpoint}/team/gated and log in" in refused("team/gated")
    assert "(HTTP 403)" in refused("team/forbidden") and "log in" in refused("team/forbidden")
    assert "neither a local folder nor a model that" in refused("team/absent") and "spelling" in refused("team/absent")
    assert "has no revision 'step7'" in refused("team/tiny", revision="step7")
    assert "has no config.json" in refused("team/bare")
    assert "HTTP 503" in refused("team/down")


def test_impossible_names_are_refused_without_a_request(hub: TinyHub):
    assert "nor a possible name" in refused("two words")
    assert "does not exist" in refused("a/b/c")
    assert hub.requests == []


def test_hub_that_cannot_be_reached_is_one_line_at_once(cache, monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    start = time.monotonic()
    assert "check the network and try again, or give a local folder" in refused("team/tiny")
    assert time.monotonic() - start < 5  # transformers by itself: 23 s of retries


def test_hub_that_never_answers_is_given_up(hub: TinyHub, monkeypatch):
    monkeypatch.setattr(model_files, "PROBE_TIMEOUT", 0.5)
    start = time.monotonic()
    assert "Timeout" in refused("team/silent")
    assert time.monotonic() - start < 4


def test_name_resolution_that_hangs_is_given_up(cache, monkeypatch):
    def hang(*args, **kwargs):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", hang)
    monkeypatch.setattr(model_files, "PROBE_LIMIT", 0.5)
    use_endpoint(monkeypatch, "http://hub.invalid")
    start = time.monotonic()
    assert "no answer within" in refused("team/tiny")
    assert time.monotonic() - start < 2


def test_limits_keep_a_failure_within_thirty_seconds():
    assert model_files.PROBE_TIMEOUT < model_files.PROBE_LIMIT <= 20


def test_environment_variables_of_the_hub_are_obeyed(revisions, tmp_path):
    """In a process of its own, as huggingface_hub reads them when it is imported."""
    code = "from jsae_lightning.architecture import read_architecture; print(read_architecture('team/tiny').d_model)"
    with tiny_hub(revisions) as server:
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
        settings |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        env, command = os.environ | settings, [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("32\n", 0), done.stderr
    assert list(tmp_path.glob("hub/models--team--tiny/snapshots/*/config.json"))
