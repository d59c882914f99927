"""Where the loop's time goes: intervals by hand, and a real training."""

import json
import sys

import pytest

from jsae_lightning import bench
from jsae_lightning.benchmarking.loop import loop_table, measure_loop, shares
from jsae_lightning.benchmarking.loop_times import loop_seconds, union_length
from jsae_lightning.errors import UserError
from running import toy_overrides, train, write_documents
from tiny_models import make_model_dir

NOTHING = {"language_model": [], "forward": [], "backward": [], "step": [], "between": [], "paused": []}


def test_the_length_of_a_union_counts_nothing_twice():
    assert union_length([]) == 0
    assert union_length([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)]) == 4
    assert union_length([(0.0, 10.0), (2.0, 3.0), (5.0, 6.0)]) == 10
    assert union_length([(0.0, 1.0), (1.0, 2.0)]) == 2


def test_the_parts_of_a_loop_by_hand():
    """Between batches 0 to 4, of which the model runs 3; the step 5 to 9, of which forward 2 and backward 1; to 10."""
    parts = NOTHING | {
        "between": [(0.0, 4.0)],
        "language_model": [(0.5, 3.5)],
        "step": [(5.0, 9.0)],
        "forward": [(5.0, 7.0)],
        "backward": [(7.5, 8.5)],
    }
    assert loop_seconds((0.0, 10.0), parts) == {
        "wall": 10,
        "language_model": 3,
        "forward": 2,
        "backward": 1,
        "optimizer": 1,
        "step": 4,
        "overlap": 0,
        "lost": 3,
        "lost_between": 1,
        "lost_around": 2,
        "paused": 0,
    }


def test_a_model_that_runs_beside_the_steps_loses_nothing():
    parts = NOTHING | {
        "between": [(0.0, 1.0), (4.0, 5.0)],
        "language_model": [(0.0, 3.0)],
        "step": [(1.0, 4.0), (5.0, 9.0)],
    }
    found = loop_seconds((0.0, 10.0), parts)
    assert (found["language_model"], found["step"], found["overlap"]) == (3, 7, 2)
    assert (found["lost"], found["lost_between"], found["lost_around"]) == (2, 1, 1)


def test_a_pause_counts_nowhere():
    """An evaluation from 4 to 8 in which the language model runs as well."""
    parts = NOTHING | {
        "language_model": [(0.0, 2.0), (5.0, 6.0)],
        "step": [(2.0, 4.0)],
        "paused": [(4.0, 8.0)],
        "between": [(0.0, 2.0)],
    }
    found = loop_seconds((0.0, 10.0), parts)
    assert (found["wall"], found["paused"], found["language_model"], found["step"], found["lost"]) == (6, 4, 2, 2, 2)


def test_micro_batches_without_an_optimizer_step_are_steps_too():
    parts = NOTHING | {"forward": [(0.0, 1.0), (3.0, 4.0)], "backward": [(1.0, 2.0), (4.0, 5.0)], "step": [(3.0, 6.0)]}
    found = loop_seconds((0.0, 6.0), parts)
    assert (found["step"], found["forward"], found["backward"], found["optimizer"], found["lost"]) == (5, 2, 2, 1, 1)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")


def test_the_callback_accounts_for_a_real_training(material, tmp_path):
    """24 steps of two micro-batches, with evaluations, figures and checkpoints in between."""
    found = tmp_path / "loop.json"
    overrides = [
        *toy_overrides(*material, tmp_path / "run"),
        "trainer.accumulate_grad_batches=2",
        "+callbacks.loop_times._target_=jsae_lightning.benchmarking.loop_times.LoopTimes",
        f"+callbacks.loop_times.path={found}",
    ]
    assert train(overrides, output=tmp_path / "output") == 0, (tmp_path / "output").read_text()
    record = json.loads(found.read_text())
    seconds, metrics = record["seconds"], json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (record["steps"], record["batch_tokens"], record["buffer_batches"]) == (24, 64, 5)
    assert record["tokens_per_second"] * seconds["wall"] == pytest.approx(24 * 64)
    assert all(seconds[name] > 0 for name in seconds if name not in ("overlap", "lost_between", "lost_around"))
    assert seconds["overlap"] == pytest.approx(0, abs=1e-6)
    assert seconds["language_model"] + seconds["step"] + seconds["lost"] == pytest.approx(seconds["wall"])
    assert seconds["lost_between"] + seconds["lost_around"] == pytest.approx(seconds["lost"])
    assert 0 < seconds["paused"] <= metrics["time/paused_seconds"] + 1e-3
    table = "\n".join(loop_table(record | {"overrides": ["sae.k=4"]}))
    assert "jsae-train sae.k=4" in table
    assert "the last block of 5 batches was made and not used up" in table
    assert sum(shares(seconds)[name] for name in ("language_model", "step", "lost")) == pytest.approx(1)


@pytest.mark.parametrize("override", ["trainer.max_steps=3", "hydra.run.dir=x", "+ckpt_path=auto"])
def test_what_the_measurement_sets_itself_is_refused(override):
    with pytest.raises(UserError, match=f"{override.lstrip('+').split('=')[0]}: is set by --train itself"):
        measure_loop([override], steps=2)


@pytest.mark.slow
def test_the_command_trains_and_writes_the_shares(material, tmp_path, monkeypatch, capfd):
    model, text = material
    overrides = [o for o in toy_overrides(model, text, tmp_path) if not o.startswith("hydra.run.dir")]
    monkeypatch.setattr(
        sys, "argv", ["jsae-bench", "--train", "--steps", "10", "--json", str(tmp_path / "l.json"), *overrides]
    )
    bench.main()
    record = json.loads((tmp_path / "l.json").read_text())
    assert record["steps"] == 10
    assert record["overrides"] == overrides
    assert set(record["shares"]) == set(record["seconds"]) - {"wall", "paused"}
    assert record["versions"]["cores"] >= 1
    assert "lost outside language model and step" in capfd.readouterr().out


@pytest.mark.slow
def test_a_training_that_refuses_its_settings_ends_the_command_so(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["jsae-bench", "--train", "sae.k=999999"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("jsae-bench: error: --train: jsae-train refused")
