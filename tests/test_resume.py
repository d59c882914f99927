"""A run that is killed and resumed equals one that was left alone, bit for bit."""

import functools
import random
from pathlib import Path

import pytest
import torch

from comparing import assert_same, assert_same_run, checkpoint, rows
from jsae_lightning.run_status import read_status
from running import kill_self, toy_overrides, train, write_documents
from tiny_models import make_model_dir

MOMENTS = ["first_step", "inside_block", "block_boundary", "evaluation", "checkpoint_write", "after_rename", "random"]


def _patch(owner: str, name: str, call: int, *, after: bool = False) -> None:
    """Make the `call`-th call of a function kill the process, before or after its work."""
    import importlib

    module_name, _, class_name = owner.partition(":")
    holder = importlib.import_module(module_name)
    if class_name:
        holder = getattr(holder, class_name)
    original, calls = getattr(holder, name), []

    @functools.wraps(original)
    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            kill_self()
        result = original(*args, **kwargs)
        if len(calls) == call:
            kill_self()
        return result

    setattr(holder, name, killing)


def _half_written_checkpoint(call: int) -> None:
    """Write half of the `call`-th checkpoint's bytes, then die."""
    import io

    from jsae_lightning import checkpoint

    original, calls = torch.save, []

    def save(state, path):
        calls.append(1)
        if len(calls) < call:
            return original(state, path)
        buffer = io.BytesIO()
        original(state, buffer)
        Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        return kill_self()

    checkpoint.torch.save = save


