"""Examples for automated interpretability and the scores that come back."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from factories import make_pair
from held_out_factory import make_held_out
from jsae_lightning import autointerp
from jsae_lightning.autointerp_export import export_autointerp, priorities
from jsae_lightning.errors import UserError
from jsae_lightning.interpretation_scores import FIELDS, Interpretation, load_scores, write_scores
from test_contexts import dense_latents


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_export_against_dense_activations(tmp_path):
    held_out = make_held_out(sequences=12, seq=40, batch_sequences=5)
    paths = export_autointerp(held_out, tmp_path, latents=None, examples=2, quantiles=3)
    dense = dense_latents(held_out)
    not_active = 0
    for side in ("input", "output"):
        records = read(paths[side])
        alive = (dense[side] > 0).any(dim=1).any(dim=0).nonzero()[:, 0]
        assert [record["latent"] for record in records] == alive.tolist()
        for record in records:
            values = dense[side][:, :, record["latent"]]
            assert record["count"] == (values > 0).sum()
            assert record["density"] == pytest.approx(record["count"] / held_out.included.sum().item())
            assert record["max_activation"] == pytest.approx(values.max().item(), rel=1e-4)
            top = record["most_positive_activation_records"]
            best = values.max(dim=1).values.sort(descending=True).values
            assert [e["activations"][e["peak"]] for e in top] == pytest.approx(best[best > 0][:2].tolist(), rel=1e-4)
            groups = record["random_sample_by_quantile"]
            drawn = [e for group in groups for e in group]
            active_sequences = int((values > 0).any(dim=1).sum())
            assert len(drawn) == min(6, active_sequences)
            assert len({e["sequence"] for e in drawn}) == len(drawn)
            peaks = [e["activations"][e["peak"]] for e in drawn]
            assert peaks == sorted(peaks)
            assert record["quantile_boundaries"] == [group[0]["activations"][group[0]["peak"]] for group in groups[1:]]
            assert all(not any(e["activations"]) for e in record["not_active"])
            not_active += len(record["not_active"])
            assert len(record["random_sample"]) == 2
            for example in top + drawn + record["random_sample"] + record["not_active"]:
                first = example["position"] - example["peak"]
                part = slice(first, first + len(example["tokens"]))
                assert example["token_ids"] == held_out.tokens[example["sequence"], part].tolist()
                expected = values[example["sequence"], part].tolist()
                assert example["activations"] == pytest.approx(expected, rel=1e-4)
    assert not_active > 0


def test_passes_and_writing_say_how_far_they_are(tmp_path, caplog):
    with caplog.at_level("INFO"):
        export_autointerp(make_held_out(sequences=6, seq=10), tmp_path, latents=3, examples=2)
    for name in ("examples", "windows"):
        assert f"autointerp: {name}: 6/6 sequences  left 0:00:00" in caplog.messages
    for side in ("input", "output"):
        assert f"autointerp: {side}: 3/3 latents  left 0:00:00" in caplog.messages


def test_latents_are_drawn_and_batches_do_not_matter(tmp_path):
    contents = []
    for batch_sequences in (1, 4):
        held_out = make_held_out(sequences=8, batch_sequences=batch_sequences)
        paths = export_autointerp(held_out, tmp_path / str(batch_sequences), latents=5, examples=2)
        contents.append(paths["input"].read_text())
        assert len(read(paths["input"])) == 5
    assert contents[0] == contents[1]
    other = export_autointerp(make_held_out(sequences=8, seed=9), tmp_path / "9", latents=5, examples=2)
    assert [r["latent"] for r in read(other["input"])] != [json.loads(x)["latent"] for x in contents[0].splitlines()]


def test_priorities_are_uniform_and_differ_by_row_sequence_and_seed():
    drawn = torch.stack([priorities(torch.arange(200), sequence, 3) for sequence in range(200)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert abs(drawn.mean() - 0.5) < 0.01
    assert torch.histc(drawn, 10, 0, 1).min() > 3700
    assert len(drawn.flatten().unique()) > 39_000
    assert not torch.equal(drawn[0], priorities(torch.arange(200), 0, 4))


def test_mistakes_of_the_export(tmp_path):
    for name in ("latents", "examples", "quantiles"):
        with pytest.raises(UserError, match=f"{name}: 0"):
            export_autointerp(make_held_out(), tmp_path, **{"latents": 2, "examples": 2} | {name: 0})


def test_scores_from_either_format(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"side": "input", "latent": 3, "explanation": "dots, and \\u00e9", "score": 0.5, "model": "x"}\n\n'
        '{"side": "output", "latent": 0, "explanation": null, "score": -1, "scorer": "fuzz"}\n'
    )
    (tmp_path / "a.csv").write_text(
        'side,latent,explanation,score,scorer\ninput,3,"dots, and \u00e9",0.5,\noutput,0,,-1,fuzz\n', encoding="utf-8"
    )
    expected = [Interpretation("input", 3, "dots, and \u00e9", 0.5), Interpretation("output", 0, None, -1.0, "fuzz")]
    for name in ("a.jsonl", "a.csv"):
        assert load_scores(tmp_path / name) == expected
    path = write_scores(expected, tmp_path / "scores.jsonl")
    assert load_scores(path) == expected
    assert all(tuple(row) == FIELDS for row in read(path))


GOOD = '{"side": "input", "latent": 1, "score": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"side": "in", "latent": 1, "score": 1}', "line 2: side: 'in' is neither"),
        ('{"side": "input", "latent": -1, "score": 1}', "line 2: latent: -1 is not an integer"),
        ('{"side": "input", "latent": true, "score": 1}', "line 2: latent: True"),
        ('{"side": "input", "score": 1}', "line 2: latent: nothing"),
        ('{"side": "input", "latent": 2, "score": "high"}', "line 2: score: 'high' is not a finite number"),
        ('{"side": "input", "latent": 2, "score": NaN}', "line 2: score: nan"),
        ('{"side": "input", "latent": 2, "explanation": 4}', "line 2: explanation: 4 is not text"),
        ('{"side": "input", "latent": 2}', "line 2: explanation: is missing, and so is score"),
        ('{"side": "input", "latent": 1, "score": 2}', "line 2: input latent 1 has line 1 already"),
        ('{"side": "input"', "line 2: is no valid JSON"),
        ("[1]", "line 2: is .1., not a JSON object"),
    ],
)
def test_mistakes_in_scores(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(UserError, match=message) as error:
        load_scores(path)
    assert str(error.value).startswith(str(path))


def test_mistakes_in_score_files(tmp_path):
    for name, content, message in (
        ("a.txt", b"", "neither .jsonl nor .csv"),
        ("a.jsonl", b"\n", "holds no line"),
        ("b.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"side,score\ninput,1\n", "line 1: has no column latent"),
        ("b.csv", b"side,latent,explanation\ninput,1,dots, commas\n", "line 2: has more columns"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_scores(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        load_scores(tmp_path / "c.csv")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["jsae-autointerp", *map(str, arguments)])
    autointerp.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    levels: list[int] = []
    monkeypatch.setattr(autointerp, "log_to_stdout", levels.append)
    monkeypatch.setattr(autointerp, "load_held_out", lambda run, overrides: make_held_out())
    command(monkeypatch, tmp_path, "--latents", 2, "--examples", 1)
    assert levels == [logging.INFO]  # how far it is
    assert len(read(tmp_path / "eval" / "autointerp" / "output.jsonl")) == 2
    shown = lambda run, overrides: SimpleNamespace(cfg=OmegaConf.create({"of": overrides}))  # noqa: E731
    monkeypatch.setattr(autointerp, "read_request", shown)
    capsys.readouterr()
    command(monkeypatch, tmp_path, "data=c4", "--cfg", "job")
    assert capsys.readouterr().out == "of:\n- data=c4\n"
    scores = tmp_path / "s.csv"
    scores.write_text("side,latent,score\ninput,1,0.5\n")
    make_pair(d_sae=2, k=1).float().save(tmp_path / "sae_pair")
    command(monkeypatch, tmp_path, "--load-scores", scores, "--out", tmp_path / "other")
    assert read(tmp_path / "other" / "autointerp" / "scores.jsonl")[0]["score"] == 0.5
    scores.write_text("side,latent,score\ninput,1,0.5\noutput,2,0.5\n")
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, "--load-scores", scores)
    assert "line 3: latent: 2, but this pair's output latents are 0 to 1: the scores" in capsys.readouterr().err
    for arguments in ((tmp_path / "nowhere",), (tmp_path, "--latents", "x"), (tmp_path, "--load-scores", "s.txt")):
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, *arguments)
        assert end.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err
