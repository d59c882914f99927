"""What a second start makes of a folder in which something has begun or ended: real processes."""

import functools
import os
import shutil
from pathlib import Path

import pytest

from comparing import assert_same, assert_same_run, checkpoint
from jsae_lightning import load_run
from jsae_lightning.evaluate_config import compose_evaluation
from running import kill_self, toy_overrides, train, write_documents
from tiny_models import make_model_dir


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a model and documents, as text and as lines of JSON."""
    folder = tmp_path_factory.mktemp("material")
    make_model_dir("gpt_neox", folder / "model")
    documents = write_documents(folder / "text.txt").read_text().split("\n\n")
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    return folder


def begin(folder: Path | None = None, killed_at: int | None = None) -> None:
    """Go to a folder before anything else, and be killed at the start of a step (counted in this process)."""
    from jsae_lightning.module import JSAEModule

    original, calls = JSAEModule.training_step, []

    def training_step(self, mlp_in, batch_idx):
        calls.append(1)
        if len(calls) == killed_at:
            kill_self()
        return original(self, mlp_in, batch_idx)

    if folder is not None:
        os.chdir(folder)
    JSAEModule.training_step = training_step


def said(output: Path) -> str:
    return output.read_text().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A run with relative paths, killed at step 14 and gone on with from another folder; its checkpoint of step 12."""
    folder = tmp_path_factory.mktemp("finished")
    run, output = folder / "run", folder / "output"
    relative = toy_overrides(Path("model"), Path("text.txt"), run)
    assert train(relative, output=output, fault=functools.partial(begin, material, 14)) == -9, output.read_text()
    first = shutil.copy(run / "checkpoints" / "last.ckpt", folder / "first.ckpt")
    go_on = ["ckpt_path=auto", f"hydra.run.dir={run}"]
    assert train(go_on, output=output, fault=functools.partial(begin, folder)) == 0, output.read_text()
    return run, Path(first)


@pytest.mark.slow
def test_a_run_with_relative_paths_is_found_from_any_folder(finished, material):
    run = load_run(finished[0])
    assert run.config["model"]["name"] == str(material / "model") and run.tokenizer().vocab_size
    assert compose_evaluation(finished[0], run.config, []).data.path == str(material / "text.txt")


@pytest.mark.slow
def test_a_run_that_began_from_anothers_checkpoint_goes_on_by_itself(finished, material, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    paths = material / "model", material / "text.txt", run
    # An attempt with other settings, before its first checkpoint: nothing of it is left.
    other = [*toy_overrides(*paths), "optim.lr=0.5"]
    assert train(other, output=output, fault=functools.partial(begin, killed_at=2)) == -9
    started = [*toy_overrides(*paths), f"ckpt_path={finished[1]}"]
    assert train(started, output=output, fault=functools.partial(begin, killed_at=1)) == -9, output.read_text()
    # Killed before it had a checkpoint of its own, it begins from the other's again ...
    again = functools.partial(begin, killed_at=6)
    assert train(["ckpt_path=auto", f"hydra.run.dir={run}"], output=output, fault=again) == -9, output.read_text()
    assert output.read_text().count(f"going on from step 12 of {finished[1]}") == 2
    assert checkpoint(run)["global_step"] == 16
    # ... and when its job is requeued, with the same command, from its own.
    requeued = tmp_path / "requeued"
    assert train(started, output=requeued, SLURM_RESTART_COUNT="1") == 0, requeued.read_text()
    assert f"going on from step 16 of {run}" in requeued.read_text()
    assert_same(checkpoint(run)["state_dict"], checkpoint(finished[0])["state_dict"], "weights")
    assert configs_in_tensorboard(run) == [False]


def configs_in_tensorboard(run: Path) -> list[bool]:
    """Of each configuration that TensorBoard shows: whether it is the one of optim.lr=0.5."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("config/text_summary")]
    return ["lr: 0.5" in text for text in texts]


@pytest.mark.slow
def test_results_are_not_overwritten_though_the_checkpoints_are_gone(finished, material, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".log"}
    starts = [
        [*toy_overrides(material / "model", material / "text.txt", run), "seed=5"],
        ["ckpt_path=auto", f"hydra.run.dir={run}"],
    ]
    for number, arguments in enumerate(starts):
        output = tmp_path / f"output_{number}"
        assert train(arguments, output=output) == 2
        assert f"{run} holds sae_pair of a run, but no checkpoint that could be gone on from" in said(output)
    kept = {path: content for path, content in files.items() if path.name != "status.json"}
    assert kept == {path: path.read_bytes() for path in kept}


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [False, True])
def test_what_was_trained_on_a_stream_that_ends_too_early_is_kept(prefetch, material, tmp_path):
    """And goes on to the same bits as if the stream had been repeated from the start."""

    def overrides(run: Path, repeat: bool) -> list[str]:
        replaced = ("data=", "data.document", "data.train_tokens", "data.batch_tokens", "checkpoint.every_n_steps")
        kept = toy_overrides(material / "model", material / "rows.jsonl", run)
        stream = ["data=jsonl", "data.streaming=true", "data.train_tokens=32768", "data.batch_tokens=512"]
        stream += [f"data.repeat={repeat}", f"data.prefetch={prefetch}", "checkpoint.every_n_steps=null"]
        return [o for o in kept if not o.startswith(replaced)] + stream

    run, output = tmp_path / "run", tmp_path / "output"
    assert train(overrides(run, False), output=output) == 2, output.read_text()
    assert "data.repeat: false, but" in said(output) and "ckpt_path=auto data.repeat=true" in said(output)
    step = checkpoint(run)["global_step"]
    assert 0 < step < 64 and step % 5 == 0  # blocks of five batches
    go_on = ["ckpt_path=auto", "data.repeat=true", f"hydra.run.dir={run}"]
    assert train(go_on, output=output) == 0, output.read_text()
    assert train(overrides(tmp_path / "whole", True), output=output) == 0, output.read_text()
    assert_same_run(run, tmp_path / "whole")
