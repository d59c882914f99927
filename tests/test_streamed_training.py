"""Training on a hub's stream whose server breaks in mid-training: real processes, real connections."""

import importlib
import time
from pathlib import Path

import numpy as np
import pytest

import running
from comparing import assert_same_run, checkpoint, rows
from running import toy_overrides, write_documents
from stream_server import NAME, Fault, StreamServer, stream_server
from tiny_models import make_model_dir

pytestmark = pytest.mark.slow

BROKEN = "train-1.parquet"
RETRIES, TIMEOUT_S = 3, 2.0


def write_shards(folder: Path) -> Path:
    """Three shards of text: the second is two downloads, its end first, since one column does not compress."""
    from datasets import Dataset

    documents = write_documents(folder / "text.txt").read_text().split("\n\n")
    random = np.random.default_rng(0)
    (folder / "shards").mkdir()
    for shard, (first, last, size) in enumerate([(0, 140, 0), (140, 200, 3_000), (200, 400, 0)]):
        columns = {"text": documents[first:last], "blob": [random.bytes(size) for _ in range(first, last)]}
        Dataset.from_dict(columns).to_parquet(str(folder / "shards" / f"train-{shard}.parquet"), batch_size=10)
    return folder / "shards"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_shards(folder)


def overrides(model: Path, folder: Path) -> list[str]:
    """A toy run that is long enough to reach the second shard in mid-training: what is read before does not."""
    kept = [o for o in toy_overrides(model, model, folder) if not o.startswith(("data=", "data.path", "data.document"))]
    stream = ["data=hub", f"data.name={NAME}", "data.streaming=true", "data.train_tokens=8960", "data.batch_tokens=128"]
    limits = [f"data.stream_retries={RETRIES}", f"data.stream_timeout_s={TIMEOUT_S:g}"]
    return [*kept, *stream, *limits, "eval.every_n_steps=20", "checkpoint.every_n_steps=4"]


def read_the_environment_again() -> None:
    """The libraries have read it in the process that this one was forked from."""
    for name in ("huggingface_hub.constants", "datasets.config"):
        importlib.reload(importlib.import_module(name))


def train(server: StreamServer, arguments: list[str], output: Path) -> int:
    """Train on what the server has, with nothing of it in a cache."""
    home = str(output.parent / "home")
    changes = {"HF_ENDPOINT": server.endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return running.train(arguments, output=output, fault=read_the_environment_again, **changes)


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
    """The run that nothing disturbed, and the seconds it took."""
    model, shards = material
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    with stream_server(shards) as server:
        assert train(server, overrides(model, folder / "run"), folder / "output") == 0, (folder / "output").read_text()
        assert server.downloads(BROKEN) == 2
    return folder / "run", time.monotonic() - began


def fault(kind: str, left: int | None = None) -> Fault:
    """Breaks the second download of the shard, in its middle unless the answer is 503, and those after it."""
    return Fault(kind, BROKEN, left, skip=1, after=50_000)


REASONS = {
    "drop": "peer closed connection",
    "503": "HTTP 503",
    "stall": f"no answer for {TIMEOUT_S:g} s",
    "trickle": f"no answer within {2 * TIMEOUT_S:g} s",
}


@pytest.mark.parametrize(("kind", "prefetch"), [("drop", False), ("503", True), ("stall", True), ("trickle", False)])
def test_a_stream_that_recovers_changes_nothing(kind, prefetch, material, undisturbed, tmp_path):
    model, shards = material
    output = tmp_path / "output"
    with stream_server(shards) as server:
        server.fault = fault(kind, left=2)
        arguments = [*overrides(model, tmp_path / "run"), f"data.prefetch={prefetch}"]
        assert train(server, arguments, output) == 0, output.read_text()
    warnings = [line for line in output.read_text().splitlines() if "trying again in" in line]
    assert len(warnings) == 2
    assert all(BROKEN in line and REASONS[kind] in line for line in warnings), warnings
    assert_same_run(tmp_path / "run", undisturbed[0])


def test_two_ranks_equal_one_though_a_rank_has_to_try_again(material, undisturbed, tmp_path):
    """Each rank reads the whole stream, by connections of its own."""
    model, shards = material
    output = tmp_path / "output"
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    with stream_server(shards) as server:
        server.fault = fault("503", left=1)
        assert train(server, [*overrides(model, tmp_path / "run"), *ranks], output) == 0, output.read_text()
        assert server.downloads(BROKEN) > 2 * 2  # two of each rank, and those after the fault
    assert output.read_text().count("trying again in") == 1
    # Other batches would change it by percents; weights drift apart where rounding decides which latent is active.
    losses = [[float(row["train/loss"]) for row in rows(run)] for run in (tmp_path / "run", undisturbed[0])]
    assert len(losses[0]) == 70 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(("kind", "prefetch"), [("trickle", False), ("503", True)])
def test_a_stream_that_stays_broken_ends_in_one_line_and_goes_on_later(kind, prefetch, material, undisturbed, tmp_path):
    model, shards = material
    folder, output = tmp_path / "run", tmp_path / "output"
    expected, usual_s = undisturbed
    with stream_server(shards) as server:
        server.fault = fault(kind)
        began = time.monotonic()
        arguments = [*overrides(model, folder), f"data.prefetch={prefetch}"]
        assert train(server, arguments, output) == 1, output.read_text()
        waits = sum(2**tries for tries in range(RETRIES))
        assert time.monotonic() - began < usual_s + waits + 2 * TIMEOUT_S * (RETRIES + 1) + 20
        text = output.read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("jsae-train: error:")]
        assert BROKEN in line and REASONS[kind] in line and "ckpt_path=auto hydra.run.dir=DIR" in line
        assert "Traceback" not in text and "Fatal" not in text
        assert 0 < checkpoint(folder)["global_step"] < 70
        server.fault = None
        assert train(server, ["ckpt_path=auto", f"hydra.run.dir={folder}"], output) == 0, output.read_text()
    assert_same_run(folder, expected)


def test_a_stream_that_cannot_be_opened_ends_in_one_line(material, tmp_path):
    model, shards = material
    output = tmp_path / "output"
    with stream_server(shards) as server:
        server.fault = Fault("503", "train-0.parquet")
        assert train(server, [*overrides(model, tmp_path / "run"), "data.stream_retries=1"], output) == 1
    text = output.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("jsae-train: error:")]
    assert f"hf://datasets/{NAME} cannot be read: HTTP 503, after 2 tries" in line and "Traceback" not in text