_STEP = ("jsae_lightning.module:JSAEModule", "training_step")
FAULTS = {
    "first_step": functools.partial(_patch, *_STEP, 1),
    "inside_block": functools.partial(_patch, *_STEP, 14),
    "block_boundary": functools.partial(_patch, "jsae_lightning.block_maker:BlockMaker", "fill", 3),
    "evaluation": functools.partial(_patch, "jsae_lightning.evaluation", "_jacobian_sums", 4),
    "checkpoint_write": functools.partial(_half_written_checkpoint, 4),
    "after_rename": functools.partial(
        _patch, "jsae_lightning.callbacks.checkpointing", "write_checkpoint", 3, after=True
    ),
    "random": functools.partial(_patch, *_STEP, random.Random().randint(2, 24)),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")


@pytest.fixture(scope="module")
def uninterrupted(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = folder / "output"
    assert train(toy_overrides(*material, folder / "run"), output=output) == 0, output.read_text()
    return folder / "run"


def test_the_reference_run_logs_every_step(uninterrupted):
    found = rows(uninterrupted)
    assert [row["step"] for row in found] == [str(step) for step in range(1, 25)]
    assert [row["step"] for row in found if row["val/loss"]] == ["7", "14", "21", "24"]
    assert checkpoint(uninterrupted)["state_dict"]["tokens_seen"] == 1536


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(moment, material, uninterrupted, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    assert train(toy_overrides(*material, run), output=output, fault=FAULTS[moment]) == -9
    assert not (run / "metrics.json").exists()
    # The folder alone says how to go on: no override is repeated.
    assert train(["ckpt_path=auto", f"hydra.run.dir={run}"], output=output) == 0, output.read_text()
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("moment", ["inside_block", "block_boundary", "evaluation"])
def test_killed_and_resumed_with_blocks_made_ahead(moment, material, uninterrupted, tmp_path):
    """The run that made them ahead until it was killed and no more afterwards equals the one that never did."""
    run, output = tmp_path / "run", tmp_path / "output"
    overrides = [*toy_overrides(*material, run), "data.prefetch=true"]
    assert train(overrides, output=output, fault=FAULTS[moment]) == -9
    assert "made in the background" in output.read_text()
    again = ["ckpt_path=auto", f"hydra.run.dir={run}"]
    after = ["data.prefetch=false"] if moment == "evaluation" else []
    assert train([*again, *after], output=output) == 0, output.read_text()
    assert_same_run(run, uninterrupted)


@pytest.fixture(scope="module")
def streamed(material, tmp_path_factory):
    """Overrides of a run on a streamed data set of three shards, and the uninterrupted run."""
    from datasets import Dataset

    model, text = material
    folder = tmp_path_factory.mktemp("streamed")
    for shard in range(3):
        documents = text.read_text().split("\n\n")[shard::3]
        Dataset.from_dict({"text": documents}).to_parquet(str(folder / "stream" / f"train-{shard}.parquet"))

    def overrides(run: Path) -> list[str]:
        kept = [o for o in toy_overrides(model, text, run) if not o.startswith(("data=", "data.path", "data.document"))]
        return [*kept, "data=hub", f"data.name={folder / 'stream'}", "data.streaming=true"]

    assert train(overrides(folder / "run"), output=folder / "output") == 0, (folder / "output").read_text()
    return overrides, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["inside_block", "block_boundary", "checkpoint_write", "random"])
def test_killed_and_resumed_stream_equals_uninterrupted(moment, streamed, tmp_path):
    """A streamed data set, whose position is a part of the checkpoint; killed a second time soon after the resume."""
    overrides, expected = streamed
    run, output = tmp_path / "run", tmp_path / "output"
    assert train(overrides(run), output=output, fault=FAULTS[moment]) == -9
    again = ["ckpt_path=auto", f"hydra.run.dir={run}"]
    if moment == "inside_block":
        assert train(again, output=output, fault=functools.partial(_patch, *_STEP, 5)) == -9
    assert train(again, output=output) == 0, output.read_text()
    assert_same_run(run, expected)


def test_saving_and_evaluating_do_not_change_the_trajectory(material, uninterrupted, tmp_path):
    bare = ["checkpoint.every_n_steps=null", "eval.every_n_steps=null", "~callbacks.jacobian_histograms"]
    output = tmp_path / "output"
    assert train(toy_overrides(*material, tmp_path / "run") + bare, output=output) == 0, output.read_text()
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(checkpoint(tmp_path / "run")[key], checkpoint(uninterrupted)[key], key)


def test_checkpoint_holds_no_language_model(uninterrupted):
    """Only the pair's parameters, its counters and Adam's two moments; loads with weights_only=True."""
    saved = checkpoint(uninterrupted)
    names = set(saved["state_dict"])
    assert all(name.startswith("pair.") or "tokens" in name for name in names), names
    parameters = sum(t.numel() * 4 for name, t in saved["state_dict"].items() if name.startswith("pair."))
    size = (uninterrupted / "checkpoints" / "last.ckpt").stat().st_size
    assert size < 3 * parameters + 40_000


def test_damaged_checkpoint_is_refused_in_one_line(material, uninterrupted, tmp_path):
    whole = (uninterrupted / "checkpoints" / "last.ckpt").read_bytes()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "output"
    code = train([*toy_overrides(*material, tmp_path / "run"), f"ckpt_path={damaged}"], output=output)
    assert code == 2
    last = output.read_text().strip().splitlines()[-1]
    assert last.startswith("jsae-train: error:") and str(damaged) in last and "truncated" in last


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["sae.k=3"], "holds a run already: go on with it by ckpt_path=auto"), (["ckpt_path=auto", "sae.k=3"], "sae.k=")],
    ids=["another run", "another k"],
)
def test_a_refused_start_leaves_a_finished_run_as_it_was(changes, message, material, uninterrupted, tmp_path):
    """Its checkpoint, its configuration and that it is finished; the attempt is noted."""
    output, record = tmp_path / "output", uninterrupted / ".hydra"
    before, written = checkpoint(uninterrupted), {path: path.read_text() for path in sorted(record.iterdir())}
    assert len(written) == 3
    attempts = len(read_status(uninterrupted).attempts)
    assert train([*toy_overrides(*material, uninterrupted), *changes], output=output) == 2
    assert message in output.read_text().strip().splitlines()[-1]
    assert_same(checkpoint(uninterrupted), before, "checkpoint")
    assert {path: path.read_text() for path in sorted(record.iterdir())} == written
    status = read_status(uninterrupted)
    assert status.status == "finished"
    assert [attempt.exit_code for attempt in status.attempts[attempts:]] == [2]


