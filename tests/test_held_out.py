"""Which held-out tokens an evaluation may ask for: by the configuration alone, nothing is trained here."""

import pytest

from data_factories import data_settings
from jsae_lightning.errors import UserError
from jsae_lightning.evaluate_config import compose_evaluation, held_out_as_in_training, held_out_sequences


@pytest.fixture
def folder(tmp_path):
    """A run's folder, named `run`, with two files that may stand for data."""
    (tmp_path / "run").mkdir()
    for name in ("metrics.json", "status.json"):
        (tmp_path / "run" / name).touch()
    return tmp_path / "run"


def exported():
    """What an export tells of its training: 16 sequences of 16 tokens are held out."""
    model = {"name": "EleutherAI/pythia-70m", "revision": None, "layer": 1, "dtype": "float32", "synthetic": None,
             "random_weights": False, "random_seed": 0}  # fmt: skip
    return {"model": model, "data": data_settings(val_sequences=16), "evaluation": {"exclude_first_position": False}}


def test_a_stream_is_not_judged_on_what_it_was_trained_on(folder):
    pair = exported()
    pair["data"] |= {"streaming": True, "val_split": None, "source": "hub", "name": "x", "path": None}
    pair["data"]["document_separator"] = None
    wanted = ["eval.tokens=1600"]
    count, remark = held_out_sequences(compose_evaluation(folder, pair, wanted), pair, 16)
    assert count == 16
    assert "learnt from the next" in remark and "eval.tokens: 1,600 asked for" in remark
    assert held_out_sequences(compose_evaluation(folder, pair, ["eval.tokens=100"]), pair, 16) == (7, None)
    other = compose_evaluation(folder, pair, [*wanted, "data.name=another"])
    assert held_out_sequences(other, pair, 16) == (100, None)
    own = compose_evaluation(folder, pair, [*wanted, "data.val_split=validation"])
    assert held_out_sequences(own, pair, 16) == (100, None)


def test_a_stream_is_capped_in_tokens_without_eval_tokens_too(folder):
    """Training held out 16 sequences of 16 tokens: 256 tokens, whatever the length and the number asked for."""
    pair = exported()
    pair["data"] |= {"streaming": True, "source": "hub", "name": "x", "path": None, "document_separator": None}

    def held_out(*overrides):
        return held_out_sequences(compose_evaluation(folder, pair, overrides), pair, 32)

    assert held_out() == (16, None)
    count, remark = held_out("data.val_sequences=17")
    assert count == 16 and remark.startswith("data.val_sequences: 17 asked for") and "first 256 tokens" in remark
    assert held_out("data.context_length=24")[0] == 10
    assert held_out("data.context_length=null")[0] == 8
    assert held_out("data.context_length=8", "eval.tokens=256") == (32, None)
    assert held_out("data.context_length=8", "eval.tokens=257")[0] == 32
    assert held_out("data.context_length=24", "data.name=another") == (16, None)
    with pytest.raises(UserError, match=r"data\.context_length: 257.*first 256 tokens"):
        held_out("data.context_length=257")


def test_the_data_of_training_are_known_under_other_names(folder, monkeypatch):
    """Otherwise what was trained on would be judged."""
    pair = exported()
    rows = folder / "metrics.json"
    pair["data"] |= {"streaming": True, "source": "jsonl", "path": str(rows), "document_separator": None}
    monkeypatch.chdir(folder)
    for path in ("metrics.json", "./metrics.json", f"{folder}/../run/metrics.json"):
        cfg = compose_evaluation(folder, pair, [f"data.path={path}", "eval.tokens=1600"])
        assert held_out_sequences(cfg, pair, 16)[0] == 16
        assert held_out_as_in_training(cfg, pair) is pair["data"]
    pair["data"]["path"] = "metrics.json"  # as older exports have it
    assert held_out_sequences(compose_evaluation(folder, pair, ["eval.tokens=1600"]), pair, 16)[0] == 16
    other = compose_evaluation(folder, pair, ["data.path=status.json", "eval.tokens=1600"])
    assert held_out_sequences(other, pair, 16)[0] == 100 and held_out_as_in_training(other, pair) is None
    pair["data"] |= {"source": "hub", "name": "x", "path": None, "train_split": "train[:50%]"}
    for given in ("data.revision=main", "data.train_split=train"):
        cfg = compose_evaluation(folder, pair, [given, "eval.tokens=1600"])
        assert held_out_sequences(cfg, pair, 16)[0] == 16


@pytest.mark.parametrize(
    ("trained", "override"),
    [
        ({}, "data.text_column=body"),
        ({}, "data.val_fraction=0.5"),
        ({"val_split": "validation"}, "data.val_split=null"),
        ({"streaming": True}, "data.streaming=false"),
        ({}, "data.document_separator=null"),
    ],
)
def test_what_training_held_out_otherwise_is_refused(folder, trained, override):
    pair = exported()
    pair["data"] |= {"source": "hub", "name": "x", "path": None, "document_separator": None} | trained
    if "separator" in override:
        here = str(folder / "metrics.json")
        pair["data"] |= {"source": "text", "path": here, "name": None, "document_separator": "---"}
    cfg = compose_evaluation(folder, pair, [override])
    with pytest.raises(UserError, match=rf"{override.split('=')[0]}: .* but the pair was trained on these data"):
        held_out_sequences(cfg, pair, 16)
    pair["data"]["train_split"] = "another"
    assert held_out_sequences(cfg, pair, 16) == (16, None)