def test_a_mistaken_resume_leaves_the_folder_as_it_was(material, tmp_path):
    """A wrong override is refused, and the next resume goes on with the right ones, deletions and flags included."""
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nsae:\n  mse_output_coef: 2\n")
    run, output = tmp_path / "run", tmp_path / "output"
    overrides = [o for o in toy_overrides(*material, run) if not o.startswith("experiment")]
    first = [f"--config-dir={tmp_path / 'own'}", "experiment=mine", "~callbacks.progress", *overrides]
    assert train(first, output=output, fault=FAULTS["inside_block"]) == -9
    resume = ["ckpt_path=auto", f"hydra.run.dir={run}"]
    assert train([*resume, "sae.k=999"], output=output) == 2
    assert train([*resume, "~callbacks.progress"], output=output) == 0, output.read_text()
    assert checkpoint(run)["hyper_parameters"]["sae"]["mse_output_coef"] == 2
    assert checkpoint(run)["global_step"] == 24

    # What only the checkpoint can tell is found out later; it changes no more of a finished run.
    records = [run / "arguments.json", *sorted((run / ".hydra").iterdir())]
    before = [path.read_bytes() for path in records]
    assert train([*resume, "model.layer=0"], output=output) == 2
    assert train([*resume, "data.context_length=8"], output=output) == 2
    assert [path.read_bytes() for path in records] == before
    assert read_status(run).status == "finished"
    assert train(resume, output=output) == 0, output.read_text()
    assert [path.read_bytes() for path in records] == before


@pytest.mark.parametrize("change", ["model.layer=0", "model.random_weights=true"])
def test_checkpoint_of_another_mlp_is_refused(change, material, uninterrupted, tmp_path):
    output = tmp_path / "output"
    path = f"ckpt_path={uninterrupted / 'checkpoints' / 'last.ckpt'}"
    assert train([*toy_overrides(*material, tmp_path / "run"), change, path], output=output) == 2
    assert "another MLP" in output.read_text().strip().splitlines()[-1]


def test_checkpoint_of_other_positions_is_refused(material, uninterrupted, tmp_path):
    output = tmp_path / "output"
    change = ["data.exclude_first_position=true", f"ckpt_path={uninterrupted / 'checkpoints' / 'last.ckpt'}"]
    assert train([*toy_overrides(*material, tmp_path / "run"), *change], output=output) == 2
    said = output.read_text().strip().splitlines()[-1]
    assert "data.exclude_first_position: true, but the checkpoint was made with false: resume with" in said


def test_best_checkpoint_is_the_best_evaluation(uninterrupted):
    """One `step_*.ckpt`, of the step with the lowest val/loss; nothing half-written beside it."""
    best = min((row for row in rows(uninterrupted) if row["val/loss"]), key=lambda row: float(row["val/loss"]))
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["last.ckpt", f"step_{int(best['step']):07d}.ckpt"]


@pytest.mark.parametrize(("override", "key"), [("sae.k=3", "sae.k"), ("optim.lr=1", "optim.lr"), ("seed=1", "seed")])
def test_checkpoint_of_another_recipe_is_refused(override, key, material, uninterrupted, tmp_path):
    output = tmp_path / "output"
    path = f"ckpt_path={uninterrupted / 'checkpoints' / 'last.ckpt'}"
    assert train([*toy_overrides(*material, tmp_path / "run"), override, path], output=output) == 2
    assert f"was made with {key}=" in output.read_text().strip().splitlines()[-1]
